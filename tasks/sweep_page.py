"""A sweep's results as one HTML page: the trade between accuracy, size and speed, the means, every point."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tasks import pages, pareto, summary, sweep_transitions
from tasks.pareto import Candidate, Trade
from tasks.summary import Column
from tasks.sweep_means import Mean, Read, Setting, reading, settings, share, time_ratio
from tasks.sweep_results import Result
from tasks.sweep_table import columns, limits, reason, standing

ACCURACY = {"top1": "top-1", "agreement": "agreement with dense"}


def render(name: str, results: Sequence[Result], planned: int) -> str:
    """The page; the same bytes for the same results, and no network."""
    found = settings(results)
    models = {model: [setting for setting in found if setting.model == model] for model in _models(found)}
    return pages.template("sweep.html.j2").render(
        title=name,
        standing=standing(results, planned),
        parts=[_part(model, own) for model, own in models.items()],
        together=_trades(found) if len(models) > 1 and _are_comparable(found) else [],
        points=[_point(result) for result in results],
        limits=list(limits(found)),
        transition_legend=sweep_transitions.LEGEND,
        seeds=max((len(setting.rows) for setting in found if not setting.is_dense), default=0),
    )


def _models(found: Sequence[Setting]) -> list[str]:
    return list(dict.fromkeys(setting.model for setting in found))


def _part(model: str, own: Sequence[Setting]) -> dict[str, Any]:
    """One model: its pictures, and its table with a row for each setting."""
    made: list[Column] = columns(own)
    rows = [{"setting": s, "cells": [column.cells[number] for column in made]} for number, s in enumerate(own)]
    found = sweep_transitions.transitions(own)
    return {"model": model, "trades": _trades(own), "columns": made, "rows": rows, "transitions": found}


def _are_comparable(found: Sequence[Setting]) -> bool:
    """Whether accuracy means the same for all: labels, and the same images."""
    images = {image for setting in found for image in setting.images}
    return share(found) == "top1" and len(images) == 1


def _trades(found: Sequence[Setting]) -> list[Trade]:
    """Accuracy over the size of the file, and over the time of every batch size that was measured.

    Times are ratios to dense, which was timed beside each; several models need seconds, so the ratios are multiplied
    with the mean of their dense.
    """
    made = [_trade(found, _Cost("weights file", reading("bytes"), summary.size))]
    dense = [setting for setting in found if setting.is_dense]
    for batch in summary.batches([row for setting in found for row, _ in setting.rows]):
        cost = _Cost(f"latency, batch of {batch}", time_ratio(batch), lambda _: (1.0, "\N{MULTIPLICATION SIGN} dense"))
        if len(dense) > 1:
            seconds = {setting.model: setting.mean(_seconds(batch)) for setting in dense}
            factors = {model: mean.value for model, mean in seconds.items() if mean is not None}
            cost = replace(cost, unit=summary.duration, factors=factors)
        made.append(_trade(found, cost))
    return [picture for picture in made if picture is not None]


@dataclass(frozen=True)
class _Cost:
    """What accuracy is bought with, in the unit that suits the largest; `factors` go with the models."""

    label: str
    read: Read
    unit: Callable[[float], tuple[float, str]]
    factors: Mapping[str, float] = field(default_factory=dict)

    def of(self, setting: Setting) -> float | None:
        """The mean of the setting."""
        mean = setting.mean(self.read)
        return None if mean is None else mean.value * self.factors.get(setting.model, 1.0)


def _seconds(batch: int) -> Read:
    return lambda row, dense: row.latency[batch].median if batch in row.latency else None


def _trade(found: Sequence[Setting], cost: _Cost) -> Trade | None:
    """None where no two settings have both numbers."""
    key, several = share(found), len(_models(found)) > 1
    measured: list[tuple[Setting, Mean, float]] = []
    for setting in found:
        gain, price = setting.mean(reading(key)), cost.of(setting)
        if gain is not None and price is not None:
            measured.append((setting, gain, price))
    if len(measured) < 2:
        return None
    scale, unit = cost.unit(max(price for _, _, price in measured))
    candidates = [_candidate(setting, gain, price / scale, unit, several) for setting, gain, price in measured]
    title = f"{ACCURACY[key].capitalize()} over {cost.label}"
    return pareto.trade(title, f"{cost.label}, {unit}", f"{ACCURACY[key]}, %", candidates)


def _candidate(setting: Setting, gain: Mean, cost: float, unit: str, several: bool) -> Candidate:
    text = f"{summary.percent(gain.value, _images(setting))} % at {summary.digits(cost)} {unit}"
    name = f"{setting.model}: {setting.name}" if several else setting.name
    return Candidate(name, cost, 100 * gain.value, text, 100 * (gain.deviation or 0), setting.is_dense)


def _images(setting: Setting) -> int:
    return min(count for _, count in setting.images)


def _point(result: Result) -> dict[str, Any]:
    row = result.healed
    return {
        "name": result.point,
        "status": result.status,
        "why": "" if result.status == "finished" else reason(result),
        "top1": None if row is None or row.top1 is None else summary.percent(row.top1, result.images),
        "agreement": None if row is None or row.agreement is None else summary.percent(row.agreement, result.images),
        "seconds": None if result.seconds is None else summary.digits(result.seconds),
        "evaluation": result.artifacts.get("evaluation", "")[:12],
    }
