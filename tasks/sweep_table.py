"""A sweep's results as tables: means beside the dense model for people, every point as a line of CSV for machines."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tasks import summary, sweep_transitions
from tasks.summary import MISSING, Cell, Column, Row
from tasks.sweep_means import Mean, Read, Setting, reading, settings, share, time_ratio
from tasks.sweep_results import COUNTS, PARTS, SHARES, Result

if TYPE_CHECKING:
    from rich.table import Table

STATES = ("finished", "failed", "interrupted", "running")
STAGES = ("allocation", "healing", "evaluation")
"""Those whose artifacts the CSV file names."""

LEGEND = (
    "Means over the seeds; \N{PLUS-MINUS SIGN} is the standard deviation of a sample. In brackets the comparison with "
    "dense: points of a share, \N{MULTIPLICATION SIGN} of a size (of the file against dense in full precision), and "
    "how many times as fast (same, where the quartiles do not tell the two apart), timed in turns in one process."
)


def columns(settings: Sequence[Setting]) -> list[Column]:
    """Every measure that a setting has, with a cell for each: the mean, its deviation, how it compares with dense."""
    timed = summary.batches([row for setting in settings for row, _ in setting.rows])
    made = [
        _shares("top1", "Top-1", settings),
        _shares("agreement", "Agreement with dense", settings),
        _scaled("bytes", "Weights file", settings, summary.size, lambda row, dense: row.bytes / dense.bytes_unpacked),
        _scaled("nonzeros", "Nonzeros", settings, summary.quantity, lambda row, dense: row.nonzeros / dense.nonzeros),
        _scaled("macs", "MACs", settings, summary.quantity, lambda row, dense: row.macs / dense.macs),
        *(_timings(settings, batch) for batch in timed),
        _healing(settings),
    ]
    return [column for column in made if any(cell.value is not None for cell in column.cells)]


def standing(results: Sequence[Result], planned: int) -> str:
    """How many of the points there are, and how the others ended."""
    counts = {state: sum(result.status == state for result in results) for state in STATES}
    others = [f"{count} {state}" for state, count in counts.items() if count and state != "finished"]
    others += [f"{planned - len(results)} not run yet"] if planned > len(results) else []
    older = sum(result.is_older for result in results)
    others += [f"{older} by older code or of other inputs: run them again to compare"] if older else []
    return ", ".join([f"{counts['finished']} of {planned} points finished", *others]) + "."


def reason(result: Result) -> str:
    """Why a point has no numbers, in one line."""
    return (result.error or result.status).splitlines()[0]


def limits(found: Sequence[Setting]) -> Iterator[str]:
    """What the figures do not say."""
    yield (
        "A seed draws the calibration images, the order of healing, and what an allocator draws. With few seeds the "
        "deviation is rough itself, and two settings closer than theirs are not told apart."
    )
    yield "The front goes by the means: what lies within the deviation of a number on it may be as good."
    if any(row.nonzeros < row.parameters == dense.parameters for setting in found for row, dense in setting.rows):
        yield "Zeros shrink the file. They do not speed up a runtime that has no sparse kernels."
    if share(found) == "agreement":
        yield "Without labels agreement says how often the answer is the dense model's, not how often it is right."
    if not summary.batches([row for setting in found for row, _ in setting.rows]):
        yield "Latency was not measured."
    else:
        yield (
            "A point's models were timed in turns in one process, so a speed beside dense holds; seconds of different "
            "points were taken at different times. In the pictures a latency whose quartiles do not set it apart from "
            "dense's counts as dense's."
        )


def markdown(name: str, results: Sequence[Result], planned: int) -> str:
    """The means, a table for each model, and what did not finish."""
    found = settings(results)
    lines = [f"# Sweep {name}", "", f"{standing(results, planned)} {LEGEND}", ""]
    for model in dict.fromkeys(setting.model for setting in found):
        own = [setting for setting in found if setting.model == model]
        lines += [f"## {model}", "", *_grid(own), "", *_transitions(own)]
    unfinished = [result for result in results if result.status != "finished"]
    if unfinished:
        lines += ["## Not finished", "", *(f"* {result.point}: {reason(result)}" for result in unfinished), ""]
    lines += ["## Limits", "", *(f"* {limit}" for limit in limits(found)), ""]
    return "\n".join(lines)


def terminal(settings: Sequence[Setting], rows: int) -> Table:
    """The first `rows` of the means, narrow: accuracy, and what it costs as a share of dense."""
    from rich.table import Table  # only the command line needs rich
    from rich.text import Text

    found = {column.key: column for column in columns(settings)}
    accuracy = found.get(share(settings))
    costs = [(name, found[key]) for key, name in (("bytes", "file ↓"), ("macs", "MACs ↓")) if key in found]
    timed = [column for key, column in found.items() if key.startswith("latency")]
    costs += [(f"speed b{column.key[7:]} ↑", column) for column in timed[-1:]]
    labels = ("model", "method", "budget", "seeds")[len({setting.model for setting in settings}) == 1 :]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for label in labels:
        table.add_column(label, justify="right" if label == "seeds" else "left", no_wrap=label in ("budget", "seeds"))
    for label in (summary.heading(accuracy) if accuracy else "", *(label for label, _ in costs)):
        table.add_column(Text(label), justify="right", no_wrap=True)
    for number, setting in enumerate(settings[:rows]):
        cell = accuracy.cells[number] if accuracy else Cell(MISSING, None)
        values = (_beside_dense(column, number) for _, column in costs)
        names = (getattr(setting, label) for label in labels)
        table.add_row(*map(Text, (*names, f"{cell.text} {cell.spread}".rstrip(), *values)))
    return table


def comma_separated(results: Sequence[Result]) -> str:
    """A line for every point, unrounded: shares in [0, 1], seconds, bytes; an empty field was not measured."""
    lines = [line(result) for result in results]
    names = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted(names, key=lambda name: "latency" in name), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def line(result: Result) -> dict[str, object]:
    """One point by the names of the CSV file's columns."""
    unit, _, removed = result.budget.partition("=")
    return {
        "point": result.point,
        "model": result.model,
        "method": result.method,
        "budget_unit": unit,
        "budget": float(removed),
        "seed": result.seed,
        "status": result.status,
        "is_older": result.is_older,
        "error": reason(result) if result.status != "finished" else "",
        **_fields("", result.healed),
        **_fields("pruned_", result.pruned),
        **_fields("dense_", result.dense),
        "images": result.images or None,
        "healing_seconds": result.healing_seconds,
        "seconds": result.seconds,
        **{stage: result.artifacts.get(stage, "") for stage in STAGES},
        "run": result.run_id,
    }


