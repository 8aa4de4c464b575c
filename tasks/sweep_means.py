"""The points of a sweep that differ only in their seed, taken together beside the dense model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasks.summary import Row
from tasks.sweep_results import Result

Read = Callable[[Row, Row], float | None]
"""(the model itself, dense of the same evaluation) -> a number, or None where it was not measured."""


@dataclass(frozen=True)
class Mean:
    """The mean of `count` numbers, and their standard deviation: that of a sample, None of a single number."""

    value: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """None of no numbers."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Setting:
    """A method and budget on a model, over its seeds; or the model itself, dense, in all of its evaluations.

    `rows` holds (itself, dense) of every point that finished, `healing` its healers' seconds; `asked` counts the
    points that were recorded. `images`: what their evaluations were on, as (digest, count), of how many `classes`.
    """

    model: str
    method: str
    budget: str
    rows: tuple[tuple[Row, Row], ...]
    healing: tuple[float, ...]
    asked: int
    images: frozenset[tuple[str, int]]
    classes: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether it is the model itself."""
        return not self.budget

    @property
    def name(self) -> str:
        """ "erk, weights=0.9", or "dense"."""
        return "dense" if self.is_dense else f"{self.method}, {self.budget}"

    @property
    def seeds(self) -> str:
        """How many points its means are of: "3", or "2 of 3" where one did not finish."""
        if self.is_dense:
            return ""
        return str(self.asked) if len(self.rows) == self.asked else f"{len(self.rows)} of {self.asked}"

    def mean(self, read: Read) -> Mean | None:
        """Over its points; None unless every one that finished has this number."""
        found = [value for value in (read(*pair) for pair in self.rows) if value is not None]
        return Mean.of(found) if len(found) == len(self.rows) else None


def settings(results: Sequence[Result]) -> list[Setting]:
    """Model after model: dense, then budget after budget, in each the best method first."""
    found: list[Setting] = []
    for model in dict.fromkeys(result.model for result in results):
        own = [result for result in results if result.model == model]
        found += [_dense(own)] if any(result.healed is not None for result in own) else []
        for budget in dict.fromkeys(result.budget for result in own):
            alike = [result for result in own if result.budget == budget]
            methods = dict.fromkeys(result.method for result in alike)
            made = [_setting([result for result in alike if result.method == method]) for method in methods]
            key = share(made)
            found += sorted(made, key=lambda setting: _value(setting, key), reverse=True)
    return found


def share(settings: Sequence[Setting]) -> str:
    """What accuracy is: `top1` where all have it, else `agreement`."""
    finished = [setting for setting in settings if setting.rows]
    return "top1" if all(setting.mean(reading("top1")) is not None for setting in finished) else "agreement"


def reading(name: str) -> Read:
    """Reads a field of the model's row."""
    return lambda row, dense: getattr(row, name)


def time_ratio(batch: int) -> Read:
    """Seconds as a share of dense's; 1 where the quartiles do not tell them apart, or noise would make masks fast."""

    def read(row: Row, dense: Row) -> float | None:
        speedup = row.speedup(dense, batch)
        if speedup is None:
            return None
        return 1.0 if speedup.low <= 1 <= speedup.high else 1 / speedup.median

    return read


def _value(setting: Setting, key: str) -> float:
    mean = setting.mean(reading(key))
    return -1.0 if mean is None else mean.value


def _dense(results: Sequence[Result]) -> Setting:
    own = _setting(results)
    return Setting(
        own.model, "dense", "", tuple((dense, dense) for _, dense in own.rows), (), own.asked, own.images, own.classes
    )


def _setting(results: Sequence[Result]) -> Setting:
    first = results[0]
    finished = [result for result in results if result.healed is not None]
    rows = tuple((result.healed, result.dense) for result in finished if result.healed and result.dense)
    seconds = tuple(result.healing_seconds for result in finished if result.healing_seconds is not None)
    classes = max((result.classes for result in finished), default=0)
    images = frozenset((result.images_digest, result.images) for result in finished)
    return Setting(first.model, first.method, first.budget, rows, seconds, len(results), images, classes)
