"""Stage: the budget divided among the layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from heal.families.lookup import describe
from heal.method import refuse_unit
from tasks import artifacts, models

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.progress import Progress


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Write allocation.json; raises BudgetError when the budget cannot be met."""
    section = params.allocation
    allocator = params.allocator()
    budget = section.budget.build()
    dense = models.load(inputs["dense"], params.dense.adapter_allow)
    refuse_unit(describe(dense), budget)
    allocation = allocator.allocate(dense, budget, artifacts.load_statistics(inputs["activations"], comoments=False))
    artifacts.save_allocation(allocation, section.method, section.options(section.method), output)
    progress.log(f"keeps {allocation.got} of {sum(allocation.total.values())} {allocation.unit}")
    total = float(sum(allocation.total.values()))
    return {"asked": float(allocation.asked), "got": float(allocation.got), "total": total}
