"""The small files that DVC sees of a stage: data/stages/<stage>.json with key, digest and metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tasks import atomic
from tasks.keys import Resolved, StageParams, stage_key
from tasks.manifest import Record
from tasks.progress import ProgressFactory, quiet
from tasks.runner import Ref, run_stage
from tasks.store import ArtifactGoneError, Store
from tasks.table import STAGES, Stages

log = logging.getLogger("regrow")

FOLDER = Path("data/stages")


@dataclass
class References:
    """The artifacts that one working directory refers to.

    A reference counts as long as the params, the code and its own upstream references are those it
    was made with. What a moving name pointed to then stays pinned until its stage itself runs;
    `resolve` says what it points to now.
    """

    params: StageParams
    store: Store
    resolve: Callable[[], Resolved] = dict
    progress_factory: ProgressFactory = quiet
    stages: Stages = field(default_factory=lambda: STAGES)
    folder: Path = FOLDER
    _known: dict[str, Ref] = field(default_factory=dict)

    def run(self, name: str) -> Ref:
        """Run one stage on what its upstream references say, and write its own reference."""
        refs = {upstream: self.reference(upstream) for upstream in self.stages[name].upstream}
        self._known[name] = self._run_on(name, refs)
        self._write(self._known[name])
        return self._known[name]

    def _run_on(self, name: str, refs: dict[str, Ref]) -> Ref:
        """The stage on these artifacts; one that is gone is computed again, once."""
        stage, missing = self.stages[name], dict(refs)
        while True:
            try:
                return run_stage(stage, self.params, refs, self.store, self.progress_factory, self.resolve)
            except ArtifactGoneError as gone:
                upstream = next((name for name, ref in missing.items() if ref.digest == gone.digest), None)
                if upstream is None:
                    raise
                log.warning("%s: the artifact of %s is gone; computing it again", name, upstream)
                del missing[upstream]
                refs[upstream] = self.run(upstream)

    def reference(self, name: str) -> Ref:
        """The reference of a stage, from its file; computed if it is missing or was made differently."""
        if name not in self._known:
            record = self._pinned(name)
            if record is None:
                return self.run(name)
            self._known[name] = Ref(name, record.key, record.digest, record.metrics, True, record.seconds)
        return self._known[name]

    def _pinned(self, name: str) -> Record | None:
        """The record that the file refers to. Its artifact may be gone: a stage may never need its bytes."""
        ref = self._read(name)
        record = None if ref is None else self.store.record(ref["key"])
        if record is None or ref is None or record.digest != ref["digest"]:
            return None
        stage = self.stages[name]
        inputs = {upstream: self.reference(upstream).digest for upstream in stage.upstream}
        key, ingredients = stage_key(stage, self.params, inputs, record.ingredients["resolved"])
        return record if key == record.key and ingredients["names"] == record.ingredients["names"] else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> Mapping[str, str] | None:
        try:
            content = json.loads(self._path(name).read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            log.warning("%s is not JSON; stage %s is computed again", self._path(name), name)
            return None
        is_ours = isinstance(content, dict) and content.get("stage") == name and {"key", "digest"} <= content.keys()
        return content if is_ours else None

    def _write(self, ref: Ref) -> None:
        content = {"stage": ref.stage, "key": ref.key, "digest": ref.digest, "metrics": dict(ref.metrics)}
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
        if not self._path(ref.stage).is_file() or self._path(ref.stage).read_text() != text:
            atomic.write(self._path(ref.stage), text.encode())
