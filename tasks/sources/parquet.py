"""Parquet files with a column `image` of encoded bytes; `id` and `label` (class index) if they have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from heal.errors import ImagesError


@dataclass(frozen=True)
class _Row:
    file: int
    group: int
    row: int


class Parquet:
    """One file, or all `*.parquet` of a folder in sorted order. Without `id`, ids are `file:row`.

    An image may also be a struct with a field `bytes`, as `datasets` writes it. One row group is
    held in memory at a time. Raises ImagesError for files that are not so.
    """

    def __init__(self, path: Path) -> None:
        self.paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not self.paths or not self.paths[0].is_file():
            raise ImagesError(f"parquet:{path} is not a parquet file or a folder of them; check the path")
        self.name = f"parquet:{path.resolve().name}"
        self._opened: dict[int, Any] = {}
        self._cached: tuple[tuple[int, int], list[Any]] | None = None

    def ids(self) -> Sequence[str]:
        """All ids, in the order of the rows."""
        return list(self._rows)

    def files(self) -> Sequence[Path]:
        """The parquet files."""
        return self.paths

    def read(self, image: str) -> bytes:
        """The encoded bytes of one image."""
        place = self._rows[image]
        value = self._group(place.file, place.group)[place.row]
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise ImagesError(f"{self.name}: {image} holds no bytes; write images encoded into the column `image`")
        return value

    def labels(self) -> Mapping[str, int] | None:
        """The column `label`, or None without one."""
        if any("label" not in self._open(file).schema_arrow.names for file in range(len(self.paths))):
            return None
        found = [label for file in range(len(self.paths)) for label in self._column(file, "label")]
        labels = dict(zip(self._rows, found, strict=True))
        bad = next((image for image, label in labels.items() if type(label) is not int or label < 0), None)
        if bad is not None:
            raise ImagesError(f"{self.name}: the label of {bad} is {labels[bad]!r}, not a class index")
        return labels

    @cached_property
    def _rows(self) -> dict[str, _Row]:
        rows: dict[str, _Row] = {}
        names: Counter[str] = Counter()
        for file in range(len(self.paths)):
            places = self._places(file)
            has_ids = "id" in self._open(file).schema_arrow.names
            stem = self.paths[file].stem
            ids = self._column(file, "id") if has_ids else [f"{stem}:{row:08d}" for row in range(len(places))]
            names.update(map(str, ids))
            rows.update(zip(map(str, ids), places, strict=True))
        twice = next((name for name, count in names.items() if count > 1), None)
        if twice is not None:
            raise ImagesError(f"{self.name}: the id {twice!r} is there twice; ids must be unique")
        if not rows:
            raise ImagesError(f"{self.name} has no rows")
        return rows

    def _places(self, file: int) -> list[_Row]:
        meta = self._open(file).metadata
        return [
            _Row(file, group, row)
            for group in range(meta.num_row_groups)
            for row in range(meta.row_group(group).num_rows)
        ]

    def _group(self, file: int, group: int) -> list[Any]:
        if self._cached is None or self._cached[0] != (file, group):
            self._cached = None  # the old group goes before the new one comes
            try:
                table = self._open(file).read_row_group(group, columns=["image"])
            except (pa.ArrowException, OSError) as error:
                raise ImagesError(f"{self.paths[file]}: row group {group} cannot be read: {error}") from error
            self._cached = ((file, group), table.column("image").to_pylist())
        return self._cached[1]

    def _column(self, file: int, name: str) -> list[Any]:
        try:
            values: list[Any] = self._open(file).read(columns=[name]).column(name).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ImagesError(f"{self.paths[file]}: column {name} cannot be read: {error}") from error
        return values

    def _open(self, file: int) -> Any:
        if file not in self._opened:
            self._opened[file] = _opened(self.paths[file])
        return self._opened[file]


def _opened(path: Path) -> Any:
    try:
        opened = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ImagesError(f"{path} cannot be read as parquet: {error}") from error
    if "image" not in opened.schema_arrow.names:
        names = ", ".join(opened.schema_arrow.names)
        raise ImagesError(f"{path} has no column `image` (it has {names}); rename the column of images")
    return opened
