"""The one road to a stage's artifact: key, look up, or run and publish. Prefect and DVC both take it."""

from __future__ import annotations

import logging
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from heal.errors import HealError, NumericalError
from tasks import state
from tasks.checkpoints import Checkpoints
from tasks.gc import in_use
from tasks.keys import Ingredients, Resolved, StageParams, is_moving, stage_key
from tasks.manifest import Record
from tasks.progress import ProgressFactory, quiet
from tasks.store import Store
from tasks.table import Stage

log = logging.getLogger("regrow")

VERSIONS = ("torch", "torchvision", "timm", "safetensors", "numpy", "regrow")


class MovedError(HealError):
    """What a moving name points to changed under a stage, so its key would lie."""


@dataclass(frozen=True)
class Ref:
    """What travels between stages in place of bytes.

    cached: found, not computed. seconds: what the computation took when it was done.
    """

    stage: str
    key: str
    digest: str
    metrics: Mapping[str, float]
    cached: bool = False
    seconds: float = 0.0

    @classmethod
    def of(cls, record: Record, cached: bool = False) -> Ref:
        """The reference to a finished computation."""
        return cls(record.stage, record.key, record.digest, record.metrics, cached, record.seconds)

    def dump(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "metrics": dict(self.metrics)}


def run_stage(
    stage: Stage,
    params: StageParams,
    refs: Mapping[str, Ref],
    store: Store,
    progress_factory: ProgressFactory = quiet,
    resolve: Callable[[], Resolved] = dict,
) -> Ref:
    """The stage's artifact: found by its key, or computed and published.

    refs: its upstream stages' artifacts. resolve: what moving names in the params point to, asked
    before and after the stage reads them. Of several processes that want the same key one computes,
    and the others wait and find it. Raises StoreError, ArtifactGoneError (an input is not in the
    store any more), MovedError, NumericalError, and whatever the stage raises.
    """
    inputs = {name: refs[name].digest for name in stage.upstream}
    resolve = resolve if is_moving(stage) else dict
    key, ingredients = stage_key(stage, params, inputs, resolve())
    found = find(stage, key, store)
    if found is None:
        with _alone(stage, key):
            found = find(stage, key, store)
            if found is None:
                with in_use(store, [refs[name].key for name in stage.upstream]):
                    return Ref.of(_computed(stage, params, key, ingredients, store, progress_factory, resolve))
    store.touch(key)
    # A process that was killed between publishing and cleaning up left its work behind.
    shutil.rmtree(state.work(key), ignore_errors=True)
    return Ref.of(found, cached=True)


def find(stage: Stage, key: str, store: Store, thorough: bool = True) -> Record | None:
    """The finished computation, if its artifact is whole and what it stands for is still there."""
    record = store.find(key, thorough)
    if record is not None and stage.outside and not stage.still_valid(store.materialise(record.digest)):
        return None
    return record


@contextmanager
def _alone(stage: Stage, key: str) -> Iterator[None]:
    """Hold the key's lock; the kernel lets go of it when the process dies."""
    # Beside the work folder, not in it: the folder goes while the lock is held.
    path = state.work(key).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process computes it; waiting", stage.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _computed(
    stage: Stage,
    params: StageParams,
    key: str,
    ingredients: Ingredients,
    store: Store,
    factory: ProgressFactory,
    resolve: Callable[[], Resolved],
) -> Record:
    """Run in the work folder and publish. Checkpoints stay until then, also after an error."""
    work, started = state.work(key), time.monotonic()
    inputs = {name: store.materialise(digest) for name, digest in ingredients["inputs"].items()}
    output = _empty(work / "output")
    checkpoints = Checkpoints(store, key, work / "checkpoints")
    checkpoints.restore()
    progress = factory(stage.name, checkpoints.folder)
    progress.saved = checkpoints.save
    try:
        metrics = _finite(stage, stage.function()(params.restrict(stage.params), inputs, output, progress))
    finally:
        progress.close()
    _refuse_moved(stage, ingredients["resolved"], resolve())
    seconds = round(time.monotonic() - started, 3)
    about = Record(
        stage.name, key, "", ingredients, metrics, versions(), host(), seconds, _now(), tuple(progress.fallbacks)
    )
    record = store.publish(output, about)
    checkpoints.drop()
    shutil.rmtree(work, ignore_errors=True)
    return record


def _refuse_moved(stage: Stage, before: Resolved, after: Resolved) -> None:
    moved = [name for name, digest in before.items() if after.get(name) != digest]
    if moved:
        raise MovedError(
            f"{', '.join(moved)} changed while stage {stage.name} was reading it; nothing was published, run again"
        )


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _finite(stage: Stage, metrics: Mapping[str, float]) -> dict[str, float]:
    """Raises NumericalError: a NaN would be published as a result, and compares with nothing."""
    wrong = {name: value for name, value in metrics.items() if not _is_finite(value)}
    if wrong:
        shown = ", ".join(f"{name} = {value!r}" for name, value in wrong.items())
        raise NumericalError(
            f"stage {stage.name} gave metrics that are no finite numbers: {shown}; nothing was published. "
            "A smaller learning rate or more calibration images may help"
        )
    return dict(metrics)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def versions() -> dict[str, str]:
    """What is installed here, read without importing it."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def host() -> dict[str, Any]:
    """The class of this machine, not its name: processor family, cores, accelerator (if torch is in use)."""
    return {"machine": platform.machine(), "cores": os.cpu_count() or 1, "device": _device()}


def _device() -> str:
    torch = sys.modules.get("torch")  # not imported for this: a stage without torch computed on the cpu
    if torch is None or not torch.cuda.is_available():
        return "cpu"
    return str(torch.cuda.get_device_name())


def _now() -> str:
    return datetime.now(UTC).isoformat()
