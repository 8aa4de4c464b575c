"""DeiT-Tiny on real images: every row of the table is one `regrow run` of a committed preset.

    python benchmarks/deit_tiny.py --data ../shared/data            # all points; what is cached costs seconds
    python benchmarks/deit_tiny.py --data ../shared/data vbp-50     # those whose name begins so

Writes deit_tiny.csv and deit_tiny.md beside this file, from every point that has run.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COLUMNS = ("point", "seed", "epochs", "model", "top1", "agreement", "macs", "megabytes", "healing_minutes", "artifact")


@dataclass(frozen=True)
class Point:
    """One run: a preset and what it changes."""

    name: str
    preset: str
    overrides: tuple[str, ...]
    seed: int = 0
    epochs: int = 10

    def command(self, data: Path) -> list[str]:
        """The whole command line."""
        sources = {
            "dense.source": f"file:{data}/weights/deit_tiny_patch16_224.safetensors",
            "calibration.source": f"imagefolder:{data}/imagenet/calibration",
            "evaluation.source": f"imagefolder:{data}/imagenet/evaluation",
            "evaluation.labels": f"{data}/imagenet/evaluation_labels.csv",
            "healing.seed": str(self.seed),
            "healing.starfish.epochs": str(self.epochs),
        }
        words = [word for key, value in sources.items() for word in ("-S", f"{key}={value}")]
        words += [word for override in self.overrides for word in ("-S", override)]
        return ["run", "--json", "-p", str(HERE / "presets" / f"{self.preset}.yaml"), *words]


def _cut(percent: int, seed: int = 0) -> Point:
    return Point(f"vbp-{percent}", "deit_tiny_vbp", (f"allocation.budget.neurons={percent / 100}",), seed)


def _mask(percent: int, seed: int = 0, epochs: int = 10) -> Point:
    return Point(
        f"magnitude-{percent}", "deit_tiny_magnitude", (f"allocation.budget.weights={percent / 100}",), seed, epochs
    )


POINTS = (
    Point("auto-cut-50", "deit_tiny_auto", ()),
    Point("auto-masked-75", "deit_tiny_auto", ("allocation.budget={weights: 0.75}",)),
    _cut(50),
    _mask(75),
    _mask(50),
    _cut(40),
    _cut(30),
    _cut(20),
    _cut(50, seed=1),
    _mask(75, seed=1),
    _cut(50, seed=2),
    _mask(75, seed=2),
    _mask(75, epochs=30),
)


def main() -> None:
    """Run the points that were asked for, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--missing", action="store_true", help="only the points that the table lacks")
    parser.add_argument("points", nargs="*", help="beginnings of names; default: all")
    options = parser.parse_args()
    rows = _known(HERE / "deit_tiny.csv")
    for point in POINTS:
        if options.points and not any(point.name.startswith(name) for name in options.points):
            continue
        if options.missing and any(_is_of(row, point) for row in rows):
            continue
        made = _run(point, options.data.resolve())
        rows = [row for row in rows if not _is_of(row, point)] + made
        _write(rows)


def _run(point: Point, data: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "flows.cli", *point.command(data)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if not done.stdout:
        sys.exit(done.stderr)
    facts = json.loads(done.stdout)
    minutes = facts["stages"]["healing"]["seconds"] / 60
    return [
        {
            "point": point.name,
            "seed": point.seed,
            "epochs": point.epochs,
            "model": model,
            "top1": round(100 * found["top1"], 2),
            "agreement": round(100 * found["agreement"], 2),
            "macs": found["macs"],
            "megabytes": round(found["bytes"] / 1e6, 2),
            "healing_minutes": round(minutes, 1) if model == "healed" else "",
            "artifact": facts["artifacts"]["healing"][:12],
        }
        for model, found in facts["evaluation"]["models"].items()
    ]


def _is_of(row: dict[str, Any], point: Point) -> bool:
    return (row["point"], int(row["seed"]), int(row["epochs"])) == (point.name, point.seed, point.epochs)


def _known(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(rows: list[dict[str, Any]]) -> None:
    rows.sort(key=lambda row: (str(row["point"]), int(row["epochs"]), int(row["seed"])))
    with (HERE / "deit_tiny.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "deit_tiny.md").write_text(_markdown(rows))


def _markdown(rows: list[dict[str, Any]]) -> str:
    """A line a run: top-1 in per cent of every model on its way."""
    runs: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["point"], str(row["epochs"]), str(row["seed"])), {})[row["model"]] = row
    lines = [
        "| point | epochs | seed | dense | pruned | after closed form | healed | agreement | MB | minutes | artifact |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (point, epochs, seed), models in runs.items():
        tops = [models[name]["top1"] if name in models else "" for name in _ORDER]
        healed = models["healed"]
        tail = [healed["agreement"], healed["megabytes"], healed["healing_minutes"], f"`{healed['artifact']}`"]
        lines.append("| " + " | ".join(str(cell) for cell in (point, epochs, seed, *tops, *tail)) + " |")
    return "\n".join(lines) + "\n"


_ORDER = ("dense", "pruned", "after closed_form", "healed")

if __name__ == "__main__":
    main()
