"""L2-normalised magnitude: one ranking of all weights, each divided by its layer's norm.

Source: POT (arXiv 2104.15023) and github.com/openvinotoolkit/openvino, its magnitude sparsity. There
the threshold keeps ties; here the count is exact.
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
class L2Normalised:
    """include: parts beside the table's layers that are pruned too."""

    unit: ClassVar[str] = "weights"
    include: Include = ()

    def __post_init__(self) -> None:
        refuse_parts("l2_normalised", self.include)

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer."""
        pool = Pool.of(model, self.include, budget, context)
        return pool.ranked({layer: _normalised(weight) for layer, weight in pool.weights.items()})


def _normalised(weight: Tensor) -> Tensor:
    weight = weight.double()
    norm = torch.linalg.vector_norm(weight)
    return weight.abs() / norm if norm > 0 else weight.abs()
