"""From numbers to the geometry of the report's charts: positions in per cent of the plot, texts, nothing drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tasks.summary import Column, Row, digits, duration, size, times

LONGEST_CURVE = 600  # points; more cannot be told apart at the width of a page


@dataclass(frozen=True)
class Tick:
    """A mark of an axis, `at` per cent of its length."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """One bar. `role` is what it stands for (dense, pruned, after, healed); lengths are per cent of the plot."""

    name: str
    role: str
    length: float
    text: str
    behind: float | None = None
    whisker: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """A bar chart; `reference` is where the dense model's value stands."""

    title: str
    direction: str
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    reference: float | None = None


@dataclass(frozen=True)
class Dots:
    """One block of a dot plot: its states in order, before the first healer to after the last."""

    name: str
    points: tuple[float, ...]
    text: str


@dataclass(frozen=True)
class DotPlot:
    """A dot plot over blocks; `states` names the points of a row."""

    states: tuple[str, ...]
    rows: tuple[Dots, ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Curve:
    """A loss curve in a plot of 1000 by 1000 (y downwards), as SVG paths."""

    method: str
    raw: str
    smooth: str
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    steps: int
    first: str
    last: str
    logarithmic: bool


def role(name: str) -> str:
    """What a model's name stands for in colours: dense, pruned, after or healed."""
    return name if name in ("dense", "pruned", "healed") else "after"


def shares(column: Column, names: Sequence[str]) -> Bars:
    """Top-1 or agreement of every model, on an axis from 0 to 100 %."""
    found = [(name, cell) for name, cell in zip(names, column.cells, strict=True) if cell.value is not None]
    bars = tuple(Bar(name, role(name), _place(cell.value or 0, 1), f"{cell.text} %") for name, cell in found)
    ticks = tuple(Tick(at, str(at)) for at in (0, 25, 50, 75, 100))
    reference = bars[0].length if bars and bars[0].role == "dense" else None
    return Bars(column.label, "%, higher is better", bars, ticks, reference)


def sizes(rows: Sequence[Row]) -> Bars:
    """The weights file of every model, and of the last one stored as float16."""
    entries = [(row.name, role(row.name), row.bytes) for row in rows]
    if rows[-1].bytes_float16 is not None:
        entries.append((f"{rows[-1].name}, float16", role(rows[-1].name), rows[-1].bytes_float16))
    scale, unit = size(max(count for _, _, count in entries))
    top = max(count for _, _, count in entries) / scale
    bars = tuple(
        Bar(
            name,
            kind,
            _place(count / scale, top),
            f"{digits(count / scale)} {unit}",
            note=_against(count, rows[0].bytes_unpacked) if name != rows[0].name else "",
        )
        for name, kind, count in entries
    )
    return Bars("Weights file", f"{unit}, lower is better", bars, round_ticks(top), bars[0].length)


def latencies(rows: Sequence[Row], batch: int) -> Bars:
    """Median time of one batch of every timed model, with the quartiles as whiskers."""
    timed = [(row, row.latency[batch]) for row in rows if batch in row.latency]
    scale, unit = duration(max(spread.median for _, spread in timed))
    top = max(spread.high for _, spread in timed) / scale
    bars = []
    for row, spread in timed:
        ratio = row.speedup(rows[0], batch) if row is not rows[0] else None
        whisker = (_place(spread.low / scale, top), _place(spread.high / scale, top))
        note = f"{times(ratio.median)} speed" if ratio else ""
        text = f"{digits(spread.median / scale)} {unit}"
        bars.append(Bar(row.name, role(row.name), _place(spread.median / scale, top), text, None, whisker, note))
    reference = bars[0].length if timed[0][0] is rows[0] else None
    direction = f"{unit}, median and quartiles, lower is better"
    return Bars(f"Latency, batch of {batch}", direction, tuple(bars), round_ticks(top), reference)


def widths(kept: Mapping[str, int], total: Mapping[str, int], unit: str) -> Bars:
    """What stays of every cut group in front of its dense width."""
    top = max(total.values())
    bars = tuple(
        Bar(name, "healed", _place(kept[name], top), f"{kept[name]:,} of {total[name]:,}", _place(total[name], top))
        for name in kept
    )
    return Bars("Width kept in each layer", f"{unit}, dense width behind", bars, round_ticks(top))


def sparsities(kept: Mapping[str, int], total: Mapping[str, int]) -> Bars:
    """The removed fraction of every masked layer; the reference is the fraction over all of them."""
    ticks = tuple(Tick(100 * at, f"{at:g}") for at in (0, 0.25, 0.5, 0.75, 1))
    removed = {name: 1 - kept[name] / total[name] if total[name] else 0.0 for name in kept}
    bars = tuple(Bar(name, "pruned", _place(share, 1), f"{share:.3f}", 100.0) for name, share in removed.items())
    overall = 1 - sum(kept.values()) / max(sum(total.values()), 1)
    return Bars("Sparsity of each layer", "fraction of the weights removed", bars, ticks, _place(overall, 1))


def alignment(states: Sequence[tuple[str, Mapping[str, float]]]) -> DotPlot:
    """Cosine of every block's output with the dense model's, in each (name, {block: cosine}) state."""
    blocks = [block for block in states[0][1] if all(block in values for _, values in states)]
    lowest = min((values[block] for _, values in states for block in blocks), default=0.0)
    bottom = max(-1.0, math.floor(lowest * 10 - 1e-9) / 10)
    step = 0.1 if 1 - bottom <= 0.5 else 0.25 if 1 - bottom <= 1 else 0.5
    marks = [1 - step * index for index in range(math.floor((1 - bottom) / step + 1e-9), -1, -1)]
    ticks = tuple(
        Tick(_place(mark - bottom, 1 - bottom), f"{mark:g}" if step == 0.25 else f"{mark:.1f}") for mark in marks
    )
    rows = tuple(
        Dots(
            block,
            tuple(_place(values[block] - bottom, 1 - bottom) for _, values in states),
            f"{states[0][1][block]:.3f} \N{RIGHTWARDS ARROW} {states[-1][1][block]:.3f}",
        )
        for block in blocks
    )
    return DotPlot(tuple(name for name, _ in states), rows, ticks)


def curve(method: str, losses: Sequence[float]) -> Curve:
    """The loss over the steps, raw and as a centred moving mean; logarithmic when it falls by more than 20 times."""
    logarithmic = min(losses) > 0 and max(losses) / min(losses) > 20
    height: Callable[[float], float] = math.log10 if logarithmic else float
    lowest, top = height(min(losses)), height(max(losses))
    bottom = lowest if logarithmic else min(lowest, 0.0)
    marks = _decades(bottom, top) if logarithmic else round_ticks(top, bottom)

    def path(points: Sequence[tuple[int, float]]) -> str:
        scaled = (
            (index / max(len(losses) - 1, 1), (height(v) - bottom) / max(top - bottom, 1e-12)) for index, v in points
        )
        return "M" + "L".join(f"{1000 * x:.0f} {1000 * (1 - y):.0f}" for x, y in scaled)

    return Curve(
        method,
        raw=path(_extremes(losses)),
        smooth=path(_smooth(losses)),
        x=_steps(len(losses)),
        y=tuple(Tick(round(100 - mark.at, 2), mark.text) for mark in marks),
        steps=len(losses),
        first=f"{losses[0]:.3g}",
        last=f"{_smooth(losses)[-1][1]:.3g}",
        logarithmic=logarithmic,
    )


def _place(value: float, top: float) -> float:
    return round(100 * value / top, 2) if top else 0.0


def _against(count: int, dense: int) -> str:
    return times(count / dense) if dense and count != dense else ""


def round_ticks(largest: float, bottom: float = 0.0) -> tuple[Tick, ...]:
    """Round marks from `bottom`, which may be negative, up to `largest`, where the axis ends: three to five of them."""
    step = round_step((largest - bottom) / 4)
    values = [step * index for index in range(math.ceil(bottom / step), math.floor(largest / step) + 1)]
    return tuple(Tick(_place(value - bottom, largest - bottom), f"{value:,.6g}") for value in values)


def round_step(rough: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, at least `rough`."""
    power = 10.0 ** math.floor(math.log10(max(rough, 1e-12)))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def _decades(bottom: float, top: float) -> tuple[Tick, ...]:
    whole = range(math.ceil(bottom), math.floor(top) + 1)
    return tuple(Tick(_place(power - bottom, top - bottom), f"{10.0**power:g}") for power in whole)


def _steps(count: int) -> tuple[Tick, ...]:
    """Step numbers under a curve; the last mark is dropped where it would leave the plot."""
    step = max(1, int(round_step(count / 4)))
    return tuple(Tick(_place(at, max(count - 1, 1)), f"{at:,}") for at in range(0, count, step))


def _extremes(losses: Sequence[float]) -> list[tuple[int, float]]:
    """The curve itself, or of a long one the least and greatest point of every bin, in their order."""
    if len(losses) <= LONGEST_CURVE:
        return list(enumerate(losses))
    points: set[tuple[int, float]] = {(0, losses[0]), (len(losses) - 1, losses[-1])}
    bins = LONGEST_CURVE // 2
    for part in range(bins):
        inside = range(part * len(losses) // bins, (part + 1) * len(losses) // bins)
        points |= {
            (index, losses[index])
            for index in (min(inside, key=losses.__getitem__), max(inside, key=losses.__getitem__))
        }
    return sorted(points)


def _smooth(losses: Sequence[float]) -> list[tuple[int, float]]:
    """Moving mean over a twenty-fifth of the curve, one-sided at its ends, at 300 points or fewer."""
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    half, last = len(losses) // 50, len(losses) - 1
    count = min(max(last, 1), 300)
    points = []
    for index in sorted({round(last * part / count) for part in range(count + 1)}):
        start, end = max(0, index - half), min(last, index + half) + 1
        points.append((index, (sums[end] - sums[start]) / (end - start)))
    return points
