"""What the store no longer needs: everything but what is named, what the last runs used, and what is in use."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tasks import state
from tasks.manifest import Record
from tasks.store import Store

GRACE_SECONDS = 3600.0
"""What is younger stays: it may belong to a run that is under way."""


@dataclass(frozen=True)
class Removed:
    """One artifact that went, the stage that made it (empty if no key led to it), and its size."""

    digest: str
    stage: str
    bytes: int


@dataclass(frozen=True)
class Freed:
    """What a collection removed."""

    artifacts: tuple[Removed, ...]

    @property
    def bytes(self) -> int:
        """The size of all of them."""
        return sum(artifact.bytes for artifact in self.artifacts)


@contextmanager
def in_use(store: Store, keys: Collection[str], seconds: float = GRACE_SECONDS / 4) -> Iterator[None]:
    """What these keys name counts as used until the end, however long that takes: it is marked every so often."""
    ended = threading.Event()

    def mark() -> None:
        while not ended.is_set():
            for key in keys:
                store.touch(key)
            ended.wait(seconds)

    marking = threading.Thread(target=mark, daemon=True)
    marking.start()
    try:
        yield
    finally:
        ended.set()
        marking.join()


def gc(
    store: Store,
    keep_digests: Collection[str] = (),
    keep_runs: int = 10,
    grace_seconds: float = GRACE_SECONDS,
    dry_run: bool = False,
) -> Freed:
    """Remove the artifacts that nothing refers to, with their keys.

    Kept are `keep_digests` (what registry versions stand for), of every stage the `keep_runs`
    computations that were used last (so all that the last runs used), what is younger than
    `grace_seconds`, and all that these were computed from. dry_run: only say what would go. Raises
    StoreError.
    """
    with store.writing():
        return _collected(store, keep_digests, keep_runs, time.time() - grace_seconds, dry_run)


def _collected(store: Store, keep_digests: Collection[str], keep_runs: int, horizon: float, dry_run: bool) -> Freed:
    used = {entry.name.removesuffix(".json"): entry.modified for entry in store.place.entries("keys")}
    records = [record for record in map(store.record, used) if record is not None]
    recent = {record.digest for record in records if used[record.key] > horizon}
    kept = _with_inputs(set(keep_digests) | recent | _of_last_runs(records, used, keep_runs), records)
    found = {entry.name: entry.modified for entry in store.place.entries("artifacts")}
    doomed = [digest for digest, modified in found.items() if digest not in kept and modified <= horizon]
    freed = Freed(tuple(_described(store, digest, records) for digest in sorted(doomed)))
    if not dry_run:
        _remove(store, doomed, [record.key for record in records if record.digest in set(doomed)])
        _remove_leftovers(store, horizon)
    return freed


def _of_last_runs(records: Iterable[Record], used: dict[str, float], runs: int) -> set[str]:
    """The digests that the last `runs` runs can have used."""
    last: list[Record] = []
    for record in sorted(records, key=lambda record: -used[record.key]):
        if sum(other.stage == record.stage for other in last) < runs:
            last.append(record)
    return {record.digest for record in last}


def _with_inputs(kept: set[str], records: Iterable[Record]) -> set[str]:
    """With all that they were computed from, and what that was computed from in its turn."""
    inputs: dict[str, set[str]] = {}
    for record in records:
        inputs.setdefault(record.digest, set()).update(record.ingredients["inputs"].values())
    found, waiting = set(kept), list(kept)
    while waiting:
        new = inputs.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def _described(store: Store, digest: str, records: Iterable[Record]) -> Removed:
    stage = next((record.stage for record in records if record.digest == digest), "")
    return Removed(digest, stage, sum(store.place.sizes(f"artifacts/{digest}").values()))


def _remove(store: Store, digests: Iterable[str], keys: Iterable[str]) -> None:
    """Keys first: a key without an artifact is only a miss."""
    for key in keys:
        store.place.remove(f"keys/{key}.json")
    for digest in digests:
        store.place.remove(f"artifacts/{digest}")
        shutil.rmtree(state.cache() / digest, ignore_errors=True)


def _remove_leftovers(store: Store, horizon: float) -> None:
    """What killed processes left half-written, what was set aside as damaged, and forgotten checkpoints."""
    for folder in ("tmp", "quarantine", "work"):
        for entry in store.place.entries(folder):
            if entry.modified <= horizon:
                store.place.remove(f"{folder}/{entry.name}")
    for work in (state.home() / "work").glob("*/"):
        # A stage that runs holds the lock, and may write nothing for longer than that.
        with suppress(Timeout), FileLock(work.with_suffix(".lock"), timeout=0):
            if _modified(work) <= horizon:
                shutil.rmtree(work, ignore_errors=True)


def _modified(folder: Path) -> float:
    """When anything in it was written last."""
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
