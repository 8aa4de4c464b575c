"""LAMP: a weight's square over the squares of all weights of its layer that are not smaller.

Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning" (ICLR 2021) and
github.com/jaeho-lee/layer-adaptive-sparsity. Its threshold keeps ties, so its count can exceed the
budget; here it is exact. Sums are float64: in float32 they lose the small weights of a large layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heal.allocators.pool import Include, Pool, refuse_parts
from heal.method import AllocationContext
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class Lamp:
    """One ranking of all weights by their score; the largest of a layer scores 1, so no layer dies.

    include: parts beside the table's layers that are pruned too.
    """

    unit: ClassVar[str] = "weights"
    include: Include = ()

    def __post_init__(self) -> None:
        refuse_parts("lamp", self.include)

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer."""
        pool = Pool.of(model, self.include, budget, context)
        return pool.ranked({layer: scores(weight) for layer, weight in pool.weights.items()})


def scores(weight: Tensor) -> Tensor:
    """The score of every weight, in (0, 1], float64, of the weight's shape; zeros score 0."""
    squares = weight.detach().double().flatten().square()
    ordered, order = squares.sort(stable=True)
    not_smaller = ordered.flip(0).cumsum(0).flip(0)
    found = torch.empty_like(squares)
    found[order] = torch.where(ordered > 0, ordered / not_smaller, 0.0)
    return found.reshape(weight.shape)
