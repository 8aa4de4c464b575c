"""Whether the process that began something still lives: its identity as tags, and the check."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import psutil  # type: ignore[import-untyped]

PID, HOST, STARTED = "regrow.pid", "regrow.host", "regrow.process_started"

CLOCK_SLACK = 5.0  # seconds; a corrected clock moves the start, and no id is used again so soon


def identity() -> dict[str, str]:
    """Tags that name this process: host, process id, and its start (ids are used again, starts are not)."""
    return {PID: str(os.getpid()), HOST: socket.gethostname(), STARTED: f"{_started(os.getpid()):.2f}"}


def is_dead(tags: Mapping[str, str]) -> bool:
    """Whether the process that the tags name is gone; False when it cannot be known from this host."""
    if tags.get(HOST) != socket.gethostname() or PID not in tags:
        return False
    started = _started(int(tags[PID]))
    return started is None or abs(started - float(tags.get(STARTED, "nan"))) > CLOCK_SLACK


def _started(pid: int) -> float | None:
    """When the process began, seconds since the epoch; None when it is gone, or dead and not yet waited for."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None
