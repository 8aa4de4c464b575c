"""Checkpoints in a store that several machines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.checkpoints import Checkpoints
from tasks.store import Store
from tests.tasks.toy import KEY


def test_checkpoints_travel_with_a_remote_store(tmp_path: Path) -> None:
    remote = Store(f"memory://{tmp_path.name}/travel")
    here = Checkpoints(remote, KEY, tmp_path / "here", seconds=0)
    here.restore()
    for step in (1, 2):
        (here.folder / "state.bin").write_text(f"step {step}")
        here.save()
    assert len(remote.place.entries(f"work/{KEY}")) == 1
    there = Checkpoints(remote, KEY, tmp_path / "there")
    there.restore()
    assert (there.folder / "state.bin").read_text() == "step 2"
    here.drop()
    assert not remote.place.entries(f"work/{KEY}")


def test_a_torn_checkpoint_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remote = Store(f"memory://{tmp_path.name}/torn")
    here = Checkpoints(remote, KEY, tmp_path / "here", seconds=0)
    here.restore()
    (here.folder / "state.bin").write_text("step 1")
    here.save()
    copy = remote.place.entries(f"work/{KEY}")[0].name
    remote.place.write(f"work/{KEY}/{copy}/state.bin", b"step X")
    there = Checkpoints(remote, KEY, tmp_path / "there")
    there.restore()
    assert not list(there.folder.iterdir()) and "cannot be used" in caplog.text


def test_a_local_store_copies_no_checkpoints(tmp_path: Path) -> None:
    local = Store(str(tmp_path / "store"))
    here = Checkpoints(local, KEY, tmp_path / "here", seconds=0)
    here.restore()
    (here.folder / "state.bin").write_text("step 1")
    here.save()
    here.drop()
    assert (here.folder / "state.bin").exists() and not local.place.entries("work")


def test_a_failed_upload_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remote = Store(f"memory://{tmp_path.name}/refusing")
    here = Checkpoints(remote, KEY, tmp_path / "here", seconds=0)
    here.restore()
    (here.folder / "state.bin").write_text("step 1")

    def refuse(*arguments: object) -> None:
        raise PermissionError("refused")

    monkeypatch.setattr(remote.place, "publish", refuse)
    monkeypatch.setattr(remote.place, "remove", refuse)
    here.save()
    here.drop()
    assert "checkpoints could not be saved" in caplog.text


def test_uploads_keep_their_distance(tmp_path: Path) -> None:
    remote = Store(f"memory://{tmp_path.name}/often")
    here = Checkpoints(remote, KEY, tmp_path / "here", seconds=60)
    here.restore()
    for step in (1, 2):
        (here.folder / "state.bin").write_text(f"step {step}")
        here.save()
    (copy,) = remote.place.entries(f"work/{KEY}")
    assert remote.place.read(f"work/{KEY}/{copy.name}/state.bin") == b"step 1"
