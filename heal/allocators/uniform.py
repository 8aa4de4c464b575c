"""The plain allocation: the same share of every prunable layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.allocators.widths import shared_evenly
from heal.families.lookup import describe
from heal.method import Statistics
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class Uniform:
    """The same sparsity for every prunable layer, the total exact to one weight."""

    unit: ClassVar[str] = "weights"

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def allocate(self, model: nn.Module, budget: Budget, statistics: Statistics) -> Allocation:
        """Weights kept in every layer of the family's table."""
        weights = {layer: model.get_submodule(layer).get_parameter("weight") for layer in describe(model).layers}
        totals = {layer: weight.numel() for layer, weight in weights.items()}
        asked = budget.kept(sum(totals.values()))
        return Allocation("weights", shared_evenly(totals, asked), totals, asked)
