"""An ablation: the projections on the skip paths are given their densities, and another rule shares out the rest.

Relative Repairability (arXiv 2605.25508, abstract) finds that capped ERK over-protects the 1x1 projections: at
95 % sparsity of a CIFAR ResNet-18 they are 1.5 % of the weights and take 14 % of what is kept. How it forces
them could not be read; both ways are here. P-: ERK with projections as sparse as the whole. P+: another rule with
projections as dense as ERK makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from heal.allocators.erk import ratio
from heal.allocators.lamp import scores
from heal.allocators.pool import Include, Pool, by_shape, refuse_parts
from heal.allocators.relative_repairability import RelativeRepairability, patches_of
from heal.errors import ArchitectureError
from heal.families.lookup import describe
from heal.method import AllocationContext
from heal.naming import refuse_unknown
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class ProjectionForced:
    """include: parts beside the table's layers.

    projections: "uniform" (P-) or "erk" (P+), their densities. rest: the rule for all other layers, "erk",
    "lamp" or "relative_repairability" (with its defaults).
    """

    unit: ClassVar[str] = "weights"
    include: Include = ()
    projections: Literal["uniform", "erk"] = "uniform"
    rest: Literal["erk", "lamp", "relative_repairability"] = "erk"

    def __post_init__(self) -> None:
        refuse_parts("projection_forced", self.include)
        refuse_unknown("projection_forced.projections", self.projections, ("uniform", "erk"))
        refuse_unknown("projection_forced.rest", self.rest, ("erk", "lamp", "relative_repairability"))

    @property
    def needs(self) -> frozenset[str]:
        """Those of the rule for the rest; and projections."""
        rest = patches_of(self.include) if self.rest == "relative_repairability" else frozenset[str]()
        return rest | {"projections"}

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer. Raises BudgetError when the projections alone exceed the budget."""
        pool = Pool.of(model, self.include, budget, context)
        erk = pool.filled(by_shape(pool, ratio))
        names = [name for name in describe(model).projections if name in pool.weights]
        if not names:
            raise ArchitectureError(f"{type(model).__name__} has no projections in the pool; choose {self.rest}")
        fixed = {name: pool.share if self.projections == "uniform" else erk[name] for name in names}
        rest = pool.without(fixed)
        found = self._shared(rest, model, context)
        counts = {name: round(density * pool.totals[name]) for name, density in fixed.items()}
        kept = {layer: counts.get(layer, found.kept.get(layer, 0)) for layer in pool.weights}
        return pool.counted(kept, found.evidence)

    def _shared(self, pool: Pool, model: nn.Module, context: AllocationContext) -> Allocation:
        if self.rest == "lamp":
            return pool.ranked({layer: scores(weight) for layer, weight in pool.weights.items()})
        if self.rest == "erk":
            return pool.allocation(pool.filled(by_shape(pool, ratio)))
        return RelativeRepairability(self.include).shared(pool, model, context)
