"""Variance-Based Pruning's allocation: one global ranking of all hidden neurons by variance.

Source: "Variance-Based Pruning for Accelerating and Compressing Trained Networks",
arXiv 2507.12988, section 3 (raw variance after the activation, no weighting, no normalisation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from heal.allocators.widths import ranked_globally, refuse_if_too_small, rounded, shared_evenly
from heal.errors import MethodError
from heal.families.lookup import cuttable_or_raise
from heal.method import AllocationContext, Statistics
from heal.naming import refuse_unknown
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class GlobalVariance:
    """Widths from the global ranking of hidden neurons by variance.

    multiple: widths are multiples of this (>= 1; 1 is the paper, 8 suits hardware); the total stays
        exact, so one layer may carry a remainder.
    statistic: "post" ranks by what the consumer sees (the paper), "pre" by the producer's output
        (the paper's ablation).
    scope: "global" (the paper), or "layer" for the same share of every layer.
    """

    unit: ClassVar[str] = "neurons"
    multiple: int = 1
    statistic: Literal["post", "pre"] = "post"
    scope: Literal["global", "layer"] = "global"

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise MethodError(f"global_variance.multiple = {self.multiple} must be at least 1")
        refuse_unknown("global_variance.statistic", self.statistic, ("post", "pre"))
        refuse_unknown("global_variance.scope", self.scope, ("global", "layer"))

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics it reads."""
        return frozenset({"moments" if self.statistic == "post" else "preactivation_moments"})

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Width of every MLP's hidden layer; meets the budget to one neuron. Raises BudgetError."""
        scores = variances(model, context.statistics, self.statistic)
        totals = {layer: len(score) for layer, score in scores.items()}
        asked = budget.kept(sum(totals.values()))
        refuse_if_too_small(asked, len(totals), self.multiple, f"neurons = {budget.fraction:g}")
        if self.scope == "global":
            counts = ranked_globally(scores, asked, self.multiple)
        else:
            counts = shared_evenly(totals, asked)
        return Allocation("neurons", rounded(scores, counts, self.multiple), totals, asked)


def variances(model: nn.Module, statistics: Statistics, statistic: str) -> dict[str, Tensor]:
    """Variance [d] of every MLP's hidden neurons, by the pair's producer."""
    pairs = cuttable_or_raise(model).pairs
    if statistic == "post":
        return {pair.producer: statistics[f"{pair.consumer}.input"].variance for pair in pairs}
    return {pair.producer: statistics[f"{pair.producer}.output"].variance for pair in pairs}
