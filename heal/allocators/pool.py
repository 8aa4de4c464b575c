"""The weights that an allocation divides: what is in, what each costs, and exact counts from densities."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heal.cost import uses
from heal.errors import ArchitectureError, BudgetError, ImagesError, MethodError
from heal.families.lookup import describe
from heal.families.parts import parts, standardised
from heal.images import Replay
from heal.method import AllocationContext
from heal.naming import refuse_unknown
from heal.values import Allocation, Budget

Include = tuple[Literal["stem", "depthwise", "classifier"], ...]
"""Parts that join the table's layers. Published figures for CNNs mostly count all three in."""


@dataclass(frozen=True)
class Pool:
    """weights: by layer, in the order of the modules. cost: what one of them takes of the budget.

    asked: the budget, a whole number. share: the kept share, 1 - sparsity, of which `asked` is the rounding.
    """

    weights: Mapping[str, Tensor]
    cost: Mapping[str, int]
    asked: int
    share: float

    @classmethod
    def of(cls, model: nn.Module, include: Include, budget: Budget, context: AllocationContext) -> Pool:
        """The table's layers and the included parts. Raises BudgetError, ImagesError, ArchitectureError."""
        wanted = {"layers", *include}
        names = [name for name, part in parts(model, describe(model)).items() if part in wanted]
        weights = {name: model.get_submodule(name).get_parameter("weight").detach() for name in names}
        _refuse_standardised(model, sum(weight.numel() for weight in weights.values()), context)
        if not weights:
            raise BudgetError(f"{type(model).__name__} has no weights to mask; include more, or bring a family table")
        cost = _cost(model, list(weights), context) if budget.unit == "macs" else dict.fromkeys(weights, 1)
        whole = sum(weight.numel() * cost[name] for name, weight in weights.items())
        return cls(weights, cost, budget.kept(whole), 1 - budget.fraction)

    @cached_property
    def totals(self) -> dict[str, int]:
        """Weights of every layer."""
        return {layer: weight.numel() for layer, weight in self.weights.items()}

    @property
    def target(self) -> float:
        """The budget before rounding."""
        return self.share * sum(self.sizes.values())

    @cached_property
    def sizes(self) -> dict[str, int]:
        """What all weights of a layer cost together."""
        return {layer: total * self.cost[layer] for layer, total in self.totals.items()}

    def without(self, densities: Mapping[str, float]) -> Pool:
        """The pool of all other layers, with what these densities leave of the budget. Raises BudgetError."""
        counts = {layer: round(density * self.totals[layer]) for layer, density in densities.items()}
        left = self.asked - sum(count * self.cost[layer] for layer, count in counts.items())
        rest = {layer: weight for layer, weight in self.weights.items() if layer not in densities}
        whole = sum(self.totals[layer] * self.cost[layer] for layer in rest)
        if left < 0 or not rest:
            raise BudgetError(f"budget: {', '.join(densities)} alone exceed what may stay; remove less")
        return Pool(rest, {layer: self.cost[layer] for layer in rest}, left, left / whole)

    def filled(
        self,
        shares: Mapping[str, float],
        least: Mapping[str, float] | None = None,
        most: float = 1.0,
        base: float = 0.0,
    ) -> dict[str, float]:
        """Densities base + kappa * share, clipped to [least, most], with the one kappa >= 0 that spends the budget.

        Raises BudgetError when no kappa does.
        """
        floor = least or dict.fromkeys(shares, 0.0)

        def clipped(kappa: float) -> dict[str, float]:
            return {layer: min(max(base + kappa * share, floor[layer]), most) for layer, share in shares.items()}

        low, high = 0.0, 1.0
        while self._spent(clipped(high)) < self.target and high < 1e300:
            high *= 2
        if self._spent(clipped(low)) > self.target or self._spent(clipped(high)) < self.target * (1 - 1e-12):
            raise BudgetError(
                f"budget: no densities between {min(floor.values()):g} and {most:g} keep a share of "
                f"{self.share:g}; remove less, or widen the bounds"
            )
        return clipped(self.level(clipped, low, high))

    def level(self, densities: Callable[[float], Mapping[str, float]], low: float, high: float) -> float:
        """Where in [low, high] densities that rise with their argument spend the budget: by bisection, to the last bit.

        They must spend no more than the budget at `low` and no less at `high`.
        """
        target = self.target
        for _ in range(200):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            low, high = (middle, high) if self._spent(densities(middle)) < target else (low, middle)
        return high

    def allocation(self, densities: Mapping[str, float], evidence: Mapping[str, Any] | None = None) -> Allocation:
        """Counts from densities in [0, 1]: rounded down, then one more where the fraction is largest.

        What is left of the budget goes one weight at a time to the largest fractions (ties: the
        earlier layer), never beyond a layer's size; so what stays unspent is less than any weight costs.
        """
        exact = {layer: densities[layer] * total for layer, total in self.totals.items()}
        counts = {layer: min(math.floor(value + 1e-9), self.totals[layer]) for layer, value in exact.items()}
        left = self.asked - sum(count * self.cost[layer] for layer, count in counts.items())
        by_fraction = sorted(counts, key=lambda layer: -round(exact[layer] - counts[layer], 9))
        for layer in by_fraction:
            if counts[layer] < self.totals[layer] and self.cost[layer] <= left:
                counts[layer] += 1
                left -= self.cost[layer]
        return self.counted(self._spend(counts, by_fraction), evidence)

    def ranked(self, scores: Mapping[str, Tensor]) -> Allocation:
        """The highest scores of all layers together (of equal ones the earlier stays), as far as the budget goes."""
        pooled = torch.cat([scores[layer].flatten().double().cpu() for layer in self.weights])
        order = torch.sort(pooled, descending=True, stable=True).indices
        sizes = torch.tensor(list(self.totals.values()))
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)[order]
        spent = torch.tensor([self.cost[layer] for layer in self.weights])[owner].cumsum(0)
        counts = torch.bincount(owner[spent <= self.asked], minlength=len(sizes)).tolist()
        return self.counted(self._spend(dict(zip(self.weights, counts, strict=True)), list(self.weights)))

    def counted(self, counts: Mapping[str, int], evidence: Mapping[str, Any] | None = None) -> Allocation:
        """An allocation of these counts."""
        priced = any(cost != 1 for cost in self.cost.values())
        return Allocation(
            "weights", dict(counts), dict(self.totals), self.asked, dict(self.cost) if priced else {}, evidence or {}
        )

    def _spent(self, densities: Mapping[str, float]) -> float:
        return math.fsum(densities[layer] * size for layer, size in self.sizes.items())

    def _spend(self, counts: dict[str, int], order: list[str]) -> dict[str, int]:
        """Spend what is left, or take back what is too much, with as few weights as it takes: the dearest first.

        A layer that is never called costs nothing, so it has no part in this.
        """
        left = self.asked - sum(count * self.cost[layer] for layer, count in counts.items())
        priced = [layer for layer in order if self.cost[layer]]
        for layer in sorted(priced, key=lambda layer: -self.cost[layer]):
            step = min(max(left // self.cost[layer], -counts[layer]), self.totals[layer] - counts[layer])
            counts[layer] += step
            left -= step * self.cost[layer]
        return counts


def refuse_parts(method: str, include: Include) -> None:
    """Raise MethodError unless each is a part, and named once."""
    for part in include:
        refuse_unknown(f"{method}.include", part, ("stem", "depthwise", "classifier"))
    if len(set(include)) < len(include):
        raise MethodError(f"{method}.include = {list(include)} names a part twice")


def by_shape(pool: Pool, share: Callable[[torch.Size], float]) -> dict[str, float]:
    """A share of every layer from the shape of its weight."""
    return {layer: share(weight.shape) for layer, weight in pool.weights.items()}


def _refuse_standardised(model: nn.Module, pooled: int, context: AllocationContext) -> None:
    """Raise ArchitectureError when most weights cannot be masked; say so in the log when a few cannot."""
    layers = standardised(model)
    if not layers:
        return
    kinds = ", ".join(sorted({type(layer).__name__ for layer in layers.values()}))
    what = f"{len(layers)} layers of {type(model).__name__} ({kinds}; {next(iter(layers))} is the first)"
    if sum(layer.weight.numel() for layer in layers.values()) > pooled:
        raise ArchitectureError(
            f"{what} have a forward of their own, which may standardise the weights they store, so that zeros there "
            "mean nothing, and hold most of the weights; choose a network of plain Linear and Conv2d"
        )
    context.log(f"{what} may not compute with the weights they store, so they stay dense and outside the budget")


def _cost(model: nn.Module, layers: list[str], context: AllocationContext) -> dict[str, int]:
    if context.images is None:
        raise ImagesError("budget in macs: an image is needed to count how often each weight is used; pass images")
    image = next(iter(Replay(context.images, 1)))[:1]
    return uses(model, layers, image)
