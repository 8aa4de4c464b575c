"""The artifact store: what stages publish, by digest, and which key leads to which digest.

artifacts/<digest>/...   the files, and manifest.json, written last
keys/<key>.json          the record of the computation with this key, with the digest it made
quarantine/              artifacts that were damaged; never read
work/<key>/              checkpoints of a stage on its way (remote stores only)
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from heal.errors import InputError
from tasks import manifest, state
from tasks.addresses import public
from tasks.manifest import DamagedError, File, Manifest, Record
from tasks.places import Place, place

log = logging.getLogger("regrow")

Signature = tuple[tuple[str, int, int, int], ...]


class StoreError(InputError):
    """The store cannot be read or written; the user must see to disk space, rights or the address."""


class ArtifactGoneError(StoreError):
    """An artifact that is referred to is not there, or was damaged; `digest` says which."""

    def __init__(self, digest: str, where: str) -> None:
        self.digest = digest
        super().__init__(
            f"artifact {digest[:12]} is not in the store {where} any more; run the stage that made it again"
        )


class Store:
    """Artifacts in a folder or a bucket; `url` as in REGROW_STORE."""

    def __init__(self, url: str | None = None) -> None:
        self.place: Place = _opened(url or state.store_url())
        self._verified: dict[str, Signature] = {}

    @property
    def url(self) -> str:
        """Where it is."""
        return self.place.url

    def find(self, key: str, thorough: bool = True) -> Record | None:
        """The finished computation with this key, if its artifact is there and whole.

        thorough: hash every file (of a local store; a remote one is hashed on download), not only
        compare names and sizes.
        """
        record = self.record(key)
        return record if record is not None and self.holds(record.digest, thorough) else None

    def record(self, key: str) -> Record | None:
        """The finished computation with this key, whether or not its artifact is still there."""
        with self.reading():
            data = self.place.read(f"keys/{key}.json")
        if data is None:
            return None
        try:
            record = Record.load(data)
            if record.key != key:
                raise DamagedError("it is of another key")
        except DamagedError as error:
            log.warning("keys/%s.json in %s is damaged: %s; its stage will run again", key, self.url, error)
            return None
        return record

    def records(self, stage: str | None = None, limit: int = 200) -> list[Record]:
        """Finished computations among the last `limit` of the store, newest first."""
        with self.reading():
            entries = sorted(self.place.entries("keys"), key=lambda entry: -entry.modified)[:limit]
        found = (self.record(entry.name.removesuffix(".json")) for entry in entries)
        kept = [record for record in found if record is not None and stage in (None, record.stage)]
        return sorted(kept, key=lambda record: record.created, reverse=True)

    def holds(self, digest: str, thorough: bool = True) -> bool:
        """Whether an artifact is there and whole. A damaged one is set aside with a warning."""
        with self.reading():
            try:
                return self._check(digest, thorough)
            except DamagedError as error:
                self._quarantine(digest, error)
            except FileNotFoundError:  # removed or set aside by another process meanwhile
                pass
        return False

    def manifest(self, digest: str) -> Manifest:
        """What an artifact says of itself. Raises ArtifactGoneError."""
        if not self.holds(digest, thorough=False):
            raise ArtifactGoneError(digest, self.url)
        with self.reading():
            data = self.place.read(_manifest_path(digest))
        assert data is not None
        return Manifest.load(data, digest)

    def materialise(self, digest: str, folder: Path | None = None) -> Path:
        """A local folder with the artifact's files, verified. Raises ArtifactGoneError.

        Without `folder` it is the store's own (read-only) or, of a remote store, a cached copy;
        with it, a writable copy in that new folder.
        """
        if self.place.local is None:
            path = self._cached(digest)
        elif self.holds(digest):
            path = self.place.local / _folder(digest)
        else:
            raise ArtifactGoneError(digest, self.url)
        return path if folder is None else _copied(path, folder)

    def publish(self, output: Path, record: Record) -> Record:
        """Make a folder of files an artifact, and its digest findable by the record's key.

        Returns the record with its digest. The same bytes may be published any number of times, by
        any number of processes. Raises StoreError, having left nothing half-visible.
        """
        files = _scanned(output, record.stage)
        record = record.of(manifest.digest_of(files))
        with self.writing():
            if not self.holds(record.digest):
                last = {manifest.NAME: Manifest(record, files).dump()}
                self.place.publish(output, files, _folder(record.digest), last)
            self.place.write(f"keys/{record.key}.json", record.dump())
        return record

    def touch(self, key: str) -> None:
        """Mark a record as used now: the most recently used are what `gc` keeps. A read-only store may refuse."""
        with suppress(*self.place.errors):
            self.place.touch(f"keys/{key}.json")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Makes what goes wrong with the place inside a StoreError."""
        try:
            yield
        except self.place.errors as error:
            raise StoreError(
                f"cannot read from the store {self.url}: {public(str(error))}; "
                "check its address (REGROW_STORE) and your rights"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Makes what goes wrong with the place inside a StoreError."""
        try:
            yield
        except self.place.errors as error:
            raise StoreError(
                f"cannot write to the store {self.url}: {public(str(error))}; free space (regrow store gc), "
                "check your rights, or name another one in REGROW_STORE"
            ) from error

    def _check(self, digest: str, thorough: bool) -> bool:
        """False if it is not there. Raises DamagedError."""
        data = self.place.read(_manifest_path(digest))
        if data is None:
            # In a bucket a missing manifest is an upload under way; in a folder nobody leaves that behind.
            if self.place.local is not None and (self.place.local / _folder(digest)).exists():
                raise DamagedError("it has no manifest")
            return False
        files = Manifest.load(data, digest).files
        found = self.place.sizes(_folder(digest))
        found.pop(manifest.NAME, None)
        _compare(files, found)
        if thorough and self.place.local is not None:
            self._hash(digest, self.place.local / _folder(digest), files)
        return True

    def _hash(self, digest: str, folder: Path, files: Mapping[str, File]) -> None:
        """Once in a process, unless a file was touched meanwhile: several stages read the same artifact."""
        signature = _signature(folder, files)
        if self._verified.get(digest) != signature:
            for name, file in files.items():
                if manifest.hash_file(folder / name) != file.sha256:
                    raise DamagedError(f"{name} has other bytes than its manifest says")
            self._verified[digest] = signature

    def _quarantine(self, digest: str, error: DamagedError) -> None:
        aside = f"quarantine/{digest}.{uuid.uuid4().hex[:8]}"
        log.warning("artifact %s in %s is damaged: %s; set aside as %s", digest[:12], self.url, error, aside)
        self.place.move(_folder(digest), aside)

    def _cached(self, digest: str) -> Path:
        folder = state.cache() / digest
        if not folder.is_dir() or not _is_whole(folder, digest):
            shutil.rmtree(folder, ignore_errors=True)
            self._download(digest, folder)
        return folder

    def _download(self, digest: str, folder: Path) -> None:
        files = self.manifest(digest).files
        beside = folder.with_name(f".{digest}.{uuid.uuid4().hex}")
        try:
            with self.reading():
                self.place.download(_folder(digest), [*files, manifest.NAME], beside)
            if not _is_whole(beside, digest):
                self._quarantine(digest, DamagedError("the downloaded files are not those of its manifest"))
                raise ArtifactGoneError(digest, self.url)
            with suppress(OSError):  # another process was faster, with the same bytes
                os.rename(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _opened(url: str) -> Place:
    try:
        return place(url)
    except (ValueError, ImportError, OSError) as error:
        raise StoreError(
            public(f"REGROW_STORE = {url!r} cannot be opened: {error}")
            + "; give a folder or a URL such as s3://bucket/prefix"
        ) from error


def _folder(digest: str) -> str:
    return f"artifacts/{digest}"


def _manifest_path(digest: str) -> str:
    return f"{_folder(digest)}/{manifest.NAME}"


def _scanned(output: Path, stage: str) -> dict[str, File]:
    try:
        files = manifest.scan(output)
        for name in files:
            manifest.check_path(name)
    except DamagedError as error:
        raise StoreError(f"stage {stage} left something that cannot be published: {error}") from error
    if not files:
        raise StoreError(f"stage {stage} left no file in its output folder {output}; an artifact has at least one")
    return files


def _compare(files: Mapping[str, File], found: Mapping[str, int]) -> None:
    """Raises DamagedError unless names and sizes are those of the manifest."""
    for name in sorted(files.keys() ^ found.keys()):
        raise DamagedError(f"{name} is {'missing' if name in files else 'not in its manifest'}")
    for name, file in files.items():
        if found[name] != file.size:
            raise DamagedError(f"{name} has {found[name]} bytes instead of {file.size}")


def _signature(folder: Path, files: Mapping[str, File]) -> Signature:
    stats = ((name, (folder / name).stat()) for name in files)
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        files = Manifest.load((folder / manifest.NAME).read_bytes(), digest).files
        found = manifest.scan(folder)
    except (OSError, DamagedError):
        return False
    return {name: file for name, file in found.items() if name != manifest.NAME} == files


def _copied(source: Path, folder: Path) -> Path:
    try:
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
    except OSError as error:
        raise StoreError(
            f"cannot copy an artifact to {folder}: {error}; name a new folder with enough space"
        ) from error
    return folder
