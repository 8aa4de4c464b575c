"""Global magnitude: the largest weights of all layers together stay, without any normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.allocators.pool import Include, Pool, refuse_parts
from heal.method import AllocationContext
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class GlobalMagnitude:
    """include: parts beside the table's layers that are pruned too."""

    unit: ClassVar[str] = "weights"
    include: Include = ()

    def __post_init__(self) -> None:
        refuse_parts("global_magnitude", self.include)

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer; a layer of small weights may lose all of them."""
        pool = Pool.of(model, self.include, budget, context)
        return pool.ranked({layer: weight.abs() for layer, weight in pool.weights.items()})
