"""What DVC draws of a run: small tables in data/plots, made from the artifacts of two stages."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks import artifacts
from tasks.healing_reports import named

Row = Sequence[str | int | float]


@dataclass(frozen=True)
class Plot:
    """A table in `path` whose first column is drawn along x and whose second along y."""

    path: str
    title: str
    columns: tuple[str, ...]
    rows: Callable[[Path], Iterator[Row]]

    def write(self, artifact: Path) -> None:
        """Make the table from the stage's artifact."""
        file = Path(self.path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", newline="") as opened:
            writer = csv.writer(opened, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(self.rows(artifact))

    def described(self) -> dict[str, dict[str, str]]:
        """Its entry in dvc.yaml."""
        return {self.path: {"x": self.columns[0], "y": self.columns[1], "title": self.title}}


def _kept(artifact: Path) -> Iterator[Row]:
    allocation = artifacts.load_allocation(artifact)
    for layer, kept in allocation.kept.items():
        yield layer, kept / allocation.total[layer]


def _losses(artifact: Path) -> Iterator[Row]:
    for name, report in named(artifacts.read_json(artifact / "healing.json")):
        for step, loss in enumerate(report["losses"], start=1):
            yield step, loss, name


PLOTS: Mapping[str, Plot] = {
    "allocation": Plot("data/plots/kept.csv", "Share kept by layer", ("layer", "kept"), _kept),
    "healing": Plot("data/plots/loss.csv", "Healing loss by step", ("step", "loss", "method"), _losses),
}
"""By the stage whose artifact they are made from."""
