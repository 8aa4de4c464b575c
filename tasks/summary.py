"""The table of results: dense, pruned, after each healer, healed; for the report, the CSV and the command line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles: seconds, or a ratio."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One model of an evaluation.

    `top1` and `agreement` are fractions in [0, 1] (None: not measured). `bytes` is the size of the weights file,
    `bytes_unpacked` that of the tensors when loaded, `bytes_float16` what the file would be with float32 stored as
    float16. `latency` maps a batch size to seconds per batch.
    """

    name: str
    top1: float | None
    agreement: float | None
    parameters: int
    nonzeros: int
    macs: int
    bytes: int
    bytes_unpacked: int
    bytes_float16: int | None = None
    latency: Mapping[int, Spread] = field(default_factory=dict)

    def speedup(self, dense: Row, batch: int) -> Spread | None:
        """How many times faster than `dense`; the range is the worst and the best pairing of the quartiles."""
        if batch not in self.latency or batch not in dense.latency:
            return None
        mine, base = self.latency[batch], dense.latency[batch]
        return Spread(base.median / mine.median, base.low / mine.high, base.high / mine.low)


@dataclass(frozen=True)
class Cell:
    """One entry as text; `value` is the number behind it in SI units, `note` compares it with dense."""

    text: str
    value: float | None
    note: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Column:
    """One measure of all models: its unit, and which direction is better ("higher", "lower" or "")."""

    key: str
    label: str
    unit: str
    better: str
    cells: tuple[Cell, ...]


def rows(evaluation: Mapping[str, Any], healers: Sequence[str] = ()) -> list[Row]:
    """The models of an evaluation.json in the order of their making; `healers` in theirs, where JSON has lost it.

    Raises ValueError without a dense model.
    """
    models = evaluation["models"]
    if "dense" not in models:
        raise ValueError(f"evaluation.json has no dense model to compare with, only {sorted(models)}")
    made = ["dense", "pruned", *(f"after {healer}" for healer in healers)]
    between = [name for name in models if name not in made and name != "healed"]
    return [_row(name, models[name]) for name in (*made, *between, "healed") if name in models]


def columns(rows: Sequence[Row], images: int) -> list[Column]:
    """Every measure that at least one model has, in one unit each; `images` bounds the decimals of a share."""
    made = [
        _shares("top1", "Top-1", [row.top1 for row in rows], images),
        _shares("agreement", "Agreement with dense", [row.agreement for row in rows], images),
        _counts("parameters", "Parameters", [row.parameters for row in rows], quantity),
        _counts("nonzeros", "Nonzero parameters", [row.nonzeros for row in rows], quantity),
        _counts("macs", "MACs", [row.macs for row in rows], quantity),
        _counts("bytes", "Weights file", [row.bytes for row in rows], size, against=rows[0].bytes_unpacked),
        _counts("bytes_float16", "Same in float16", [row.bytes_float16 for row in rows], size),
        *(_timings(rows, batch) for batch in batches(rows)),
    ]
    return [column for column in made if any(cell.value is not None for cell in column.cells)]


def batches(rows: Sequence[Row]) -> list[int]:
    """The batch sizes that were timed, ascending."""
    return sorted({batch for row in rows for batch in row.latency})


def table(evaluation: Mapping[str, Any], healers: Sequence[str] = ()) -> Table:
    """The results as a table for the terminal: a line for a measure, an arrow for its better direction."""
    from rich.table import Table  # only the command line needs rich
    from rich.text import Text

    found = rows(evaluation, healers)
    shown = Table(box=None, pad_edge=False, header_style="bold", caption=_caption(evaluation), caption_justify="left")
    shown.add_column("", no_wrap=True)
    for row in found:
        shown.add_column(Text(row.name), justify="right", style="bold" if row is found[-1] else "")
    for column in columns(found, evaluation["images"]):
        shown.add_row(heading(column), *(_terminal(cell) for cell in column.cells))
    return shown


