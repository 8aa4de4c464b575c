"""The tables of deit_masks.csv: every cross, all test images and then each of their sources.

    python benchmarks/deit_masks_page.py

Writes deit_masks.md; measures nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.deit_masks import ALLOCATIONS, REPAIRS, SUBSETS, table_of  # noqa: E402
from benchmarks.pages import by_subset  # noqa: E402


def main() -> None:
    """Write the page."""
    rows = table_of(HERE / "deit_masks.csv", ALLOCATIONS, REPAIRS, SUBSETS).rows()
    page = by_subset(rows, ALLOCATIONS, REPAIRS, SUBSETS)
    (HERE / "deit_masks.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
