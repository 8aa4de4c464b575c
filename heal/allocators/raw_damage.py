"""Raw damage: the rules of relative repairability without the repair. Its control: RR must beat this."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.allocators.pool import Include, Pool, refuse_parts
from heal.allocators.relative_repairability import allocated, curves, measured, patches_of, refuse_rule
from heal.allocators.repair_rules import Probe, Rule
from heal.method import AllocationContext
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class RawDamage:
    """include: parts beside the table's layers. rule, strength, probe: as of relative_repairability.

    The damage is the error of the layer's output over its variance, weighted as there. It is probed at the budget's
    density by default: at ERK's own, a layer that ERK keeps has little damage and would lose what ERK gave it.
    """

    unit: ClassVar[str] = "weights"
    include: Include = ()
    rule: Rule = "prior"
    strength: float = 1.0
    probe: Probe = "uniform"

    def __post_init__(self) -> None:
        refuse_parts("raw_damage", self.include)
        refuse_rule("raw_damage", self.rule, self.strength, self.probe)

    @property
    def needs(self) -> frozenset[str]:
        """Second moments of the layers' patches, in two halves; and an image, to see which norm follows."""
        return patches_of(self.include)

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer; the evidence holds the curves over layers and densities."""
        pool = Pool.of(model, self.include, budget, context)
        measure = measured(model, pool, context)

        def relative(layer: str, density: float) -> float:
            found = measure(layer, density)
            return found.raw / (found.energy + 1e-30)

        evidence = curves(pool, measure, context.report) | {"rests_on": "raw_damage"}
        return allocated(pool, self.rule, self.strength, self.probe, relative, relative, evidence)
