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
from functools import cache

from heal.errors import HealError
from tasks import mlflow_store, state

STARTUP_SECONDS = 180

_started: list[subprocess.Popen[bytes]] = []  # one that is collected closes its pipe, and the server ends


class ServerError(HealError):
    """The server did not start."""


@contextmanager
def available() -> Iterator[None]:
    """Flows in this context have a server: the configured one, else the one of this process."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield
        return
    # Two that migrate one database at once break it.
    with mlflow_store.locked(state.home() / "locks" / "prefect.lock"):
        address = _start()
    with temporary_settings({PREFECT_API_URL: address}):
        yield


@cache
def _start() -> str:
    """Start it as a process of its own; its address, once it answers.

    Nothing stops it but the end of this process, which closes its stdin: Prefect still sends events at exit.
    """
    for name in ("NO_PROXY", "no_proxy"):  # for Prefect's client as well
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    log = state.prefect_home() / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listening, log.open("ab") as said:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        _started.append(_process(listening.fileno(), said.fileno()))
    try:
        urllib.request.urlopen(f"{address}/health", timeout=STARTUP_SECONDS).close()
    except OSError as error:
        raise ServerError(
            f"Prefect's server did not start ({error}); see {log}, or set PREFECT_API_URL to a server that runs"
        ) from error
    return address


def _process(listening: int, log: int) -> subprocess.Popen[bytes]:
    # Not with the working directory first on the path, as -m has it: a folder `flows` may lie there.
    command = [sys.executable, "-P", "-m", "flows.private_server", str(listening)]
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        pass_fds=[listening],
        start_new_session=True,
    )


def _serve(listening: int) -> None:
    """Answer until stdin ends."""
    import uvicorn
    from prefect.server.api.server import create_app

    threading.Thread(target=_end_with_stdin, daemon=True).start()
    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    server.run(sockets=[socket.socket(fileno=listening)])


def _end_with_stdin() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
