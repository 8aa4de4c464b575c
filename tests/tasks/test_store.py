"""The store: what is published is found whole, and what is damaged is never read."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import manifest, state
from tasks.gc import gc
from tasks.keys import sha256
from tasks.manifest import DamagedError, Manifest
from tasks.store import ArtifactGoneError, Store, StoreError
from tests.tasks.toy import KEY, fill, record

ROOT = Path(__file__).parents[2]


def folder_of(store: Store, digest: str) -> Path:
    assert store.place.local is not None
    return store.place.local / "artifacts" / digest


def everything(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_is_published_is_found_by_key_with_all_that_was_said_of_it(store: Store, tmp_path: Path) -> None:
    made = store.publish(fill(tmp_path / "out"), record())
    assert store.find(KEY) == made
    assert made.metrics == {"kept": 3.0} and made.fallbacks == ("a",)
    folder = store.materialise(made.digest)
    assert (folder / "deep" / "b.json").read_text() == "{}" and (folder / "a.bin").read_text() == "weights"
    assert store.manifest(made.digest).files.keys() == {"a.bin", "deep/b.json"}


def test_the_same_bytes_are_one_artifact_whatever_the_key(store: Store, tmp_path: Path) -> None:
    first = store.publish(fill(tmp_path / "one"), record())
    second = store.publish(fill(tmp_path / "two"), record(sha256("another")))
    third = store.publish(fill(tmp_path / "three", "other weights"), record(sha256("third")))
    assert first.digest == second.digest != third.digest
    assert store.find(KEY) == first and store.find(second.key) == second
    assert len(store.place.entries("artifacts")) == 2


def test_a_digest_is_of_names_and_bytes(tmp_path: Path) -> None:
    files = manifest.scan(fill(tmp_path / "out"))
    renamed = {name.replace("a.", "c."): file for name, file in files.items()}
    assert manifest.digest_of(files) == manifest.digest_of(dict(reversed(files.items())))
    assert manifest.digest_of(files) != manifest.digest_of(renamed)


def test_an_unknown_key_is_a_miss(store: Store) -> None:
    assert store.find(KEY) is None and store.records() == []


def test_a_local_artifact_is_handed_out_in_place_and_read_only(local: Store, tmp_path: Path) -> None:
    made = local.publish(fill(tmp_path / "out"), record())
    folder = local.materialise(made.digest)
    assert folder == folder_of(local, made.digest)
    assert not (folder / "a.bin").stat().st_mode & 0o222


def test_a_copy_can_be_written(store: Store, tmp_path: Path) -> None:
    made = store.publish(fill(tmp_path / "out"), record())
    copy = store.materialise(made.digest, tmp_path / "copy")
    (copy / "a.bin").write_text("mine")
    assert store.find(KEY) == made
    with pytest.raises(StoreError, match="name a new folder"):
        store.materialise(made.digest, tmp_path / "copy")


DAMAGE = {
    "tampered": lambda folder: overwrite(folder / "a.bin", "weighty"),
    "truncated": lambda folder: overwrite(folder / "a.bin", "wei"),
    "a file lost": lambda folder: (folder / "deep" / "b.json").unlink(),
    "a file added": lambda folder: (folder / "c.bin").write_text("x"),
    "a link": lambda folder: (folder / "c.bin").symlink_to("/etc/hostname"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: overwrite(folder / "manifest.json", (folder / "manifest.json").read_text()[:200]),
    "a manifest of other files": lambda folder: rewrite(folder / "manifest.json", files={}),
    "a manifest that escapes": lambda folder: escape(folder / "manifest.json"),
}


def overwrite(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def rewrite(path: Path, **changes: Any) -> None:
    overwrite(path, json.dumps(json.loads(path.read_text()) | changes))


def escape(path: Path) -> None:
    files = json.loads(path.read_text())["files"]
    rewrite(path, files={"../../../escaped": files["a.bin"]})


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_artifact_is_set_aside_and_can_be_published_again(
    damage: Any, local: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = local.publish(fill(tmp_path / "out"), record())
    damage(folder_of(local, made.digest))
    with caplog.at_level(logging.WARNING, "regrow"):
        assert local.find(KEY) is None
    assert "is damaged" in caplog.text and "quarantine" in caplog.text
    assert [entry.name.split(".")[0] for entry in local.place.entries("quarantine")] == [made.digest]
    with pytest.raises(ArtifactGoneError):
        local.materialise(made.digest)
    local.publish(fill(tmp_path / "again"), record())
    assert local.find(KEY) == made


def test_tampering_is_noticed_in_a_process_that_has_read_the_artifact_before(local: Store, tmp_path: Path) -> None:
    made = local.publish(fill(tmp_path / "out"), record())
    assert local.find(KEY)
    path = folder_of(local, made.digest) / "a.bin"
    path.chmod(0o644)
    path.write_text("weighty")
    assert local.find(KEY) is None


def test_what_a_bucket_holds_is_verified_when_it_is_downloaded(tmp_path: Path) -> None:
    remote = Store(f"memory://{tmp_path.name}/tampered")
    made = remote.publish(fill(tmp_path / "out"), record())
    remote.place.write(f"artifacts/{made.digest}/a.bin", b"weighty")
    assert remote.find(KEY), "a look at names and sizes finds nothing wrong"
    with pytest.raises(ArtifactGoneError):
        remote.materialise(made.digest)
    assert remote.find(KEY) is None and not list(state.cache().iterdir())


def test_a_download_is_kept_and_verified_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remote = Store(f"memory://{tmp_path.name}/cached")
    made = remote.publish(fill(tmp_path / "out"), record())
    folder = remote.materialise(made.digest)
    assert folder == state.cache() / made.digest == remote.materialise(made.digest)
    overwrite(folder / "a.bin", "weighty")
    assert (remote.materialise(made.digest) / "a.bin").read_text() == "weights"


def test_an_upload_without_its_manifest_does_not_count_and_is_left_alone(tmp_path: Path) -> None:
    remote = Store(f"memory://{tmp_path.name}/half")
    made = remote.publish(fill(tmp_path / "out"), record())
    remote.place.remove(f"artifacts/{made.digest}/manifest.json")
    assert remote.find(KEY) is None and remote.place.sizes(f"artifacts/{made.digest}")
    assert remote.publish(tmp_path / "out", record()) == made == remote.find(KEY)


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../up", "", "a//b", "./a", "a\\b", "manifest.json"])
def test_a_path_that_leaves_the_artifact_is_refused(path: str) -> None:
    with pytest.raises(DamagedError, match="inside the artifact"):
        manifest.check_path(path)


@pytest.mark.parametrize("digest", ["../../secret", "", "ABC", 3])
def test_a_record_whose_digest_is_no_digest_is_damaged(digest: Any, local: Store, tmp_path: Path) -> None:
    made = local.publish(fill(tmp_path / "out"), record())
    assert local.place.local is not None
    rewrite(local.place.local / "keys" / f"{made.key}.json", digest=digest)
    assert local.find(KEY) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "fallbacks": 3}'])
def test_a_torn_key_is_a_miss_with_a_warning(text: str, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.place.write(f"keys/{KEY}.json", text.encode())
    assert store.find(KEY) is None and "is damaged" in caplog.text


def test_a_key_file_of_another_key_is_a_miss(store: Store, tmp_path: Path) -> None:
    made = store.publish(fill(tmp_path / "out"), record())
    other = sha256("other")
    store.place.write(f"keys/{other}.json", made.dump())
    assert store.find(other) is None


def test_an_output_that_cannot_be_an_artifact_is_refused(local: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="left no file"):
        local.publish(tmp_path / "empty", record())
    (fill(tmp_path / "linked") / "link").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="link"):
        local.publish(tmp_path / "linked", record())
    (fill(tmp_path / "reserved") / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match="manifest"):
        local.publish(tmp_path / "reserved", record())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_nothing_behind(small_disk: Path, tmp_path: Path) -> None:
    store = Store(str(small_disk))
    fitting = store.publish(fill(tmp_path / "small"), record(sha256("fits")))
    before = everything(small_disk)
    with pytest.raises(StoreError, match=r"No space left on device.*regrow store gc"):
        store.publish(fill(tmp_path / "large", "x" * 100_000), record())
    assert everything(small_disk) == before and store.find(KEY) is None
    assert store.find(fitting.key) == fitting


@pytest.mark.parametrize("moment", ["copyfile", "fsync", "rename", "replace", "chmod"])
def test_an_error_at_any_moment_leaves_nothing_half_visible(
    moment: str, local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    fill(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fails)
        patch.setattr(shutil if moment == "copyfile" else os, moment, fails)
        with pytest.raises(StoreError, match="cannot write to the store"):
            local.publish(tmp_path / "out", record())
    assert local.find(KEY) is None and not local.place.entries("tmp")
    assert all(local.holds(entry.name) for entry in local.place.entries("artifacts"))
    assert local.publish(tmp_path / "out", record()) == local.find(KEY)


def test_a_failed_upload_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Store(f"memory://{tmp_path.name}/refusing")
    fill(tmp_path / "out")

    def refuse(path: str, data: bytes) -> None:
        raise PermissionError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(remote.place, "write", refuse)
        with pytest.raises(StoreError, match="refused"):
            remote.publish(tmp_path / "out", record())
    assert not remote.place.sizes("artifacts")
    assert remote.publish(tmp_path / "out", record()) == remote.find(KEY)


def test_a_store_that_cannot_be_opened_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="REGROW_STORE = 'nowhere://x' cannot be opened"):
        Store("nowhere://x")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write to the store"):
        Store(str(tmp_path / "file")).publish(fill(tmp_path / "out"), record())


PUBLISHER = """
import sys, time, pathlib
from tasks import places
from tests.tasks import test_store
def stop(*arguments):
    print("there", flush=True)
    time.sleep(60)
