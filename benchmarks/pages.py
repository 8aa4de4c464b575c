"""What the pages of tables share: cells with spread, and curves over sparsity."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from benchmarks.table import Row

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "regrow", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})

Cells = dict[tuple[str, str], list[float]]
"""Values by (line, column)."""

Curves = dict[str, dict[float, list[float]]]
"""Values by name and sparsity."""

TOP1 = "Top-1 in per cent; of several seeds the mean and, in brackets, lowest to highest."
DAGGER = " †: at least one of them on a GPU, which the table in CSV names."
MARKS = "os^DvPX*<>h"


def lines_of(
    cells: Cells,
    names: list[str],
    columns: list[str],
    corner: str = "allocation",
    marked: Collection[tuple[str, str]] = (),
) -> list[str]:
    """A Markdown table of the lines and columns that have values, in the order given; a dagger at what is marked."""
    present = [column for column in columns if any(column == of for _, of in cells)]
    page = [f"| {corner} | " + " | ".join(present) + " |", "|---" * (len(present) + 1) + "|"]
    for name in (name for name in names if any(name == of for of, _ in cells)):
        values = (mean_and_spread(cells.get((name, of), [])) + " †" * ((name, of) in marked) for of in present)
        page.append(f"| {name} | " + " | ".join(values) + " |")
    return page


def crosses(
    rows: Iterable[Row],
    allocations: Iterable[str],
    repairs: Iterable[str],
    value: str = "top1",
    removed: str = "masked",
) -> list[str]:
    """A table for every network, sparsity and number of test images: allocations x repairs, the longer of them down."""
    page = list[str]()
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in (row for row in rows if row[value]):  # not every network has every subset
        groups.setdefault((row["net"], row["sparsity"], row["test_images"]), []).append(row)
    for (net, sparsity, count), found in groups.items():
        page += ["", f"### {net}, {100 * float(sparsity):g} % {removed}, {count} test images", ""]
        ways = {"allocation": list(allocations), "repair": list(repairs)}
        down, across = sorted(ways, key=lambda way: -len({row[way] for row in found}))
        cells: Cells = {}
        for row in found:
            cells.setdefault((row[down], row[across]), []).append(float(row[value]))
        marked = {(row[down], row[across]) for row in found if row["device"] != "cpu"}
        page += lines_of(cells, ways[down], ways[across], down, marked)
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
    page = [
        TOP1 + DAGGER * any(row["device"] != "cpu" for row in rows),
        "",
        "## All test images",
        *crosses(rows, names, columns, removed=removed),
    ]
    for subset in subsets:
        page += ["", f"## {subset} alone", *crosses(rows, names, columns, subset, removed)]
    return page


def mean_and_spread(values: list[float]) -> str:
    """One value, or the mean and, in brackets, lowest to highest; nothing of nothing."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


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
