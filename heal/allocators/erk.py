"""Erdos-Renyi-Kernel: a layer's density in proportion to the sum of its dimensions over their product.

Source: Evci et al., "Rigging the Lottery" (ICML 2020), github.com/google-research/rigl, sparse_utils.
Its loop, which makes layers dense until none exceeds 1, gives the same as filling up to a cap of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Size, nn

from heal.allocators.pool import Include, Pool, by_shape, refuse_parts
from heal.errors import MethodError
from heal.method import AllocationContext
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class Erk:
    """Small and thin layers stay dense, large ones carry the sparsity.

    include: parts beside the table's layers that are pruned too.
    power: of the ratio, > 0; 1 is the source, ModelTC's msbench takes 0.5.
    """

    unit: ClassVar[str] = "weights"
    include: Include = ()
    power: float = 1.0

    def __post_init__(self) -> None:
        refuse_parts("erk", self.include)
        if not self.power > 0:
            raise MethodError(f"erk.power = {self.power:g} must be greater than 0; 1 is the published rule")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer."""
        pool = Pool.of(model, self.include, budget, context)
        return pool.allocation(pool.filled(by_shape(pool, lambda shape: ratio(shape) ** self.power)))


def ratio(shape: Size) -> float:
    """Sum over product of a weight's dimensions, [out, in / groups, h, w] or [out, in]."""
    return sum(shape) / shape.numel()
