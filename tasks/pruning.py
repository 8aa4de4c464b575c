"""Stage: masks or cuts the dense model to its allocation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from heal.pruned import apply, describe_cuts
from heal.values import Mask
from tasks import artifacts, models

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.progress import Progress


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Write the pruned bundle and what stays."""
    section = params.pruning
    options = section.options(section.method)
    model = models.load(inputs["dense"], params.dense.adapter_allow)
    allocation = artifacts.load_allocation(inputs["allocation"])
    pruned = params.pruner().prune(model, allocation, artifacts.load_statistics(inputs["activations"]))
    lines = describe_cuts(model, pruned)
    apply(model, pruned)
    artifacts.save_pruned(pruned, lines, output)
    models.save_child(model, output, inputs["dense"], pruned, {"pruner": section.method, "params": options})
    for line in lines:
        progress.log(line)
    return {"removed": float(pruned.zeros if isinstance(pruned, Mask) else pruned.removed)}
