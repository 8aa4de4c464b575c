"""SNIP's allocation of cuts: one ranking of all channels by how much the loss feels their loss.

Source: arXiv 1810.02340, for units as DVBP (arXiv 2608.17657) compares it; label-free: see heal/saliency.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from heal.allocators.widths import refuse_multiple, widths_of
from heal.channels import PLAIN, cuts, pool, refuse_unknown_kinds
from heal.families.family import HIDDEN, ChannelGroup
from heal.method import AllocationContext
from heal.values import Allocation, Budget, Statistics


@dataclass(frozen=True)
class Snip:
    """multiple: widths are multiples of this, >= 1. kinds: of the channels that may go: mlp | inner | residual."""

    unit: ClassVar[str] = "neurons"
    multiple: int = 1
    kinds: tuple[str, ...] = HIDDEN

    def __post_init__(self) -> None:
        refuse_multiple("snip.multiple", self.multiple)
        refuse_unknown_kinds("snip.kinds", self.kinds, PLAIN)

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics it reads."""
        return cuts(self.kinds) | {"saliency"}

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Width of every group; meets the budget to one channel. Raises BudgetError."""
        groups = pool(model, self.kinds)
        scores = {name: felt(group, context.statistics) for name, group in groups.items()}
        return widths_of(model, groups, scores, budget, context, self.multiple)


def felt(group: ChannelGroup, statistics: Statistics) -> Tensor:
    """|sum over the consumers| [channels]: each reads its own part of what a channel does."""
    means = [statistics[f"{consumer}.saliency"].mean for consumer in group.consumers]
    return sum(means[1:], start=means[0]).abs()
