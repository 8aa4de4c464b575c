"""What the pages of tables share: cells with spread, and curves over sparsity."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from benchmarks.table import Row

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "regrow", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})

Cells = dict[tuple[str, str], list[Row]]
"""What was measured by (line, column)."""

Curves = dict[str, dict[float, list[float]]]
"""Values by name and sparsity."""

MARKS = "os^DvPX*<>h"


def legend(rows: Iterable[Row]) -> str:
    """What the cells of these rows' tables say."""
    text = "Top-1 in per cent; of several seeds the mean and, in brackets, lowest to highest and how many."
    if any(_is_of_a_gpu(row) for row in rows):
        text += " †: at least one was measured on a GPU; the column `device` of the CSV names it."
    return text


def lines_of(cells: Cells, names: list[str], columns: list[str], corner: str, value: str = "top1") -> list[str]:
    """A Markdown table of the lines and columns that have values, in the order given."""
    present = [column for column in columns if any(column == of for _, of in cells)]
    page = [f"| {corner} | " + " | ".join(present) + " |", "|---" * (len(present) + 1) + "|"]
    for name in (name for name in names if any(name == of for of, _ in cells)):
        page.append(f"| {name} | " + " | ".join(_cell(cells.get((name, of), []), value) for of in present) + " |")
    return page


def _cell(rows: list[Row], value: str) -> str:
    shown = mean_and_spread([float(row[value]) for row in rows])
    return f"{shown} †" if any(_is_of_a_gpu(row) for row in rows) else shown


def _is_of_a_gpu(row: Row) -> bool:
    return bool(row["device"] != "cpu")


def crosses(
    rows: Iterable[Row],
    allocations: Iterable[str],
    repairs: Iterable[str],
    value: str = "top1",
    removed: str = "masked",
) -> list[str]:
    """A table for every network, sparsity and number of test images; down go allocations or repairs, as are more."""
    ways = {"allocation": list(allocations), "repair": list(repairs)}
    down, across = sorted(ways, key=lambda way: len(ways[way]), reverse=True)
    groups: dict[tuple[str, str, str], Cells] = {}
    for row in (row for row in rows if row[value]):  # not every network has every subset
        cells = groups.setdefault((row["net"], row["sparsity"], row["test_images"]), {})
        cells.setdefault((row[down], row[across]), []).append(row)
    page = list[str]()
    for (net, sparsity, count), cells in groups.items():
        page += ["", f"### {net}, {100 * float(sparsity):g} % {removed}, {count} test images", ""]
        page += lines_of(cells, ways[down], ways[across], down, value)
    return page


def by_subset(
    rows: Sequence[Row],
    allocations: Iterable[str],
    repairs: Iterable[str],
    subsets: Iterable[str],
    removed: str = "masked",
) -> list[str]:
    """The crosses on all test images, then on each of their subsets."""
    names, columns = list(allocations), list(repairs)
    page = [legend(rows), "", "## All test images", *crosses(rows, names, columns, removed=removed)]
    for subset in subsets:
        page += ["", f"## {subset} alone", *crosses(rows, names, columns, subset, removed)]
    return page


def mean_and_spread(values: list[float]) -> str:
    """One value, or the mean and, in brackets, lowest to highest and how many; nothing of nothing."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f}; {len(values)})"


def means(rows: Iterable[Row], name: Callable[[Row], str], value: Callable[[Row], float]) -> Curves:
    """The values of rows by name and sparsity."""
    found: Curves = {}
    for row in rows:
        found.setdefault(name(row), {}).setdefault(float(row["sparsity"]), []).append(value(row))
    return found


def curves(found: Curves, path: Path, label: str, title: str) -> None:
    """Draw the mean over seeds, and lowest to highest as a shade."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (name, points) in enumerate(sorted(found.items())):
        at = sorted(points)
        middle = [statistics.mean(points[x]) for x in at]
        shown = [100 * x for x in at]
        (line,) = axes.plot(shown, middle, marker=MARKS[number % len(MARKS)], markersize=3.5, linewidth=1.2, label=name)
        low, high = [min(points[x]) for x in at], [max(points[x]) for x in at]
        axes.fill_between(shown, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="Weights masked, %", ylabel=label, title=title)
    axes.legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
