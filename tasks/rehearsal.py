"""What a person got wrong, found before anything starts: sources are opened, methods checked, the budget tried.

`glance` comes before a missing dense model is trained, `rehearse` before anything else. There the model
is opened and the images are drawn for this alone, because only that can find weights that do not fit or
a corrupt image; the budget is divided on statistics that are all zero, because whether it can be met
depends on shapes alone (not by the allocators that search: of weights they meet any budget, of blocks one that some
choice of them meets).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from heal import bundle
from heal.allocators.dropping import Goal
from heal.block_inputs import refuse_more_inputs
from heal.errors import InputError
from heal.method import AllocationContext, check, taps
from heal.naming import nearest
from heal.values import LayerStats, Statistics
from tasks import calibration, data, dense, models, resolve
from tasks.classes import Classes
from tasks.gate import QUALITY
from tasks.images import read_labels
from tasks.preprocessing import parse
from tasks.progress import Progress
from tasks.store import Store
from tasks.table import STAGES

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.plan import PlannedStage

NAMED_BY = {
    "allocator": "allocation.method",
    "pruner": "pruning.method",
    "healer": "healing.methods",
    "healers": "healing.methods",
    "rounds": "healing.rounds",
}
"""Which param names the method that a message of `check` begins with."""


def glance(params: Params) -> None:
    """Raise what needs no model to be seen: devices, names, sources of images. The rest is `rehearse`'s."""
    _refuse_no_limit(params)
    look(params)


def look(params: Params) -> None:
    """What `glance` raises, for a run that no promotion follows."""
    for section in (params.activations, params.allocation, params.healing, params.evaluation):
        models.device_of(section.device)
    _refuse_names(params)
    _refuse_subsets_of_no_file(params)
    resolve.resolve_images(params)


def _refuse_subsets_of_no_file(params: Params) -> None:
    section = params.evaluation
    if section.subsets is not None and isinstance(section.labels, bool):
        raise InputError(
            f"evaluation.subsets = {section.subsets} is a column of the CSV file that evaluation.labels names, and it "
            f"names none (labels: {str(section.labels).lower()}); name the file, or take subsets out"
        )


def rehearse(params: Params, planned: Mapping[str, PlannedStage], store: Store) -> None:
    """Raise the InputError that a run with these params would end in, without writing anything."""
    with tempfile.TemporaryDirectory(prefix="regrow-rehearsal-") as scratch:
        dense = _dense(params, planned["dense"], store, Path(scratch))
        size = parse(bundle.read(dense / "bundle")["preprocessing"]).size
        _refuse_methods(params, models.load(dense, params.dense.adapter_allow), size)
        _refuse_labels(params, dense)
        if not planned["calibration"].cached:
            calibration.rehearse(params.restrict(STAGES["calibration"].params), dense)
        _refuse_name(params, dense)


def _dense(params: Params, planned: PlannedStage, store: Store, scratch: Path) -> Path:
    if planned.digest is not None:
        return store.materialise(planned.digest)
    output = scratch / "dense"
    output.mkdir()
    dense.run(params.restrict(STAGES["dense"].params), {}, output, Progress(scratch / "checkpoints"))
    return output


def _refuse_methods(params: Params, model: nn.Module, size: tuple[int, int]) -> None:
    allocator, healers, budget = params.allocator(), params.healers(), params.allocation.budget.build()
    image = torch.zeros(1, 3, *size)
    try:
        check(model, budget, allocator, params.pruner(), healers, params.healing.rounds)
        refuse_more_inputs(model, healers, image)
    except InputError as error:
        key = NAMED_BY.get(str(error).partition(" ")[0], "allocation.budget")
        raise type(error)(f"{params.where(key)}: {key}: {error}") from error
    if "images" not in allocator.needs:
        zeros = _zeros(model, taps(model, [allocator]))
        allocator.allocate(model, budget, AllocationContext(statistics=zeros, images=image))
    elif allocator.unit == "blocks":
        Goal.of(model, budget, AllocationContext(images=image))


def _refuse_names(params: Params) -> None:
    known = ["dense", "pruned", *(f"after {healer}" for healer in params.healing.methods[:-1]), "healed"]
    for name in params.evaluation.latency_models:
        if name not in known:
            raise InputError(f"evaluation.latency_models: there will be no model {name!r}; {nearest(name, known)}")


def _refuse_no_limit(params: Params) -> None:
    """The gate would say so after everything else was done."""
    wanted = ("min_agreement",) if params.evaluation.labels is False else QUALITY
    if all(getattr(params.promotion, name) is None for name in wanted):
        raise InputError(
            f"promotion sets no limit on quality; set promotion.{' or '.join(wanted)}; a drop of 1 allows any"
        )


def _refuse_name(params: Params, dense: Path) -> None:
    from tasks import registry  # last, as MLflow takes seconds to import

    registry.refuse_other_dense(params.registration.name, bundle.digest(dense / "bundle"))


def _refuse_labels(params: Params, dense: Path) -> None:
    source, ids = data.for_evaluation(
        params.evaluation.source, data.is_shared(params.calibration.source, params.evaluation.source)
    )
    read_labels(params.evaluation, source, ids, Classes.of(dense))


def _zeros(model: nn.Module, wanted: Mapping[str, bool]) -> Statistics:
    return {tap: _nothing(_width(model, tap), comoment) for tap, comoment in wanted.items()}


def _nothing(width: int, comoment: bool) -> LayerStats:
    zero = torch.zeros(width, dtype=torch.float64)
    return LayerStats(1, zero, zero, torch.zeros(width, width, dtype=torch.float64) if comoment else None, images=1)


def _width(model: nn.Module, tap: str) -> int:
    """Channels at a tap of a Linear or a convolution with one group."""
    name, _, side = tap.rpartition(".")
    return int(model.get_submodule(name).get_parameter("weight").shape[0 if side == "output" else 1])
