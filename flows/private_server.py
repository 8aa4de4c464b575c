"""A Prefect server for this process alone, where none is configured: on the loopback, and gone when the process is.

Prefect can start one itself, but in the terminal's process group: there Ctrl-C ends the server first, so that
the flow waits a minute for it and cannot say that it was interrupted, and after a kill -9 it stays.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from heal.errors import HealError

STARTUP_SECONDS = 180

_started: list[subprocess.Popen[str]] = []  # one that is collected closes its pipe, and the server ends


class ServerError(HealError):
    """The server did not start."""


@contextmanager
def available() -> Iterator[None]:
    """Flows in this context have a server: the configured one, else one that is started here."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield
        return
    with temporary_settings({PREFECT_API_URL: _start()}):
        yield


def _start() -> str:
    """Start it as a process of its own; its address, once it answers.

    Nothing stops it but the end of this process, which closes its stdin: Prefect still sends events at exit.
    """
    command = [sys.executable, "-m", "flows.private_server"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    _started.append(process)
    assert process.stdout is not None
    address: str = process.stdout.readline().strip()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        direct.open(f"{address}/health", timeout=STARTUP_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ServerError(f"Prefect's server did not start ({error}); set PREFECT_API_URL to one that runs") from error
    return address


def _serve() -> None:
    """Print the address, then answer until stdin ends."""
    import uvicorn
    from prefect.server.api.server import create_app

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        sys.stdout.write(f"http://127.0.0.1:{listening.getsockname()[1]}/api\n")
        sys.stdout.flush()
        threading.Thread(target=_end_with_stdin, daemon=True).start()
        app = create_app(ephemeral=True, final=True)
        uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on")).run(sockets=[listening])


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _serve()
