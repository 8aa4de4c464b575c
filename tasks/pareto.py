"""Which of several results are worth having, and the picture of it: gain over cost, the dominated ones grey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.figures import Tick, round_step, round_ticks

HEADROOM = 1.05
"""The cost axis ends this many times beyond the largest cost; its third power where the axis is logarithmic."""

WIDE = 4
"""Costs further apart than this many times stand on a logarithmic axis: on a linear one the small are one heap."""


@dataclass(frozen=True)
class Candidate:
    """One result: less cost and more gain are better. `deviation` is the gain's; `text` says both."""

    name: str
    cost: float
    gain: float
    text: str
    deviation: float = 0.0
    is_reference: bool = False


@dataclass(frozen=True)
class Spot:
    """A result in the plot: per cent from its left and its top; `number` counts the front, None is dominated."""

    name: str
    text: str
    x: float
    y: float
    whisker: tuple[float, float] | None
    number: int | None
    is_reference: bool


@dataclass(frozen=True)
class Trade:
    """The picture. `stairs` are the corners of the region that the front dominates."""

    title: str
    cost: str
    gain: str
    spots: tuple[Spot, ...]
    stairs: tuple[tuple[float, float], ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    logarithmic: bool

    @property
    def front(self) -> list[Spot]:
        """The results that no other dominates, by rising cost."""
        return sorted((spot for spot in self.spots if spot.number is not None), key=lambda spot: spot.number or 0)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of (cost, gain) the indices of those that no other dominates, by rising cost.

    A point is dominated by another that costs no more and gains no less, unless the two are the same.
    """
    found: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        best = points[found[-1]] if found else None
        if best is None or points[index][1] > best[1] or points[index] == best:
            found.append(index)
    return found


def trade(title: str, cost: str, gain: str, candidates: Sequence[Candidate]) -> Trade:
    """The picture of the candidates, whose costs are above 0 and gains in per cent."""
    best = front([(candidate.cost, candidate.gain) for candidate in candidates])
    numbers = {index: number for number, index in enumerate(best, start=1)}
    plot = _Plot.around(candidates)
    spots = tuple(plot.spot(candidate, numbers.get(index)) for index, candidate in enumerate(candidates))
    y = tuple(Tick(plot.y(mark), f"{mark:g}") for mark in plot.marks)
    return Trade(title, cost, gain, spots, _stairs([spots[index] for index in best]), plot.ticks, y, plot.left > 0)


@dataclass(frozen=True)
class _Plot:
    """Where its axes end. The cost axis begins at 0, or is logarithmic; `marks` are those of the gains."""

    left: float
    right: float
    marks: tuple[float, ...]

    @classmethod
    def around(cls, candidates: Sequence[Candidate]) -> _Plot:
        costs = [candidate.cost for candidate in candidates]
        left = min(costs) / HEADROOM**3 if max(costs) > WIDE * min(costs) > 0 else 0.0
        lowest = max(0.0, min(candidate.gain - candidate.deviation for candidate in candidates))
        highest = min(100.0, max(candidate.gain + candidate.deviation for candidate in candidates))
        return cls(left, HEADROOM ** (3 if left else 1) * max(costs), _marks(lowest, highest))

    @property
    def ticks(self) -> tuple[Tick, ...]:
        if not self.left:
            return round_ticks(self.right)
        powers = range(math.floor(math.log10(self.left)), math.ceil(math.log10(self.right)) + 1)
        values = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
        return tuple(Tick(self.x(value), f"{value:g}") for value in values if self.left <= value <= self.right)

    def x(self, cost: float) -> float:
        if self.left:
            return round(100 * math.log(cost / self.left) / math.log(self.right / self.left), 2)
        return round(100 * cost / self.right, 2) if self.right else 0.0

    def y(self, gain: float) -> float:
        bottom, top = self.marks[0], self.marks[-1]
        return round(100 * (top - min(max(gain, bottom), top)) / (top - bottom), 2)

    def spot(self, of: Candidate, number: int | None) -> Spot:
        whisker = (self.y(of.gain - of.deviation), self.y(of.gain + of.deviation)) if of.deviation else None
        return Spot(of.name, of.text, self.x(of.cost), self.y(of.gain), whisker, number, of.is_reference)


def _stairs(front: Sequence[Spot]) -> tuple[tuple[float, float], ...]:
    """Along each gain to the next cost, then up; at last to the right end."""
    corners: list[tuple[float, float]] = []
    for spot in front:
        corners += [(spot.x, corners[-1][1])] if corners else []
        corners.append((spot.x, spot.y))
    return (*corners, (100.0, corners[-1][1])) if corners else ()


def _marks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers around a range of per cents, at least one apart."""
    step = round_step(max(high - low, 1.0) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if last == first:
        first, last = first - 2, min(last + 2, math.floor(100 / step + 1e-9))
    return tuple(round(step * number, 10) for number in range(first, last + 1))
