"""Checkpoints of a stage on its way, taken along in a remote store so that another machine can go on.

With a local store the work folder itself is what survives, and nothing is copied.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from tasks import manifest
from tasks.manifest import DamagedError, File
from tasks.store import Store

log = logging.getLogger("regrow")

LIST = "files.json"
SECONDS = 60.0
"""How often checkpoints are uploaded at most; healing must not wait for the network all the time."""


class Checkpoints:
    """The checkpoints of one key: a local folder, and its copies in the store."""

    def __init__(self, store: Store, key: str, folder: Path, seconds: float = SECONDS) -> None:
        self.store, self.place = store, store.place
        self.errors: tuple[type[Exception], ...] = (ValueError, TypeError, *store.place.errors)
        self.folder = folder
        self.seconds = seconds
        self._prefix = f"work/{key}"
        self._saved = -float("inf")

    def restore(self) -> None:
        """Fetch the newest whole copy, if there is no local checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.place.local is not None or any(self.folder.iterdir()):
            return
        with self.store.reading():
            for copy in sorted((entry.name for entry in self.place.entries(self._prefix)), reverse=True):
                if self._fetch(f"{self._prefix}/{copy}"):
                    return

    def save(self) -> None:
        """Upload a copy, then forget the older ones. A failure is a warning: the stage itself is well."""
        if self.place.local is not None or time.monotonic() - self._saved < self.seconds:
            return
        self._saved = time.monotonic()
        copy = f"{time.time_ns():020d}"
        try:
            files = manifest.scan(self.folder)
            listed = json.dumps({name: asdict(file) for name, file in files.items()}).encode()
            self.place.publish(self.folder, files, f"{self._prefix}/{copy}", {LIST: listed})
            for entry in self.place.entries(self._prefix):
                if entry.name < copy:
                    self.place.remove(f"{self._prefix}/{entry.name}")
        except self.errors as error:
            log.warning("checkpoints could not be saved in %s: %s", self.place.url, error)

    def drop(self) -> None:
        """Forget all copies: the stage is done. What cannot be removed now, `gc` removes later."""
        if self.place.local is None:
            with suppress(*self.errors):
                self.place.remove(self._prefix)

    def _fetch(self, copy: str) -> bool:
        listed = self.place.read(f"{copy}/{LIST}")
        if listed is None:
            return False
        beside = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}")
        try:
            files = {manifest.check_path(name): File(**file) for name, file in json.loads(listed).items()}
            beside.mkdir(parents=True)
            self.place.download(copy, files, beside)
            if manifest.scan(beside) != files:
                raise DamagedError("its files are not those of its list")
            os.replace(beside, self.folder)
        except self.errors as error:
            log.warning("checkpoint %s in %s cannot be used: %s", copy, self.place.url, error)
            return False
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return True
