"""Folders that appear whole or not at all, also after a power cut."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path

from heal.errors import BundleError


def write_folder(folder: Path, files: Mapping[str, bytes], mark: str, known: Collection[str]) -> None:
    """Put `files` at `folder`: written beside, synced, renamed. Nothing is left behind after an error.

    A folder that is there is replaced when it is empty, or when it holds `mark` and no names but
    `known`; else BundleError, for something that is not ours would be lost; also when it cannot be written.
    """
    folder = Path(os.path.realpath(folder))
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _refuse_foreign(folder, mark, known)
        beside.mkdir(parents=True)
        for name, data in files.items():
            _write(beside / name, data)
        _sync(beside)
        _move(beside, folder)
    except OSError as error:
        why = error.strerror or error
        raise BundleError(f"{folder} cannot be written: {why}; name a place with space that can") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _sync(folder.parent)


def _refuse_foreign(folder: Path, mark: str, known: Collection[str]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file; name a folder to write to")
    present = {path.name for path in folder.iterdir()}
    foreign = sorted(present - set(known))
    if foreign or (present and mark not in present):
        found = f"holds {', '.join(foreign[:3])}" if foreign else f"has no {mark}"
        raise BundleError(f"{folder} is not ours to overwrite: it {found}; name a new or an empty folder")


def _move(source: Path, target: Path) -> None:
    """Rename; a full folder in the way is set aside first and comes back when the rename does not happen."""
    if not target.exists() or not any(target.iterdir()):
        source.rename(target)
        return
    aside = source.with_name(source.name + ".old")
    target.rename(aside)
    try:
        source.rename(target)
    finally:
        if not target.exists():
            aside.rename(target)
    shutil.rmtree(aside)


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
