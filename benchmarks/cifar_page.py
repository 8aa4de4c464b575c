"""The tables and figures of cifar.csv: every cross, the recoverability transition, the allocations in its band.

    python benchmarks/cifar_page.py

Writes cifar.md and figures/cifar_*.svg; measures nothing.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.cifar import ALLOCATIONS, REPAIRS, table_of  # noqa: E402
from benchmarks.pages import crosses, curves, legend, mean_and_spread, means  # noqa: E402
from benchmarks.table import Row  # noqa: E402
from heal.errors import InputError  # noqa: E402
from heal.transition import Transition, is_repair_sensitive, locate  # noqa: E402

CLASSES = 10
BAND_IMAGES = "5000"
BAND_REPAIR = "variance_matching"
FAR_BELOW = ("erk", "uniform", "raw_damage prior, at ERK's")
"""What the figure of the band leaves to the table: its zero line, and those that would flatten the others."""


def main() -> None:
    """Write the page and its figures."""
    rows = table_of(HERE / "cifar.csv", ALLOCATIONS, REPAIRS).rows()
    band = [row for row in rows if row["test_images"] == BAND_IMAGES and row["repair"] == BAND_REPAIR]
    page = [*_transitions(rows), *_band(band), *_crosses(rows)]
    (HERE / "cifar.md").write_text("\n".join(page) + "\n")
    curves(
        _by_repair(rows),
        HERE / "figures" / "cifar_repairs.svg",
        "Top-1, % (higher is better)",
        "resnet20, 2 000 test images, ERK",
    )
    curves(
        _against_erk(band), HERE / "figures" / "cifar_band.svg", "Top-1 minus ERK's, points", f"resnet20, {BAND_REPAIR}"
    )


def _transitions(rows: list[Row]) -> list[str]:
    """Where each repair stops bringing the network back, by agreement on held-out images, without labels."""
    page = [
        "## The recoverability transition, without labels",
        "",
        "From agreement with the dense network on 500 held-out training images, ERK; a logistic in logit(sparsity).",
        "The band is where the fit falls from 0.8 to 0.2 of the way from its highest value to chance.",
        "",
        "| network | repair | points | centre, % | band, % | residual |",
        "|---|---|---|---|---|---|",
    ]
    for net in sorted({row["net"] for row in rows}):
        for repair in REPAIRS:
            found = _transition(_curve(_erk(rows, net, repair)))
            if found:
                count, fit = found
                band = " to ".join(f"{100 * edge:.1f}" for edge in fit.band)
                page.append(f"| {net} | {repair} | {count} | {100 * fit.centre:.1f} | {band} | {fit.residual:.3f} |")
    return [*page, *_sensitive(rows)]


def _sensitive(rows: list[Row]) -> list[str]:
    """Where recalibration alone fails and a repair of statistics does not."""
    page = [
        "",
        "Repair-sensitive (recalibration alone brings back less than 0.2 of the way, the repair more), ERK, of the",
        "sparsities that both were measured at:",
        "",
    ]
    for net in sorted({row["net"] for row in rows}):
        for plain, repair in (("bn cumulative", "variance_matching"), ("bn ema_reset", "asr + bn ema_reset")):
            one, other = (_curve(_erk(rows, net, name)) for name in (plain, repair))
            both = sorted(one.keys() & other.keys())
            found = [s for s in both if is_repair_sensitive(one[s], other[s], CLASSES)]
            listed = ", ".join(f"{100 * s:g} %" for s in found) or "none"
            page += [f"* {net}, {repair} against {plain}: {listed} of {len(both)}"] if both else []
    return page


def _erk(rows: list[Row], net: str, repair: str) -> list[Row]:
    return [row for row in rows if (row["net"], row["repair"], row["allocation"]) == (net, repair, "erk")]


def _curve(rows: Iterable[Row]) -> dict[float, float]:
    """Agreement on held-out images by sparsity, of the first draw of images."""
    return {float(row["sparsity"]): float(row["held_out_agreement"]) / 100 for row in rows if row["seed"] == "0"}


def _transition(curve: dict[float, float]) -> tuple[int, Transition] | None:
    at = sorted(curve)
    try:
        return len(at), locate(at, [curve[s] for s in at], CLASSES, max(curve.values(), default=1.0))
    except InputError:
        return None  # too few points, or all on one side


def _band(rows: list[Row]) -> list[str]:
    """Means over the band's parts of the difference to ERK, seed by seed."""
    seeds = sorted({row["seed"] for row in rows})
    top1 = {(row["seed"], row["sparsity"], row["allocation"]): float(row["top1"]) for row in rows}
    parts = {
        "80 to 84": (0.80, 0.84),
        "84.5 to 89": (0.845, 0.89),
        "89.5 to 94": (0.895, 0.94),
        "80 to 94": (0.80, 0.94),
    }
    page = [
        "",
        f"## resnet20 in the band, steps of 0.5 %, after {BAND_REPAIR}, {BAND_IMAGES} test images",
        "",
        "Top-1 minus that of ERK at the same sparsity, seed and images, in points; the mean over the steps that all of",
        "an allocation's seeds have (1 % with three seeds), and of the seeds the mean and, in brackets, lowest to",
        "highest. Seeds draw the calibration images.",
        "",
        "| allocation | " + " | ".join(f"{name} %" for name in parts) + " |",
        "|---" * (len(parts) + 1) + "|",
    ]
    for name in (name for name in ALLOCATIONS if any(key[2] == name for key in top1)):
        cells = []
        own = {seed: {s for of, s, allocation in top1 if (of, allocation) == (seed, name)} for seed in seeds}
        common = set.intersection(*(steps for steps in own.values() if steps))
        for low, high in parts.values():
            by_seed = [_gain(top1, seed, name, [s for s in common if low <= float(s) <= high]) for seed in seeds]
            cells.append(mean_and_spread([gain for gain in by_seed if gain is not None]))
        page.append(f"| {name} | " + " | ".join(cells) + " |")
    return page


def _gain(top1: dict[tuple[str, str, str], float], seed: str, name: str, steps: list[str]) -> float | None:
    found = [
        top1[seed, step, name] - top1[seed, step, "erk"]
        for step in steps
        if (seed, step, name) in top1 and (seed, step, "erk") in top1
    ]
    return statistics.mean(found) if found else None


def _crosses(rows: list[Row]) -> list[str]:
    page = [
        "",
        "## Every cross",
        "",
        legend(rows),
    ]
    shown = (row for row in rows if row["test_images"] != BAND_IMAGES or row["repair"] != BAND_REPAIR)
    return page + crosses(shown, ALLOCATIONS, REPAIRS)


def _by_repair(rows: list[Row]) -> dict[str, dict[float, list[float]]]:
    """Top-1 from half of the weights on, a curve a repair, at ERK's densities."""
    chosen = (row for row in rows if (row["net"], row["allocation"], row["test_images"]) == ("resnet20", "erk", "2000"))
    shown = (row for row in chosen if float(row["sparsity"]) >= 0.5)
    return means(shown, lambda row: row["repair"], lambda row: float(row["top1"]))


def _against_erk(rows: list[Row]) -> dict[str, dict[float, list[float]]]:
    erk = {(row["seed"], row["sparsity"]): float(row["top1"]) for row in rows if row["allocation"] == "erk"}
    others = [row for row in rows if row["allocation"] not in FAR_BELOW and (row["seed"], row["sparsity"]) in erk]
    return means(
        others, lambda row: row["allocation"], lambda row: float(row["top1"]) - erk[row["seed"], row["sparsity"]]
    )


if __name__ == "__main__":
    main()
