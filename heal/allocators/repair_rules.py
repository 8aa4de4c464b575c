"""From damage to densities under an exact budget: two rules, used with and without a repair.

Both are ours: the source (arXiv 2605.25508) names none that could be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Literal

from heal.allocators.pool import Pool

Rule = Literal["prior", "greedy"]
Probe = Literal["prior", "uniform"]

GRID = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
"""Densities of the curves."""

LEAST = 0.002


def least(pool: Pool) -> dict[str, float]:
    """The lowest densities: a weight for every filter and 0.2 % of the layer, as far as the budget lets them."""
    floor = {layer: min(max(len(weight) / weight.numel(), LEAST), 1.0) for layer, weight in pool.weights.items()}
    spent = math.fsum(floor[layer] * total * pool.cost[layer] for layer, total in pool.totals.items())
    return floor if spent <= pool.target else dict.fromkeys(floor, 0.0)


def modulated(pool: Pool, prior: Mapping[str, float], scores: Mapping[str, float], strength: float) -> dict[str, float]:
    """Densities kappa * prior * (score / geometric mean of the scores) ** strength, clipped to [least, 1].

    The more of a layer's damage stays, the more weights it keeps. A layer without damage, such as one that the
    prior keeps dense, has no score: it keeps its prior's share.
    """
    damaged = {layer: score for layer, score in scores.items() if score > 0}
    centre = math.exp(math.fsum(math.log(score) for score in damaged.values()) / max(len(damaged), 1))
    shares = {layer: share * (damaged.get(layer, centre) / centre) ** strength for layer, share in prior.items()}
    return pool.filled(shares, least(pool))


def greedy(pool: Pool, curves: Callable[[str, float], float]) -> dict[str, float]:
    """Buy, from the least densities on, whatever lowers the sum of the curves most per unit of budget.

    curves(layer, density): the damage that stays; of each the lower convex hull over the grid counts,
    on which buying the steepest segment next is optimal. What costs nothing, as it is never used, stays.
    """
    size = pool.sizes
    densities = {layer: start if size[layer] else 1.0 for layer, start in least(pool).items()}
    segments = []
    for number, layer in enumerate(layer for layer in densities if size[layer]):
        start = densities[layer]
        points = [(d, curves(layer, d)) for d in (start, *(g for g in GRID if g > start))]
        hull = _lower_hull(points)
        for (left, high), (right, low) in pairwise(hull):
            segments.append(((low - high) / ((right - left) * size[layer]), number, left, right, layer))
    left_over = pool.target - math.fsum(densities[layer] * size[layer] for layer in densities)
    for _slope, _number, left, right, layer in sorted(segments):
        step = min(right - left, left_over / size[layer])
        densities[layer] += step
        left_over -= step * size[layer]
        if left_over <= 0:
            break
    return densities


def _lower_hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points with ascending x."""
    hull: list[tuple[float, float]] = []
    for point in points:
        while len(hull) > 1 and _turns_down(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])
