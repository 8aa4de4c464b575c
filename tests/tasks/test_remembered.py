"""Digests that are remembered: never wrong, and not taken twice."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tasks import remembered, state


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files that have settled, and a state folder."""
    monkeypatch.setenv("REGROW_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remembered, "SETTLED_NS", 50_000_000)
    state.home().mkdir()
    made = [tmp_path / "a", tmp_path / "b"]
    for file in made:
        file.write_text("before")
    time.sleep(0.1)
    return made


def read(files: list[Path], log: list[str]) -> str:
    def compute() -> str:
        log.append("read")
        return " ".join(file.read_text() for file in files)

    return remembered.digest("spec", files, compute)


def test_untouched_files_are_read_once(files: list[Path]) -> None:
    log: list[str] = []
    assert read(files, log) == read(files, log) == "before before"
    assert log == ["read"]


def test_files_with_their_old_size_and_time_are_read_again(files: list[Path]) -> None:
    log: list[str] = []
    read(files, log)
    stat = files[0].stat()
    files[0].write_text("behind")
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read(files, log) == "behind before"


def test_a_file_that_may_still_change_is_not_remembered(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "SETTLED_NS", 60_000_000_000)
    log: list[str] = []
    read(files, log), read(files, log)
    assert log == ["read", "read"]


def test_a_file_that_changes_while_it_is_read_is_not_remembered(files: list[Path]) -> None:
    def compute() -> str:
        files[0].write_text("changed")
        time.sleep(0.1)
        return "half of each"

    remembered.digest("spec", files, compute)
    assert read(files, []) == "changed before"


def test_no_state_folder_is_made_for_it(files: list[Path]) -> None:
    state.home().rmdir()
    assert read(files, []) == "before before" and not state.home().exists()
