"""Stage: the budget divided among the layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from heal.method import AllocationContext, refuse_unit
from tasks import artifacts, models
from tasks.image_array import ImageArray, load_calibration

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.progress import Progress


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Write allocation.json; raises BudgetError when the budget cannot be met."""
    section = params.allocation
    allocator = params.allocator()
    budget = section.budget.build()
    dense = models.load(inputs["dense"], params.dense.adapter_allow, section.device)
    refuse_unit(dense, budget.removes(allocator.unit))
    context = AllocationContext(
        statistics=artifacts.load_statistics(inputs["activations"], comoments=_reads_comoments(allocator.needs)),
        images=_images(inputs, progress) if "images" in allocator.needs or budget.unit == "macs" else None,
        labels=artifacts.load_labels(inputs["calibration"]) if "labels" in allocator.needs else None,
        seed=section.seed,
        checkpoints=progress.checkpoints,
        checkpoint_saved=progress.checkpoint_saved,
        report=progress.report,
        log=progress.log,
    )
    allocation = allocator.allocate(dense, budget, context)
    artifacts.save_allocation(allocation, section.method, section.options(section.method), output)
    progress.log(f"keeps {sum(allocation.kept.values())} of {sum(allocation.total.values())} {allocation.unit}")
    return {name: float(allocation.budget[name]) for name in ("asked", "got", "total")}


def _reads_comoments(needs: frozenset[str]) -> bool:
    return "images" in needs or any("second_moment" in need or "patches" in need for need in needs)


def _images(inputs: dict[str, Path], progress: Progress) -> ImageArray:
    return load_calibration(inputs["calibration"], progress.checkpoints.with_name("decoded"))
