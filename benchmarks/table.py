"""A table of measured points in a CSV file that several processes may fill at once: a point is measured once."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

Row = dict[str, Any]


class Table:
    """Rows of `path` with these columns, in the order that `rank` gives; a row's point is its values of `point`."""

    def __init__(self, path: Path, columns: tuple[str, ...], point: tuple[str, ...], rank: Callable[[Row], Any]):
        self.path, self.columns, self.point, self.rank = path, columns, point, rank

    def rows(self) -> list[Row]:
        """All rows, every value a string."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:  # replaced as a whole, so never seen half written
            return list(csv.DictReader(file))

    def known(self) -> set[tuple[str, ...]]:
        """The points that were measured."""
        return {self.of(row) for row in self.rows()}

    def of(self, row: Row) -> tuple[str, ...]:
        """The point of a row."""
        return tuple(str(row[name]) for name in self.point)

    def add(self, rows: Iterable[Row]) -> None:
        """Write rows; one of the same point gives way."""
        with FileLock(self.path.with_suffix(".lock")):
            merged = {self.of(row): row for row in [*self.rows(), *rows]}
            beside = self.path.with_suffix(".new")
            with beside.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(sorted(merged.values(), key=self.rank))
            beside.replace(self.path)
