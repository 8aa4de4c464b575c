"""The first dense model: trained on digits and registered, when the params allow it and the registry has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tasks import dense_source
from tasks.progress import ProgressFactory
from tasks.runner import run_stage
from tasks.store import Store
from tasks.table import STAGES

if TYPE_CHECKING:
    from tasks.params import Params


def is_needed(params: Params) -> bool:
    """Whether the alias that dense.source names is still to be filled."""
    if not params.dense.source.startswith("models:/"):
        return False
    return dense_source.resolve(params.dense, params.is_digits) == dense_source.TRAINED


def train_dense(params: Params, store: Store, progress: ProgressFactory) -> float:
    """Train by the dense stage, register the bundle as `dense` and first `champion`; the seconds it took."""
    from tasks import registry

    trained = run_stage(STAGES["dense"], params, {}, store, progress, lambda: {"dense.source": dense_source.TRAINED})
    name = params.dense.source.removeprefix("models:/").partition("@")[0]
    registry.register_dense(store.materialise(trained.digest) / "bundle", name, params.dense.adapter_allow)
    return trained.seconds
