"""Digests of files that have not changed since they were taken, so that a plan need not read a data set again."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tasks import atomic, state

SETTLED_NS = 2_000_000_000
"""A file this young may change once more within the resolution of its clock; its digest is not remembered."""


def digest(spec: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """`compute()`, or what it gave before for the same spec and untouched files (path, size, times, inode)."""
    stamp, newest = _stamp(spec, files)
    path = state.home() / "digests" / stamp
    if path.is_file():
        return path.read_text()
    found = compute()
    is_settled = time.time_ns() - newest > SETTLED_NS and _stamp(spec, files)[0] == stamp
    if is_settled and state.home().is_dir():  # a plan alone makes no state folder
        atomic.write(path, found.encode())
    return found


def _stamp(spec: str, files: Sequence[Path]) -> tuple[str, int]:
    """One digest over what the file system says of the files, and when the youngest was touched."""
    total, newest = hashlib.sha256(spec.encode()), 0
    for file in files:
        stat = os.stat(file)
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        total.update(f"{file.resolve()} {stat.st_size} {times} {stat.st_dev} {stat.st_ino}\n".encode())
        newest = max(newest, *times)
    return total.hexdigest(), newest
