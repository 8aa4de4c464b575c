"""Variance-Based Pruning's allocation: one global ranking of all hidden neurons by variance.

Source: "Variance-Based Pruning for Accelerating and Compressing Trained Networks",
arXiv 2507.12988, section 3 (raw variance after the activation, no weighting, no normalisation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from heal.allocators.widths import refuse_multiple, widths_of
from heal.channels import cuts, pool, refuse_unknown_kinds
from heal.families.family import HIDDEN
from heal.method import AllocationContext
from heal.naming import refuse_unknown
from heal.values import Allocation, Budget
from heal.variances import NEEDS, STATISTICS, Statistic, of_all_heads, refuse_statistic, variances


@dataclass(frozen=True)
class GlobalVariance:
    """Widths from the global ranking of hidden neurons, and of a convolutional block's inner channels, by variance.

    kinds: of the channels that may go: mlp | inner (of convolutional blocks) | residual (from block to block) | qk
        (dimensions of every head's queries and keys) | v (of its values) | heads (not beside qk or v). Every kind is
        ranked by itself and loses the same share, as the scores of different kinds do not compare. Nor do those of
        streams of different depth: take scope "layer" for them.
    multiple: widths are multiples of this (>= 1; 1 is the paper, 8 suits hardware); the total stays
        exact, so one layer may carry a remainder. Heads are counted one by one.
    statistic: "post" ranks by what the consumer sees (the paper), "pre" by the producer's output
        (the paper's ablation), "weighted" by post times the squared norm of the consumer's weights, "denoised" as
        DVBP does (arXiv 2608.17657).
    scope: "global" (the paper), or "layer" for the same share of every layer.
    """

    unit: ClassVar[str] = "neurons"
    multiple: int = 1
    statistic: Statistic = "post"
    scope: Literal["global", "layer"] = "global"
    kinds: tuple[str, ...] = HIDDEN

    def __post_init__(self) -> None:
        refuse_multiple("global_variance.multiple", self.multiple)
        refuse_unknown("global_variance.statistic", self.statistic, STATISTICS)
        refuse_unknown("global_variance.scope", self.scope, ("global", "layer"))
        refuse_unknown_kinds("global_variance.kinds", self.kinds)
        refuse_statistic("global_variance", self.statistic, self.kinds)

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics it reads."""
        return cuts(self.kinds) | {NEEDS[self.statistic]}

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Width of every group; meets the budget to one channel. Raises BudgetError."""
        groups = pool(model, self.kinds)
        scores = variances(model, groups, context.statistics, self.statistic, budget.fraction)
        shared = {name: of_all_heads(score) for name, score in scores.items()}
        return widths_of(model, groups, shared, budget, context, self.multiple, self.scope)
