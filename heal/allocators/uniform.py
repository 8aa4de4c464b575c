"""The plain allocation: the same share of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.allocators.pool import Include, Pool, refuse_parts
from heal.method import AllocationContext
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class Uniform:
    """The same sparsity for every layer, the total exact to one weight.

    include: parts beside the table's layers that are pruned too.
    """

    unit: ClassVar[str] = "weights"
    include: Include = ()

    def __post_init__(self) -> None:
        refuse_parts("uniform", self.include)

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer."""
        pool = Pool.of(model, self.include, budget, context)
        return pool.allocation(dict.fromkeys(pool.weights, pool.share))
