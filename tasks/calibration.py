"""Stage: a fixed set of images, drawn by (seed, count) whatever their labels, each known to decode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from heal import bundle
from heal.errors import ImagesError
from heal.images import shuffled
from tasks import artifacts, data
from tasks.classes import Classes
from tasks.preprocessing import decode

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.params_schema import Calibration
    from tasks.progress import Progress

ROW_GROUP = 64

TOGETHER = 1024
"""Encoded images in memory at once."""

_SCHEMA = pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("image", pa.binary(), nullable=False)])


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Write images.parquet and calibration.json; labels.safetensors, too, when `calibration.labels` allows it.

    The log says whether labels are read. Raises ImagesError.
    """
    section, drawing = params.calibration, _drawing(params)
    labels = _labels(section, drawing.source, inputs["dense"], progress.fallback)
    progress.log(
        f"draws {section.count} of {len(drawing.ids)} images of {drawing.source.name}; labels are "
        f"{'not read' if labels is None else 'read (calibration.labels)'}"
    )
    digest, drawn = data.IdsDigest(), list[str]()
    with (
        pq.ParquetWriter(output / "images.parquet", _SCHEMA, compression="none") as writer,
        progress.track("images", section.count) as advance,
    ):
        for group in _grouped(drawing.images(), ROW_GROUP):
            writer.write_table(pa.table(list(zip(*group, strict=True)), schema=_SCHEMA), row_group_size=ROW_GROUP)
            for image, encoded in group:
                digest.add(image, encoded)
                drawn.append(image)
            advance(len(group))
    for image in drawing.skipped:
        progress.log(f"skipped {image}: it cannot be decoded")
    described = _described(drawing, digest.hex(), params.evaluation.source, inputs)
    if labels is not None:
        artifacts.save_labels(torch.tensor([labels[image] for image in drawn]), output)
        described["labels"] = True
    artifacts.write_json(output / "calibration.json", described)
    return {"images": float(section.count), "skipped": float(len(drawing.skipped))}


def rehearse(params: Params, dense: Path) -> None:
    """Draw, decode and read what labels are allowed, and keep nothing. Raises ImagesError."""
    drawing = _drawing(params)
    _labels(params.calibration, drawing.source, dense)
    for _ in drawing.images():
        pass


def _drawing(params: Params) -> _Drawing:
    section, evaluation = params.calibration, params.evaluation.source
    source, ids = data.for_calibration(section.source, evaluation)
    return _Drawing(section, source, ids, _contents(evaluation, data.is_shared(section.source, evaluation)))


def _labels(
    section: Calibration, source: data.Source, dense: Path, fallback: Callable[[str], None] | None = None
) -> Mapping[str, int] | None:
    """Class indices by id, or None when they must not be read. Raises ImagesError."""
    if not section.labels:
        return None
    labels = Classes.of(dense).of_source(source, fallback)
    if labels is None:
        raise ImagesError(
            f"calibration.labels is true, but {source.name} has no labels; choose a calibration.source that has them, "
            "or set it to false"
        )
    return labels


@dataclass
class _Drawing:
    """Ids in the order of their drawing, corrupt ones and copies of evaluation images passed over."""

    section: Calibration
    source: data.Source
    ids: list[str]
    taken: frozenset[str]
    skipped: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)

    def images(self) -> Iterator[tuple[str, bytes]]:
        """`count` times an id and its encoded bytes. Raises ImagesError when there are too few."""
        count, drawn = self.section.count, 0
        if count > len(self.ids):
            raise ImagesError(self._too_few(len(self.ids)))
        order = iter(shuffled(len(self.ids), self.section.seed, "calibration").tolist())
        while drawn < count:
            numbers = list(islice(order, min(count - drawn, TOGETHER)))
            if not numbers:
                raise ImagesError(self._too_few(drawn))
            # In the order of the source: parquet gives whole row groups, and so each is read once.
            read = {number: self.source.read(self.ids[number]) for number in sorted(numbers)}
            for image, encoded in ((self.ids[number], read[number]) for number in numbers):
                if hashlib.sha256(encoded).hexdigest() in self.taken:
                    self.duplicates.append(image)
                elif self._decodes(image, encoded):
                    drawn += 1
                    yield image, encoded

    def _decodes(self, image: str, encoded: bytes) -> bool:
        try:
            decode(encoded)
        except ImagesError as error:
            if self.section.corrupt == "refuse":
                raise ImagesError(
                    f"{self.source.name}: image {image} {error}; remove it, or set calibration.corrupt: skip"
                ) from error
            self.skipped.append(image)
            self._refuse_too_many()
            return False
        return True

    def _refuse_too_many(self) -> None:
        allowed = int(self.section.max_skipped * self.section.count)
        if len(self.skipped) > allowed:
            raise ImagesError(
                f"{self.source.name}: {len(self.skipped)} corrupt images, but calibration.max_skipped = "
                f"{self.section.max_skipped:g} of {self.section.count} allows {allowed}; the last is {self.skipped[-1]}"
            )

    def _too_few(self, drawn: int) -> str:
        passed = f" ({len(self.skipped)} corrupt, {len(self.duplicates)} also used for evaluation)"
        return (
            f"calibration.count = {self.section.count}, but {self.source.name} has only {drawn} images to draw from"
            f"{passed if self.skipped or self.duplicates else ''}; lower the count or add images"
        )


def _contents(evaluation: str, shared: bool) -> frozenset[str]:
    """SHA-256 of every evaluation image: the same picture may have another name on each side."""
    source, ids = data.for_evaluation(evaluation, shared)
    return frozenset(hashlib.sha256(source.read(image)).hexdigest() for image in ids)


def _described(drawing: _Drawing, digest: str, evaluation: str, inputs: Mapping[str, Path]) -> dict[str, object]:
    return {
        "source": drawing.source.name,
        "count": drawing.section.count,
        "ids_digest": digest,
        "preprocessing": bundle.read(inputs["dense"] / "bundle")["preprocessing"],
        "shared": data.is_shared(drawing.section.source, evaluation),
        "skipped": drawing.skipped,
        "duplicates": drawing.duplicates,
    }


def _grouped(rows: Iterator[tuple[str, bytes]], size: int) -> Iterator[list[tuple[str, bytes]]]:
    group: list[tuple[str, bytes]] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
