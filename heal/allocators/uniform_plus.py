"""Uniform with the ends protected: the first convolution stays dense, the last layer keeps a fifth.

Source: LAMP's baselines (Lee et al., ICLR 2021), github.com/jaeho-lee/layer-adaptive-sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.allocators.pool import Include, Pool, refuse_parts
from heal.errors import BudgetError
from heal.method import AllocationContext
from heal.values import Allocation, Budget

LAST = 0.2


@dataclass(frozen=True)
class UniformPlus:
    """First layer dense (if it is a convolution), last at least a fifth dense, all others alike.

    include: parts beside the table's layers; the stem and the classifier are the ends that it is about.
    """

    unit: ClassVar[str] = "weights"
    include: Include = ("stem", "classifier")

    def __post_init__(self) -> None:
        refuse_parts("uniform_plus", self.include)

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer. Raises BudgetError when the protected ends alone exceed the budget."""
        pool = Pool.of(model, self.include, budget, context)
        first, *_, last = pool.weights if len(pool.weights) > 1 else (*pool.weights, "")
        fixed = {first: 1.0} if pool.weights[first].ndim == 4 and last else {}
        densities = _spread(pool, fixed, budget)
        if last and densities[last] < LAST:
            densities = _spread(pool, {**fixed, last: round(LAST * pool.totals[last]) / pool.totals[last]}, budget)
        return pool.allocation(densities)


def _spread(pool: Pool, fixed: dict[str, float], budget: Budget) -> dict[str, float]:
    """The fixed densities, and one for all other layers that spends what they leave."""
    sizes = pool.sizes
    left = pool.target - sum(density * sizes[layer] for layer, density in fixed.items())
    density = left / sum(size for layer, size in sizes.items() if layer not in fixed)
    if not 0 <= density <= 1:
        raise BudgetError(
            f"budget {budget.unit} = {budget.fraction:g} cannot be met by uniform_plus: its protected ends "
            f"({', '.join(fixed)}) alone exceed what may stay; remove less, or choose uniform"
        )
    return {layer: fixed.get(layer, density) for layer in sizes}
