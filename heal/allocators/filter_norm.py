"""Magnitude's allocation of cuts: one ranking of all channels by the norm of the weights that make them.

Source: Li et al., "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710), with the L2 norm; the baseline that
reads no image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from heal.allocators.widths import refuse_multiple, widths_of
from heal.channels import PLAIN, cuts, norms, pool, refuse_unknown_kinds
from heal.families.family import HIDDEN
from heal.method import AllocationContext
from heal.naming import refuse_unknown
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class FilterNorm:
    """multiple: widths are multiples of this, >= 1. scope: "global", or "layer" for the same share of every group.

    kinds: of the channels that may go: mlp | inner | residual.
    """

    unit: ClassVar[str] = "neurons"
    multiple: int = 1
    scope: Literal["global", "layer"] = "global"
    kinds: tuple[str, ...] = HIDDEN

    def __post_init__(self) -> None:
        refuse_multiple("filter_norm.multiple", self.multiple)
        refuse_unknown("filter_norm.scope", self.scope, ("global", "layer"))
        refuse_unknown_kinds("filter_norm.kinds", self.kinds, PLAIN)

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return cuts(self.kinds)

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Width of every group; meets the budget to one channel. Raises BudgetError."""
        groups = pool(model, self.kinds)
        scores = {name: norms(model, group) for name, group in groups.items()}
        return widths_of(model, groups, scores, budget, context, self.multiple, self.scope)
