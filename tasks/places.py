"""Where a store keeps its bytes: a local folder, or anything that fsspec opens (an S3 bucket)."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from tasks import atomic, manifest
from tasks.addresses import public


@dataclass(frozen=True)
class Entry:
    """One name in a folder; modified in seconds since the epoch."""

    name: str
    modified: float


class Place(Protocol):
    """Paths are relative, with forward slashes. Failures are one of `errors`."""

    url: str
    local: Path | None
    errors: tuple[type[Exception], ...]

    def read(self, path: str) -> bytes | None: ...

    def write(self, path: str, data: bytes) -> None: ...

    def touch(self, path: str) -> None: ...

    def entries(self, folder: str) -> list[Entry]: ...

    def sizes(self, folder: str) -> dict[str, int]: ...

    def publish(self, source: Path, names: Iterable[str], target: str, last: Mapping[str, bytes]) -> None: ...

    def download(self, folder: str, names: Iterable[str], target: Path) -> None: ...

    def move(self, source: str, target: str) -> None: ...

    def remove(self, path: str) -> None: ...


def place(url: str) -> Place:
    """A folder for a path or file:// URL, else what fsspec makes of the URL."""
    if url.startswith("file://") or "://" not in url:
        return Folder(Path(os.path.abspath(os.path.expanduser(url.removeprefix("file://")))))
    return Remote(url)


class Folder:
    """A local folder. What appears in it appears whole, by a rename on its own file system."""

    errors: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, root: Path) -> None:
        self.local: Path | None = root
        self.root = root
        self.url = str(root)

    def read(self, path: str) -> bytes | None:
        """The file's bytes; None if there is none."""
        try:
            return (self.root / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: str, data: bytes) -> None:
        """Atomically and durably."""
        atomic.write(self.root / path, data)

    def touch(self, path: str) -> None:
        """Mark as used now."""
        with suppress(FileNotFoundError):
            os.utime(self.root / path)

    def entries(self, folder: str) -> list[Entry]:
        """What is in a folder, half-written files left out."""
        found = []
        with suppress(FileNotFoundError), os.scandir(self.root / folder) as names:
            for name in names:
                with suppress(FileNotFoundError):
                    if not name.name.startswith("."):
                        found.append(Entry(name.name, name.stat(follow_symlinks=False).st_mtime))
        return found

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder. Raises DamagedError for a link or a device."""
        root = self.root / folder
        return {name: (root / name).stat().st_size for name in manifest.names(root)}

    def publish(self, source: Path, names: Iterable[str], target: str, last: Mapping[str, bytes]) -> None:
        """Make a folder of files appear at once: gathered beside, synced, renamed."""
        beside = self.root / "tmp" / uuid.uuid4().hex
        try:
            beside.mkdir(parents=True)
            for name in names:
                _take(source / name, beside / name)
            for name, data in last.items():
                atomic.write(beside / name, data)
            _sync_folders(beside)
            _rename(beside, self.root / target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def download(self, folder: str, names: Iterable[str], target: Path) -> None:
        """Copies, writable."""
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / folder / name, target / name)

    def move(self, source: str, target: str) -> None:
        """Rename; nothing happens if another process was faster."""
        (self.root / target).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.replace(self.root / source, self.root / target)

    def remove(self, path: str) -> None:
        """A file, or a folder, which disappears at once: nobody sees half of it."""
        where = self.root / path
        if where.is_file():
            where.unlink(missing_ok=True)
            return
        doomed = f"tmp/{uuid.uuid4().hex}"
        self.move(path, doomed)
        shutil.rmtree(self.root / doomed, ignore_errors=True)


def _take(source: Path, target: Path) -> None:
    """Hard link, or copy across file systems; read-only, because every later reader is handed this very file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    os.chmod(target, 0o444)
    atomic.sync(target)


def _sync_folders(root: Path) -> None:
    for here, _, _ in os.walk(root, topdown=False):
        atomic.sync(Path(here))


def _rename(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, target)
    except OSError:
        # Another process published the same digest, so the same bytes, first.
        if not target.is_dir():
            raise
    atomic.sync(target.parent)


class Remote:
    """A bucket. Single files are atomic there; a folder counts once its last file is there."""

    def __init__(self, url: str) -> None:
        # Imported here: a local store needs neither.
        from fsspec.core import url_to_fs

        self.url = public(url)
        self.local: Path | None = None
        self.errors: tuple[type[Exception], ...] = _errors(url)
        # Without its cache of listings: other machines write into the same bucket.
        self.files, root = url_to_fs(url, use_listings_cache=False)
        self.root = str(root).rstrip("/")

    def read(self, path: str) -> bytes | None:
        """The file's bytes; None if there is none."""
        try:
            return bytes(self.files.cat_file(self._at(path)))
        except FileNotFoundError:
            return None

    def write(self, path: str, data: bytes) -> None:
        """Atomically."""
        self.files.pipe_file(self._at(path), data)

    def touch(self, path: str) -> None:
        """Mark as used now, by writing it again."""
        data = self.read(path)
        if data is not None:
            self.write(path, data)

    def entries(self, folder: str) -> list[Entry]:
        """What is in a folder."""
        try:
            found = self.files.ls(self._at(folder), detail=True)
        except FileNotFoundError:
            return []
        return [Entry(info["name"].rstrip("/").rpartition("/")[2], self._age(info)) for info in found]

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file below a folder."""
        found = self.files.find(self._at(folder), detail=True)
        return {self._below(name, folder): int(info["size"]) for name, info in found.items()}

    def publish(self, source: Path, names: Iterable[str], target: str, last: Mapping[str, bytes]) -> None:
        """Upload files, then those in `last`, which make the folder count; after a failure take them back."""
        sent = []
        try:
            for name in names:
                sent.append(name)
                self.files.put_file(str(source / name), self._at(f"{target}/{name}"))
            for name, data in last.items():
                self.write(f"{target}/{name}", data)
        except self.errors:
            # Not when the folder counts meanwhile: then another machine published the same digest.
            if not any(self.read(f"{target}/{name}") for name in last):
                for name in sent:
                    self.remove(f"{target}/{name}")
            raise

    def download(self, folder: str, names: Iterable[str], target: Path) -> None:
        """Fetch files."""
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(self._at(f"{folder}/{name}"), str(target / name))

    def move(self, source: str, target: str) -> None:
        """Copy and delete; nothing happens if there is nothing."""
        with suppress(FileNotFoundError):
            self.files.mv(self._at(source), self._at(target), recursive=True)

    def remove(self, path: str) -> None:
        """A file or a folder."""
        with suppress(FileNotFoundError):
            self.files.rm(self._at(path), recursive=True)

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _age(self, info: Mapping[str, Any]) -> float:
        """A folder of a bucket is only a name: it is as new as its newest file."""
        if info["type"] != "directory":
            return _modified(info)
        inside = self.files.find(info["name"], detail=True).values()
        return max(map(_modified, inside), default=time.time())

    def _below(self, name: str, folder: str) -> str:
        return str(name).rpartition(f"{self._at(folder).strip('/')}/")[2]


def _errors(url: str) -> tuple[type[Exception], ...]:
    if not url.startswith(("s3://", "s3a://")):
        return (OSError,)
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    return (OSError, BotoCoreError, ClientError)


def _modified(info: Mapping[str, Any]) -> float:
    """File systems spell it differently."""
    for name in ("LastModified", "mtime", "modified", "created", "updated"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return time.time()
