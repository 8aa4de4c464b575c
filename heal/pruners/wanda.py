"""Wanda: the weights go that move the output least, each by itself: |w| times the root mean square of its input.

Source: "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695. A weight of a
convolution is judged by its input channel, whatever its place in the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from heal.masking import keep_best, keep_by_row
from heal.naming import refuse_unknown
from heal.values import Allocation, LayerStats, Mask, Statistics


@dataclass(frozen=True)
class Wanda:
    """granularity: weights compete within their output "row" (the source) or within the whole "layer".

    Of rows each keeps equally many; what does not divide goes to the rows whose next score is highest.
    """

    unit: ClassVar[str] = "weights"
    granularity: Literal["row", "layer"] = "row"

    def __post_init__(self) -> None:
        refuse_unknown("wanda.granularity", self.granularity, ("row", "layer"))

    @property
    def needs(self) -> frozenset[str]:
        """The moments of every layer's input."""
        return frozenset({"inputs"})

    def prune(self, model: nn.Module, allocation: Allocation, statistics: Statistics) -> Mask:
        """The mask."""
        keep = {}
        for layer, kept in allocation.kept.items():
            module = model.get_submodule(layer)
            scores = importance(module, statistics[f"{layer}.input"])
            by_row = self.granularity == "row" and allocation.pattern is None
            keep[layer] = keep_by_row(scores, kept) if by_row else keep_best(scores, kept, allocation.pattern)
        return Mask(keep, pattern=allocation.pattern)


def importance(layer: nn.Module, stats: LayerStats) -> Tensor:
    """|w| times the root mean square of its input channel: of the weight's shape, float64, on the CPU."""
    weight = layer.get_parameter("weight").detach().double().cpu()
    power = (stats.m2 / stats.count + stats.mean.square()).sqrt()
    groups = len(power) // weight.shape[1]
    of_rows = power.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
    return weight.abs() * of_rows.view(*of_rows.shape, *[1] * (weight.ndim - 2))
