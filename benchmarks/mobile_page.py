"""The tables and figures of mobile.csv: every cross, all test images and then each of their sources.

    python benchmarks/mobile_page.py

Writes mobile.md and figures/mobile_*.svg; measures nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.cross import table_of  # noqa: E402
from benchmarks.imagenet import SUBSETS  # noqa: E402
from benchmarks.mobile import ALLOCATIONS, REPAIRS  # noqa: E402
from benchmarks.pages import by_subset, curves, means  # noqa: E402

DRAWN = {"mobilenetv2_100": "bn cumulative", "tf_efficientnet_lite0": "variance_matching"}
"""The repair after which a network's allocations are drawn: the better of those that train nothing."""


def main() -> None:
    """Write the page."""
    rows = table_of(HERE / "mobile.csv", ALLOCATIONS, REPAIRS, SUBSETS).rows()
    page = by_subset(rows, ALLOCATIONS, REPAIRS, SUBSETS)
    (HERE / "mobile.md").write_text("\n".join(page) + "\n")
    for net, repair in DRAWN.items():
        shown = [row for row in rows if (row["net"], row["repair"]) == (net, repair)]
        found = means(shown, lambda row: row["allocation"], lambda row: float(row["top1"]))
        crossed = {name: points for name, points in found.items() if len(points) > 1}
        curves(crossed, HERE / "figures" / f"mobile_{net}.svg", "Top-1, %", f"{net} after {repair}")


if __name__ == "__main__":
    main()
