"""ERK with no layer denser than a cap: what the cap cuts off goes to the other layers in proportion.

"Capped ERK" is named in the abstract of Relative Repairability (arXiv 2605.25508) and not defined there.
Of its three readings the cap at 1 is `erk` itself, and a cap that gives nothing back misses the budget;
this is the third.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.allocators.erk import ratio
from heal.allocators.pool import Include, Pool, by_shape, refuse_parts
from heal.errors import MethodError
from heal.method import AllocationContext
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class ErkCapped:
    """include: parts beside the table's layers. cap: the highest density, in (0, 1]."""

    unit: ClassVar[str] = "weights"
    include: Include = ()
    cap: float = 0.5

    def __post_init__(self) -> None:
        refuse_parts("erk_capped", self.include)
        if not 0 < self.cap <= 1:
            raise MethodError(f"erk_capped.cap = {self.cap:g} is not a density in (0, 1]")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer. Raises BudgetError when the cap keeps less than the budget asks for."""
        pool = Pool.of(model, self.include, budget, context)
        return pool.allocation(pool.filled(by_shape(pool, ratio), most=self.cap))
