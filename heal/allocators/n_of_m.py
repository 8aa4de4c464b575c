"""N:M sparsity: N weights of every M consecutive ones along a layer's input stay, as sparse tensor cores want it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.allocators.pool import Include, Pool, refuse_parts
from heal.errors import BudgetError
from heal.masking import carries
from heal.method import AllocationContext
from heal.values import NM, Allocation, Budget


@dataclass(frozen=True)
class NOfM:
    """pattern: "N:M", N of M are *kept*; "2:4". Some code counts what goes: there 1:4 means what is 3:4 here.

    include: parts beside the table's layers. A layer whose input channels are no multiple of M stays dense and
    outside the budget, which must be in weights and remove 1 - N / M; log and evidence name it.
    """

    unit: ClassVar[str] = "weights"
    pattern: str = "2:4"
    include: Include = ()

    def __post_init__(self) -> None:
        refuse_parts("n_of_m", self.include)
        NM.of(self.pattern)

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer that can carry the pattern."""
        pattern = NM.of(self.pattern)
        removed = 1 - pattern.n / pattern.m
        if budget.unit != "weights" or abs(budget.fraction - removed) > 1e-6:
            raise BudgetError(
                f"budget {budget.unit} = {budget.fraction:g}: {pattern} removes {removed:g} of the weights of every "
                f"layer; write weights: {removed:g}, or choose another pattern"
            )
        pool = Pool.of(model, self.include, budget, context)
        dense = [layer for layer, weight in pool.weights.items() if not carries(weight, pattern)]
        fitting = {layer: weight for layer, weight in pool.weights.items() if layer not in dense}
        if not fitting:
            raise BudgetError(
                f"{pattern}: no layer of {type(model).__name__} has input channels in multiples of {pattern.m}"
            )
        if dense:
            context.log(f"{pattern} does not fit {', '.join(dense)}: they stay dense and outside the budget")
        kept = {layer: weight.numel() // pattern.m * pattern.n for layer, weight in fitting.items()}
        total = {layer: weight.numel() for layer, weight in fitting.items()}
        evidence = {"left_dense": {layer: pool.totals[layer] for layer in dense}}
        return Allocation("weights", kept, total, sum(kept.values()), evidence=evidence, pattern=pattern)
