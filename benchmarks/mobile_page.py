"""The tables of mobile.csv: every cross, all test images and then each of their sources.

    python benchmarks/mobile_page.py

Writes mobile.md; measures nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.mobile import ALLOCATIONS, REPAIRS, SUBSETS, table_of  # noqa: E402
from benchmarks.pages import crosses  # noqa: E402


def main() -> None:
    """Write the page."""
    rows = table_of(HERE / "mobile.csv", ALLOCATIONS, REPAIRS, SUBSETS).rows()
    page = [
        "Top-1 in per cent; of several seeds the mean and, in brackets, lowest to highest.",
        "",
        "## All test images",
    ]
    page += crosses(rows, ALLOCATIONS, REPAIRS)
    for subset in SUBSETS:
        page += ["", f"## {subset} alone", *crosses(rows, ALLOCATIONS, REPAIRS, subset)]
    (HERE / "mobile.md").write_text("\n".join(page) + "\n")


if __name__ == "__main__":
    main()
