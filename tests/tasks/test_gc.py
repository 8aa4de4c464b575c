"""Collecting what the store no longer needs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from tasks import state
from tasks.gc import gc, in_use
from tasks.keys import sha256
from tasks.manifest import Record
from tasks.store import Store
from tests.tasks.toy import fill, record


def published(store: Store, tmp_path: Path, name: str, stage: str = "pruning", **inputs: str) -> Record:
    return store.publish(fill(tmp_path / name, name), record(sha256(name), stage, inputs))


def test_gc_keeps_what_is_named_and_what_the_last_runs_used(store: Store, tmp_path: Path) -> None:
    dense = published(store, tmp_path, "dense", "dense")
    old, named, newer = (published(store, tmp_path, name, dense=dense.digest) for name in ("old", "named", "newer"))
    time.sleep(0.02)
    store.touch(newer.key)
    published(store, tmp_path, "unrelated", "dense")
    assert not gc(store).artifacts, "all of it is young"
    planned = gc(store, [named.digest], keep_runs=1, grace_seconds=-1, dry_run=True)
    assert store.find(old.key)
    freed = gc(store, [named.digest], keep_runs=1, grace_seconds=-1)
    assert freed == planned and [removed.digest for removed in freed.artifacts] == [old.digest]
    assert freed.artifacts[0].stage == "pruning" and freed.bytes > 0
    assert store.find(old.key) is None and store.record(old.key) is None
    assert store.find(newer.key) and store.find(named.key)
    assert store.find(dense.key), "newer was computed from it"


def test_a_hit_counts_as_use(store: Store, tmp_path: Path) -> None:
    old, newer = (published(store, tmp_path, name) for name in ("old", "newer"))
    time.sleep(0.02)
    store.touch(old.key)
    gc(store, keep_runs=1, grace_seconds=-1)
    assert store.find(old.key) and store.find(newer.key) is None


def test_gc_empties_the_quarantine(local: Store, tmp_path: Path) -> None:
    made = published(local, tmp_path, "damaged")
    (local.materialise(made.digest) / "a.bin").unlink()
    assert local.find(made.key) is None and local.place.entries("quarantine")
    gc(local)
    assert local.place.entries("quarantine"), "a person may still want to look"
    gc(local, grace_seconds=-1)
    assert not local.place.entries("quarantine")


def test_an_artifact_is_as_old_as_its_files(store: Store, tmp_path: Path) -> None:
    published(store, tmp_path, "made")
    time.sleep(0.1)
    (entry,) = store.place.entries("artifacts")
    assert entry.modified <= time.time() - 0.1


def test_checkpoints_that_nobody_came_back_for_go(tmp_path: Path) -> None:
    remote = Store(f"memory://{tmp_path.name}/forgotten")
    remote.place.write("work/key/0001/state.bin", b"state")
    gc(remote)
    assert remote.place.sizes("work")
    gc(remote, grace_seconds=-1)
    assert not remote.place.sizes("work")


def test_what_a_run_under_way_was_computed_from_stays(local: Store, tmp_path: Path) -> None:
    """Its healing has taken hours, and other runs were made meanwhile."""
    dense = published(local, tmp_path, "dense", "dense")
    calibration = published(local, tmp_path, "calibration", "calibration", dense=dense.digest)
    pruning = published(local, tmp_path, "pruning", "pruning", calibration=calibration.digest)
    others = [published(local, tmp_path, f"other {stage}", stage) for stage in ("dense", "calibration", "pruning")]
    for made in (dense, calibration, pruning, *others):
        age(local, made, seconds=7200)
    with in_use(local, [pruning.key]):
        wait_until(lambda: modified(local, pruning.key) > time.time() - 60)
        gone = {removed.digest for removed in gc(local, keep_runs=0).artifacts}
    assert gone == {other.digest for other in others}


def test_what_is_in_use_is_marked_again_and_again(local: Store, tmp_path: Path) -> None:
    made = published(local, tmp_path, "made")
    with in_use(local, [made.key], seconds=0.01):
        for _ in range(3):
            age(local, made, seconds=7200)
            wait_until(lambda: modified(local, made.key) > time.time() - 60)
    age(local, made, seconds=7200)
    time.sleep(0.1)
    assert modified(local, made.key) < time.time() - 3600, "its user has ended"


def test_work_that_nobody_came_back_for_goes_unless_it_is_locked(local: Store) -> None:
    works = {name: state.work(sha256(name)) for name in ("forgotten", "running", "young")}
    for work in works.values():
        (work / "checkpoints").mkdir(parents=True)
        (work / "checkpoints" / "state.bin").write_text("state")
    for name in ("forgotten", "running"):
        for path in (works[name] / "checkpoints" / "state.bin", works[name] / "checkpoints", works[name]):
            os.utime(path, (1, 1))
    with FileLock(works["running"].with_suffix(".lock")):
        gc(local)
    assert {name for name, work in works.items() if work.exists()} == {"running", "young"}


def age(store: Store, made: Record, seconds: float) -> None:
    """As if it was published so long ago."""
    assert store.place.local is not None
    then = time.time() - seconds
    for path in (f"keys/{made.key}.json", f"artifacts/{made.digest}"):
        os.utime(store.place.local / path, (then, then))


def modified(store: Store, key: str) -> float:
    assert store.place.local is not None
    return (store.place.local / "keys" / f"{key}.json").stat().st_mtime


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