def comma_separated(rows: Sequence[Row]) -> str:
    """The same numbers for machines, unrounded: shares in [0, 1], seconds, bytes; an empty field was not measured."""
    timed = batches(rows)
    counts = ("top1", "agreement", "parameters", "nonzeros", "macs", "bytes", "bytes_unpacked", "bytes_float16")
    seconds = [f"latency_batch{batch}_{part}_seconds" for batch in timed for part in ("median", "low", "high")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", *counts, *seconds])
    for row in rows:
        spreads = (row.latency.get(batch) for batch in timed)
        times = [number for s in spreads for number in ((s.median, s.low, s.high) if s else (None,) * 3)]
        writer.writerow([row.name, *(getattr(row, name) for name in counts), *times])
    return text.getvalue()


def quantity(largest: float) -> tuple[float, str]:
    """The divisor and unit that suit counts up to `largest`: nothing, k, M or G."""
    return next(((s, unit) for s, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= s), (1.0, ""))


def size(largest: float) -> tuple[float, str]:
    """The divisor and unit that suit bytes up to `largest`: kB or MB, decimal."""
    return (1e6, "MB") if largest >= 1e6 else (1e3, "kB")


def duration(largest: float) -> tuple[float, str]:
    """The divisor and unit that suit seconds up to `largest`: s, ms or µs."""
    return next(((s, unit) for s, unit in ((1.0, "s"), (1e-3, "ms")) if largest >= s), (1e-6, "µs"))


def digits(value: float) -> str:
    """Three significant digits or more, grouped by thousands, without an exponent: 1,234, 113, 84.9, 4.61."""
    decimals = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{decimals}f}"


def percent(share: float, images: int) -> str:
    """A share of `images` in per cent, with the decimals that so many images can tell apart."""
    return f"{100 * share:.{2 if images >= 1000 else 1}f}"


def times(ratio: float) -> str:
    """A ratio as 1.33×."""
    return f"{ratio:.2f}\N{MULTIPLICATION SIGN}"


def span(spread: Spread, text: Callable[[float], str]) -> str:
    """The quartiles as low–high."""
    return f"{text(spread.low)}\N{EN DASH}{text(spread.high)}"


def points(difference: float, images: int) -> str:
    """A difference of shares in percentage points, with its sign and a true minus."""
    sign = "" if difference == 0 else "+" if difference > 0 else "\N{MINUS SIGN}"
    return f"{sign}{percent(abs(difference), images)} points"


def _row(name: str, entry: Mapping[str, Any]) -> Row:
    timings = entry.get("latency") or {}
    spreads = {int(batch): Spread(t["median"], t["low"], t["high"]) for batch, t in timings.items()}
    counts = {key: int(entry[key]) for key in ("parameters", "nonzeros", "macs", "bytes", "bytes_unpacked")}
    return Row(name, top1=entry["top1"], agreement=entry["agreement"], latency=spreads, **counts)


def _shares(key: str, label: str, values: Sequence[float | None], images: int) -> Column:
    def cell(index: int, value: float | None) -> Cell:
        if value is None:
            return Cell(MISSING, None)
        base = values[0] if index else None
        return Cell(percent(value, images), value, points(value - base, images) if base is not None else "")

    return Column(key, label, "%", "higher", tuple(cell(index, value) for index, value in enumerate(values)))


def _counts(
    key: str,
    label: str,
    values: Sequence[int | None],
    unit: Callable[[float], tuple[float, str]],
    against: int | None = None,
) -> Column:
    """`against`: what the others are compared with, where that is not the first value."""
    scale, name = unit(max(value or 0 for value in values))

    def cell(index: int, value: int | None) -> Cell:
        base = (against or values[0]) if index else None
        if value is None:
            return Cell(MISSING, None)
        return Cell(digits(value / scale), value, times(value / base) if base else "")

    return Column(key, label, name, "lower", tuple(cell(index, value) for index, value in enumerate(values)))


def _timings(rows: Sequence[Row], batch: int) -> Column:
    scale, unit = duration(max(row.latency[batch].median for row in rows if batch in row.latency))

    def cell(row: Row) -> Cell:
        spread = row.latency.get(batch)
        if spread is None:
            return Cell(MISSING, None)
        ratio = None if row is rows[0] else row.speedup(rows[0], batch)
        note = f"{times(ratio.median)} speed ({span(ratio, lambda value: f'{value:.2f}')})" if ratio else ""
        quartiles = span(spread, lambda seconds: digits(seconds / scale))
        return Cell(digits(spread.median / scale), spread.median, note, quartiles)

    return Column(f"latency{batch}", f"Latency, batch {batch}", unit, "lower", tuple(cell(row) for row in rows))


def heading(column: Column) -> str:
    label = column.label.removesuffix(" with dense")
    arrow = {"higher": " ↑", "lower": " ↓", "": ""}[column.better]
    return f"{label}{', ' if column.unit else ''}{column.unit}{arrow}"


def _terminal(cell: Cell) -> str:
    ratio = cell.note.split(" ")[0] if "\N{MULTIPLICATION SIGN}" in cell.note else ""
    return f"{cell.text} {ratio:>6}" if ratio else cell.text


def _caption(evaluation: Mapping[str, Any]) -> str:
    shown = "top-1 and agreement" if evaluation["labels"] else "no labels: agreement with the dense model only"
    return f"{evaluation['images']:,} images, {shown}; × against dense (file: in full precision, latency: times faster)"
