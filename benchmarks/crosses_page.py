"""The tables of deit_cuts.csv, deit_masks.csv and cnn_cuts.csv, where there are any: all test images, then by source.

    python benchmarks/crosses_page.py

Writes the .md beside each .csv; measures nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import cnn_cuts, deit_cuts, deit_masks  # noqa: E402
from benchmarks.cross import table_of  # noqa: E402
from benchmarks.imagenet import SUBSETS  # noqa: E402
from benchmarks.pages import Cells, by_subset, lines_of  # noqa: E402
from benchmarks.table import Row  # noqa: E402

PAGES = {
    "deit_cuts": (deit_cuts, "cut"),
    "deit_masks": (deit_masks, "masked"),
    "cnn_cuts": (cnn_cuts, "of the inner channels cut"),
}


def main() -> None:
    """Write the pages."""
    for name, (benchmark, removed) in PAGES.items():
        names = benchmark.ALLOCATIONS, benchmark.REPAIRS
        rows = table_of(HERE / f"{name}.csv", *names, SUBSETS).rows()
        if rows:
            most = {
                net: max(int(row["calibration_images"]) for row in rows if row["net"] == net) for net in _nets(rows)
            }
            of_all = [row for row in rows if int(row["calibration_images"]) == most[row["net"]]]
            page = [*by_subset(of_all, *names, SUBSETS, removed), *_hunger(rows, removed)]
            (HERE / f"{name}.md").write_text("\n".join(page) + "\n")


def _nets(rows: list[Row]) -> set[str]:
    return {row["net"] for row in rows}


def _hunger(rows: list[Row], removed: str) -> list[str]:
    """Of what was measured with fewer calibration images, top-1 by their number."""
    cells: dict[tuple[str, str], Cells] = {}
    for row in rows:
        line = cells.setdefault((row["net"], row["sparsity"]), {})
        line.setdefault((f"{row['allocation']}: {row['repair']}", row["calibration_images"]), []).append(row)
    page: list[str] = []
    for (net, sparsity), found in cells.items():
        counts = sorted({count for _, count in found}, key=int)
        asked = list(dict.fromkeys(name for name, count in found if count != counts[-1]))
        if asked:
            page += ["", f"### {net}, {100 * float(sparsity):g} % {removed}, by calibration images", ""]
            page += lines_of({key: value for key, value in found.items() if key[0] in asked}, asked, counts, "repair")
    return ["", "## Fewer calibration images", *page] if page else []


if __name__ == "__main__":
    main()