def _fields(prefix: str, row: Row | None) -> dict[str, object]:
    found: dict[str, object] = {f"{prefix}{name}": getattr(row, name, None) for name in (*SHARES, *COUNTS)}
    for batch, spread in (row.latency if row else {}).items():
        found |= {f"{prefix}latency_batch{batch}_{part}_seconds": getattr(spread, part) for part in PARTS}
    return found


def _grid(settings: Sequence[Setting]) -> Iterator[str]:
    """A Markdown table."""
    found = columns(settings)
    yield f"| method | budget | seeds | {' | '.join(summary.heading(column) for column in found)} |"
    yield f"|---|---|---:|{'---:|' * len(found)}"
    for number, setting in enumerate(settings):
        cells = (_long(column.cells[number]) for column in found)
        yield f"| {' | '.join((setting.method, setting.budget, setting.seeds, *cells))} |"


def _transitions(settings: Sequence[Setting]) -> Iterator[str]:
    found = sweep_transitions.transitions(settings)
    if found:
        yield from (f"Recoverability transition ({sweep_transitions.LEGEND}):", "")
        yield from (f"* {transition.text}" for transition in found)
        yield ""


def _long(cell: Cell) -> str:
    return " ".join(filter(None, (cell.text, cell.spread, f"({cell.note})" if cell.note else "")))


def _beside_dense(column: Column, number: int) -> str:
    """The ratio to dense; of dense itself, and where it was not measured, the number."""
    cell = column.cells[number]
    return cell.note.removesuffix(" speed") or (f"{cell.text} {column.unit}" if cell.value is not None else cell.text)


def _shares(key: str, label: str, settings: Sequence[Setting]) -> Column:
    images = min((count for setting in settings for _, count in setting.images), default=1)

    def text(value: float) -> str:
        return summary.percent(value, images)

    def cell(setting: Setting) -> Cell:
        beside = setting.mean(lambda row, dense: _difference(getattr(row, key), getattr(dense, key)))
        is_own = setting.is_dense or key == "agreement"
        return _cell(
            setting.mean(reading(key)), text, "" if is_own or not beside else summary.points(beside.value, images)
        )

    return Column(key, label, "%", "higher", tuple(cell(setting) for setting in settings))


def _scaled(
    key: str,
    label: str,
    settings: Sequence[Setting],
    unit: Callable[[float], tuple[float, str]],
    against: Read,
) -> Column:
    means = [setting.mean(reading(key)) for setting in settings]
    scale, name = unit(max((mean.value for mean in means if mean), default=0))

    def cell(setting: Setting, mean: Mean | None) -> Cell:
        ratio = None if setting.is_dense else setting.mean(against)
        return _cell(mean, lambda value: summary.digits(value / scale), summary.times(ratio.value) if ratio else "")

    return Column(key, label, name, "lower", tuple(map(cell, settings, means)))


def _timings(settings: Sequence[Setting], batch: int) -> Column:
    def seconds(row: Row, dense: Row) -> float | None:
        return row.latency[batch].median if batch in row.latency else None

    means = [setting.mean(seconds) for setting in settings]
    scale, unit = summary.duration(max((mean.value for mean in means if mean), default=0))

    def cell(setting: Setting, mean: Mean | None) -> Cell:
        note = "" if setting.is_dense else _speed(setting, batch)
        return _cell(mean, lambda value: summary.digits(value / scale), note)

    return Column(f"latency{batch}", f"Latency, batch {batch}", unit, "lower", tuple(map(cell, settings, means)))


def _speed(setting: Setting, batch: int) -> str:
    """Beside dense: "1.33× speed", or "same speed" where no point's quartiles tell the two apart."""
    ratio = setting.mean(time_ratio(batch))
    if ratio is None:
        return ""
    return "same speed" if ratio.value == 1 else f"{summary.times(1 / ratio.value)} speed"


def _healing(settings: Sequence[Setting]) -> Column:
    means = [Mean.of(setting.healing) for setting in settings]
    return Column("healing", "Healing", "s", "lower", tuple(_cell(mean, summary.digits, "") for mean in means))


def _cell(mean: Mean | None, text: Callable[[float], str], note: str) -> Cell:
    if mean is None:
        return Cell(MISSING, None)
    spread = f"\N{PLUS-MINUS SIGN} {text(mean.deviation)}" if mean.deviation else ""
    return Cell(text(mean.value), mean.value, note, spread)


def _difference(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else value - base
