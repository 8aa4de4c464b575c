"""Collecting what the store no longer needs."""

from __future__ import annotations

import time
from pathlib import Path

from tasks.gc import gc
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
