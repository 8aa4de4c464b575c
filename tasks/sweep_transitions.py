"""Where a method stops bringing a network back as weights go, from a sweep's agreement with dense: no label is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heal.errors import InputError
from tasks.sweep_means import Setting, reading

FEWEST = 4
"""Sparsities that a curve needs (heal.transition)."""

LEGEND = (
    "a logistic through agreement with dense on the evaluation images; the band is where it falls from 80 to 20 % of "
    "the way to chance, the centre where it falls fastest"
)


@dataclass(frozen=True)
class Found:
    """A method's transition, or why it has none, in words."""

    method: str
    text: str


def transitions(settings: Sequence[Setting]) -> list[Found]:
    """Of one model's methods that were measured at four sparsities or more. Means over the seeds."""
    found = []
    for method in dict.fromkeys(setting.method for setting in settings if not setting.is_dense):
        curve = _curve([setting for setting in settings if setting.method == method])
        classes = max((setting.classes for setting in settings), default=0)
        if len(curve) >= FEWEST and classes > 1:
            found.append(Found(method, f"{method}: {_located(curve, classes)}"))
    return found


def _curve(settings: Sequence[Setting]) -> dict[float, float]:
    """Agreement by sparsity, ascending."""
    curve = {}
    for setting in settings:
        unit, _, removed = setting.budget.partition("=")
        mean = setting.mean(reading("agreement")) if setting.rows else None
        if unit == "weights" and mean is not None and 0 < float(removed) < 1:
            curve[float(removed)] = mean.value
    return dict(sorted(curve.items()))


def _located(curve: dict[float, float], classes: int) -> str:
    from heal.transition import locate  # torch: seconds, which a sweep at few sparsities need not wait for

    try:
        at = locate(list(curve), list(curve.values()), classes, plateau=max(curve.values()))
    except InputError as error:
        return str(error).removeprefix("transition: ")
    low, high = at.band
    return f"{100 * low:.1f} to {100 * high:.1f} %, centre {100 * at.centre:.1f} % ({len(curve)} sparsities)"
