"""How many blocks go: as many as a budget in blocks says, or the fewest that bring the MACs down; never all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from heal.allocators.cut_cost import CutCost
from heal.errors import BudgetError
from heal.families.lookup import droppable_or_raise
from heal.method import AllocationContext
from heal.values import Allocation, Budget


@dataclass(frozen=True)
class Goal:
    """blocks: those that can be dropped. most: how many of them may go, as one block of the network stays.

    limit: how much may be left, in blocks, or in MACs where there is a cost.
    """

    budget: Budget
    blocks: tuple[str, ...]
    most: int
    limit: int
    cost: CutCost | None

    @classmethod
    def of(cls, model: nn.Module, budget: Budget, context: AllocationContext) -> Goal:
        """Raises BudgetError when no choice of blocks meets it, or none would go, ArchitectureError when none can be
        dropped, ImagesError when a budget in MACs has no image to know its size."""
        family = droppable_or_raise(model)
        blocks = family.droppable
        cost = CutCost.of(model, context) if budget.unit == "macs" else None
        most = len(blocks) - (len(blocks) == len(family.blocks))
        goal = cls(budget, blocks, most, budget.kept(len(blocks) if cost is None else cost.dense), cost)
        if budget.fraction and goal.is_met(()):
            raise BudgetError(
                f"budget {budget.unit} = {budget.fraction:g} is no more than half of one of the {len(blocks)} blocks "
                f"that can go, so nothing would; write more than {0.5 / len(blocks):.3g}"
            )
        extremes = [blocks] if most == len(blocks) else [tuple(b for b in blocks if b != stays) for stays in blocks]
        best = min(extremes, key=goal.left)
        if not goal.is_met(best):
            raise goal.unmet(best)
        return goal

    def left(self, dropped: Collection[str]) -> int:
        """Blocks that can be dropped and stay, or the MACs of what stays."""
        return len(self.blocks) - len(dropped) if self.cost is None else self.cost.macs({}, dropped)

    def is_met(self, dropped: Collection[str]) -> bool:
        """Whether no more needs to go."""
        return self.left(dropped) <= self.limit

    def first(self, order: Sequence[str]) -> list[str]:
        """The fewest blocks, in this order, with which it is met. Raises BudgetError."""
        for count in range(self.most + 1):
            if self.is_met(order[:count]):
                return list(order[:count])
        raise self.unmet(order[: self.most])

    def unmet(self, dropped: Collection[str]) -> BudgetError:
        """What to raise where no more blocks may go."""
        asking = f"budget {self.budget.unit} = {self.budget.fraction:g} cannot be met"
        if self.cost is None:
            return BudgetError(f"{asking}: it drops all {len(self.blocks)} blocks, and one must stay; remove less")
        return BudgetError(
            f"{asking}: without {len(dropped)} of the {len(self.blocks)} blocks that can go, {self.left(dropped)} of "
            f"{self.cost.dense} MACs are left; remove less, or cut channels"
        )

    def allocation(self, dropped: Collection[str], evidence: Mapping[str, Any]) -> Allocation:
        """0 for the blocks that go, 1 for the others."""
        kept = {block: int(block not in dropped) for block in self.blocks}
        found = dict(evidence)
        if self.cost is not None:
            found["macs"] = {"dense": self.cost.dense, "asked": self.limit, "got": self.left(dropped)}
        return Allocation("blocks", kept, dict.fromkeys(self.blocks, 1), sum(kept.values()), evidence=found)
