"""The ledger of alias moves: one JSON line each, appended and synced, never rewritten."""

from __future__ import annotations

import getpass
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tasks import state


@dataclass(frozen=True)
class Move:
    """One move of an alias from a version to another (None: it pointed nowhere).

    who: the user. when: UTC, ISO 8601. gate: the digest of the verdict behind it, if there was one.
    """

    who: str
    when: str
    name: str
    alias: str
    before: str | None
    after: str | None
    gate: str | None
    reason: str

    def __str__(self) -> str:
        moved = f"{self.before or '-'} -> {self.after or '-'}"
        return f"{self.when}  {self.name}@{self.alias}  {moved}  {self.who}  {self.reason}"

    def line(self) -> str:
        """The move as one line of JSON."""
        moved = {"name": self.name, "alias": self.alias, "from": self.before, "to": self.after}
        return json.dumps({"when": self.when, "who": self.who, **moved, "gate": self.gate, "reason": self.reason})


def path() -> Path:
    """The file, in the state folder."""
    return state.home() / "ledger.jsonl"


def record(name: str, alias: str, before: str | None, after: str | None, reason: str, gate: str | None = None) -> Move:
    """Append a move made now by this user, and bring it to the disk."""
    when = datetime.now(UTC).isoformat(timespec="milliseconds")
    move = Move(_user(), when, name, alias, before, after, gate, reason)
    path().parent.mkdir(parents=True, exist_ok=True)
    with open(path(), "a+b") as file:
        file.write(_after_torn_line(file.tell(), path()) + move.line().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return move


def moves(name: str | None = None) -> list[Move]:
    """The moves of a model (None: of all), oldest first. Half a line that a power cut left is passed over."""
    if not path().exists():
        return []
    found = [move for line in path().read_text(encoding="utf-8", errors="replace").splitlines() for move in _read(line)]
    return [move for move in found if name in (None, move.name)]


def _after_torn_line(size: int, file: Path) -> bytes:
    """A newline, if the last line has none: a new move must not be lost behind half of an old one."""
    if size == 0:
        return b""
    with open(file, "rb") as existing:
        existing.seek(-1, os.SEEK_END)
        return b"" if existing.read(1) == b"\n" else b"\n"


def _read(line: str) -> list[Move]:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return []
    moved = {"before": entry.pop("from"), "after": entry.pop("to")}
    return [Move(**entry, **moved)]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under an id that has no name
        return str(os.getuid())
