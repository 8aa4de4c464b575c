"""What an artifact says of itself: its files with digests, and the computation that made it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.keys import canonical, sha256

FORMAT = 1
NAME = "manifest.json"
HEX = re.compile("[0-9a-f]{64}")


class DamagedError(ValueError):
    """What was read is not what was written. Never leaves the store: a damaged artifact is a miss."""


@dataclass(frozen=True)
class File:
    """One file of an artifact: its SHA-256 and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Record:
    """One finished computation.

    digest: the artifact it made. ingredients: all that went into the key. seconds: wall time.
    created: UTC, ISO 8601. fallbacks: what the stage did in place of what was asked.
    """

    stage: str
    key: str
    digest: str
    ingredients: dict[str, Any]
    metrics: dict[str, float]
    versions: dict[str, str]
    host: dict[str, Any]
    seconds: float
    created: str
    fallbacks: tuple[str, ...] = ()

    def of(self, digest: str) -> Record:
        """The same computation, now that its artifact is known."""
        return replace(self, digest=digest)

    def dump(self) -> bytes:
        """As JSON."""
        return _json({"format": FORMAT, **asdict(self)})

    @staticmethod
    def load(data: bytes) -> Record:
        """From JSON. Raises DamagedError."""
        return _record(_parsed(data))


@dataclass(frozen=True)
class Manifest:
    """A record, and the artifact's files by path (relative, with forward slashes)."""

    record: Record
    files: dict[str, File] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files.values())

    def dump(self) -> bytes:
        """As JSON."""
        return _json({"format": FORMAT, **asdict(self.record), "files": {k: asdict(v) for k, v in self.files.items()}})

    @staticmethod
    def load(data: bytes, digest: str) -> Manifest:
        """From JSON; `digest` is the artifact's name. Raises DamagedError unless the files add up to it."""
        content = _parsed(data)
        try:
            files = {check_path(name): File(**file) for name, file in content.pop("files").items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"its manifest lists no files ({error})") from error
        if digest_of(files) != digest:
            raise DamagedError("its manifest lists other files than its digest stands for")
        return Manifest(_record(content), files)


def digest_of(files: Mapping[str, File]) -> str:
    """What identifies the bytes: the same files give the same digest, whatever key they came from."""
    return sha256(canonical(sorted([name, file.sha256, file.size] for name, file in files.items())))


def scan(folder: Path) -> dict[str, File]:
    """Every file below a folder, hashed; sorted by path. Raises DamagedError for a link or a device."""
    return {name: File(hash_file(folder / name), (folder / name).stat().st_size) for name in names(folder)}


def names(folder: Path) -> list[str]:
    """The paths of all files below a folder, relative. Raises DamagedError for a link or a device."""
    found = []
    for here, folders, files in os.walk(folder):
        for entry in [*folders, *files]:
            path = Path(here, entry)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise DamagedError(f"{path.relative_to(folder)} is a link or a device, not a file")
        found += [Path(here, file).relative_to(folder).as_posix() for file in files]
    return sorted(found)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_path(name: str) -> str:
    """A path that stays inside the artifact. Raises DamagedError."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name or name == NAME:
        raise DamagedError(f"the path {name!r} in its manifest does not stay inside the artifact")
    return name


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DamagedError(f"it is no JSON ({error})") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise DamagedError(f"it is not of format {FORMAT}")
    return content


def _record(content: dict[str, Any]) -> Record:
    try:
        record = Record(**{**content, "fallbacks": tuple(content["fallbacks"])})
    except (KeyError, TypeError) as error:
        raise DamagedError(f"its fields are not those of a record ({error})") from error
    # They become paths.
    for digest in (record.key, record.digest):
        if not isinstance(digest, str) or not HEX.fullmatch(digest):
            raise DamagedError(f"{digest!r} is no SHA-256")
    return record
