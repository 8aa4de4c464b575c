"""Asking the gate: a registered version against dense and champion, on the pinned evaluation images."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tasks import artifacts, models, promotion, registry, resolve
from tasks.gate import Gate
from tasks.images import load_evaluation
from tasks.params import Params
from tasks.progress import Progress


def ask(params: Params, dense: Path, calibration: Path, version: str, *, again: bool = False) -> promotion.Decision:
    """Judge a version of `registration.name`, and promote it when it passes.

    dense, calibration: those stages' artifacts. A version that was judged before, on the same images, is measured
    `again` only when a person asks.
    """
    name, limits = params.registration.name, Gate(**params.promotion.model_dump())
    evaluation = resolve.evaluation(params, artifacts.read_json(calibration / "calibration.json")["shared"])
    settled = None if again else promotion.settled(name, version, limits, evaluation)
    if settled is not None:
        return settled
    registry.register_dense(dense / "bundle", name, params.dense.adapter_allow)
    with tempfile.TemporaryDirectory(prefix="regrow-gate-") as work:
        images = load_evaluation(params.evaluation, dense, calibration, Progress(Path(work)))
        return promotion.ask(
            name,
            version,
            limits,
            images.array,
            images.labels,
            evaluation=evaluation,
            again=again,
            allow_adapters=params.dense.adapter_allow,
            device=models.device_of(params.evaluation.device),
            batch_size=params.evaluation.batch_size,
        )


def registered_version(registration: Path) -> str:
    """The version that the registration stage made."""
    return str(artifacts.read_json(registration / "registration.json")["version"])
