"""ATP: sparsities that rise from layer to layer by the same step, shifted until they meet the budget.

Source: "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective" (ICML
2025), github.com/wzhuang-xmu/ATP. For the layers i = 0 .. L - 1 in depth order, with S the sparsity asked for:

    s_i = S - slope (L - 1) / 2 + slope i        0 < slope <= 2 min(S, 1 - S) / (L - 1)

Deviations: the source prunes transformer blocks of equal size; layers differ, so the mean of the rates is not
the sparsity of the whole, and a constant shift of all s_i, clipped to [0, 1], makes it exact. The source picks
the slope by perplexity on its test set; here it is picked without labels on calibration images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from heal.allocators.pool import Include, Pool, refuse_parts
from heal.allocators.trial import Fitness, Judge, Trial, at_most, refuse_trial
from heal.errors import MethodError
from heal.method import AllocationContext
from heal.values import Allocation, Budget

BATCH = 64


@dataclass(frozen=True)
class Sequence:
    """Later layers lose more than earlier ones, in an arithmetic sequence.

    include: parts beside the table's layers that are pruned too.
    slope: by how much the sparsity rises from one layer to the next, > 0 and at most the formula's bound;
        None picks the best of step, 2 step, 3 step, ... up to that bound, or the bound if it is below `step`.
    step: of these candidates, > 0; 0.002 (the source).
    images: how many of the calibration images judge them, >= 1; 256 (ours).
    fitness: "agreement" with the dense network, or "kl" (see `trial`); the smaller of equal slopes wins.
    The depth order is the order of the modules.
    """

    unit: ClassVar[str] = "weights"
    include: Include = ()
    slope: float | None = None
    step: float = 0.002
    images: int = 256
    fitness: Judge = "agreement"

    def __post_init__(self) -> None:
        refuse_parts("sequence", self.include)
        refuse_trial("sequence", self.images, self.fitness)
        for name in ("slope", "step"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise MethodError(f"sequence.{name} = {value:g} must be greater than 0; the source's step is 0.002")

    @property
    def needs(self) -> frozenset[str]:
        """Images, to pick the slope."""
        return frozenset({"images"} if self.slope is None else ())

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer; the evidence has slope, shift, and the candidates with their fitness.

        Raises MethodError when the slope is above its bound, ImagesError when it is to be picked without images.
        """
        pool = Pool.of(model, self.include, budget, context)
        bound = steepest(pool)
        if self.slope is not None:
            if self.slope > bound * (1 + 1e-9):
                raise MethodError(
                    f"sequence.slope = {self.slope:g} is above {bound:g}, where {len(pool.weights)} layers at "
                    f"sparsity {1 - pool.share:g} leave [0, 1]; give less, or null to have it picked"
                )
            return sloped(pool, self.slope, {})
        trial = Trial(model, pool.weights, at_most(context, self.images, "sequence"), BATCH, self.fitness, "cumulative")
        return self._best(pool, candidates(self.step, bound), trial, context)

    def _best(self, pool: Pool, slopes: list[float], trial: Trial, context: AllocationContext) -> Allocation:
        tried: list[tuple[Fitness, float]] = []
        for slope in slopes:
            tried.append((trial.fitness(sloped(pool, slope, {}).kept), slope))
            context.report("sequence", len(tried), len(slopes))
        fitness, slope = max(tried, key=lambda candidate: candidate[0])
        context.log(f"sequence: slope {slope:g} of {len(slopes)} candidates, {self.fitness} {fitness[0]:.4f}")
        return sloped(pool, slope, {"candidates": [{"slope": s, "fitness": list(found)} for found, s in tried]})


def steepest(pool: Pool) -> float:
    """The largest slope that keeps every sparsity in [0, 1] before the shift; 0 for a single layer."""
    layers = len(pool.weights)
    return 2 * min(1 - pool.share, pool.share) / (layers - 1) if layers > 1 else 0.0


def candidates(step: float, bound: float) -> list[float]:
    """step, 2 step, ... up to the bound; the bound alone when the first is above it."""
    count = math.floor(bound / step + 1e-9)
    return [min(step * number, bound) for number in range(1, count + 1)] or [bound]


def sloped(pool: Pool, slope: float, evidence: dict[str, Any]) -> Allocation:
    """The allocation of one slope."""
    middle = (len(pool.weights) - 1) / 2
    asked = {layer: 1 - pool.share + slope * (i - middle) for i, layer in enumerate(pool.weights)}

    def densities(lift: float) -> dict[str, float]:
        return {layer: min(max(1 - sparsity + lift, 0.0), 1.0) for layer, sparsity in asked.items()}

    lift = pool.level(densities, -1.0, 1.0)
    return pool.allocation(densities(lift), {"slope": slope, "shift": -lift} | evidence)
