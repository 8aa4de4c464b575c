"""The tables of cnn_cuts.csv: every cross, all test images and then each of their sources.

    python benchmarks/cnn_cuts_page.py

Writes cnn_cuts.md; measures nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.cnn_cuts import ALLOCATIONS, REPAIRS, SUBSETS, table_of  # noqa: E402
from benchmarks.pages import by_subset  # noqa: E402


def main() -> None:
    """Write the page."""
    rows = table_of(HERE / "cnn_cuts.csv", ALLOCATIONS, REPAIRS, SUBSETS).rows()
    page = by_subset(rows, ALLOCATIONS, REPAIRS, SUBSETS, "of the inner channels cut")
    (HERE / "cnn_cuts.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