moment = sys.argv[1]
if moment == "race":
    print("there", flush=True)
    sys.stdin.readline()
else:
    setattr(places, moment, stop)
store = test_store.Store(sys.argv[2])
print(store.publish(pathlib.Path(sys.argv[3]), test_store.record()).digest, flush=True)
"""


def publisher(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PUBLISHER, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("moment", ["_take", "_sync_folders", "_rename"])
def test_a_kill_while_publishing_leaves_a_store_that_works(moment: str, local: Store, tmp_path: Path) -> None:
    fill(tmp_path / "out")
    with publisher(moment, local.url, tmp_path / "out") as process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGKILL)
    assert local.find(KEY) is None and not local.place.entries("artifacts")
    assert local.publish(tmp_path / "out", record()) == local.find(KEY)
    gc(local, grace_seconds=-1)
    assert not local.place.entries("tmp") and local.find(KEY)


def test_two_processes_publish_the_same_bytes(local: Store, tmp_path: Path) -> None:
    processes = [publisher("race", local.url, fill(tmp_path / name, "x" * 1_000_000)) for name in ("one", "two")]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
    answers = [process.communicate("go\n")[0] for process in processes]
    found = local.find(KEY)
    assert found is not None and answers == [f"{found.digest}\n"] * 2
    assert not local.place.entries("tmp") and not local.place.entries("quarantine")


def test_records_are_the_newest_first(store: Store, tmp_path: Path) -> None:
    made = [
        store.publish(fill(tmp_path / name), record(sha256(name), stage))
        for name, stage in [("a", "x"), ("b", "y"), ("c", "x")]
    ]
    assert {found.key for found in store.records("x")} == {made[0].key, made[2].key}
    assert len(store.records()) == 3


@pytest.mark.slow
def test_a_bucket_works_as_a_folder_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        store = Store("s3://bucket/some/prefix")
        made = store.publish(fill(tmp_path / "out"), record())
        assert store.find(KEY) == made
        assert (store.materialise(made.digest) / "deep" / "b.json").read_text() == "{}"
        store.touch(KEY)
        assert [found.key for found in store.records("pruning")] == [KEY]
        assert len(gc(store, keep_runs=0, grace_seconds=-1).artifacts) == 1
        assert store.find(KEY) is None and not store.place.sizes("artifacts")
        with pytest.raises(StoreError, match="cannot write to the store"):
            Store("s3://no-such-bucket/x").publish(tmp_path / "out", record())
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_manifest_survives_the_road_through_json(tmp_path: Path) -> None:
    files = manifest.scan(fill(tmp_path / "out"))
    digest = manifest.digest_of(files)
    made = Manifest(record().of(digest), files)
    assert Manifest.load(made.dump(), digest) == made
    assert made.size == 9
