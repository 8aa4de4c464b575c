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
from benchmarks.pages import by_subset  # noqa: E402

PAGES = {
    "deit_cuts": (deit_cuts, "of the hidden neurons cut"),
    "deit_masks": (deit_masks, "masked"),
    "cnn_cuts": (cnn_cuts, "of the inner channels cut"),
}


def main() -> None:
    """Write the pages."""
    for name, (benchmark, removed) in PAGES.items():
        names = benchmark.ALLOCATIONS, benchmark.REPAIRS
        rows = table_of(HERE / f"{name}.csv", *names, SUBSETS).rows()
        if rows:
            page = by_subset(rows, *names, SUBSETS, removed)
            (HERE / f"{name}.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
