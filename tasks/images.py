"""Images as an array on disk: decoded once, fetched by index, normalised on the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from heal.errors import ImagesError
from tasks import artifacts, data
from tasks.preprocessing import Preprocessing, parse

if TYPE_CHECKING:
    from tasks.params_schema import Evaluation
    from tasks.progress import Progress

_CHUNK = 64


class ImageArray:
    """Pixels, uint8 [n, height, width, 3] in a memory-mapped file; normalised when fetched.

    `array[LongTensor [k]]` gives float32 [k, 3, height, width], (pixel / 255 - mean) / std.
    """

    def __init__(self, pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> None:
        self.pixels = pixels
        self.preprocessing = preprocessing
        self._mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
        self._std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, 3, height, width)."""
        count, height, width, channels = self.pixels.shape
        return count, channels, height, width

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        chosen = torch.from_numpy(self.pixels[indices.cpu().numpy()])
        return chosen.permute(0, 3, 1, 2).contiguous().float().div_(255).sub_(self._mean).div_(self._std)


@dataclass(frozen=True)
class EvaluationImages:
    """What a model is judged by. labels: int64 [n], subsets: a name an image; None where there are none."""

    array: ImageArray
    ids: Sequence[str]
    labels: Tensor | None
    subsets: Sequence[str] | None


def load_calibration(folder: Path, work: Path) -> ImageArray:
    """The images of a calibration artifact, in the order they were drawn; decoded into `work`."""
    described = artifacts.read_json(folder / "calibration.json")
    table = pq.ParquetFile(folder / "images.parquet")
    rows = (
        (image, encoded)
        for batch in table.iter_batches(batch_size=_CHUNK, columns=["id", "image"])
        for image, encoded in zip(batch.column("id").to_pylist(), batch.column("image").to_pylist(), strict=True)
    )
    return array(rows, table.metadata.num_rows, parse(described["preprocessing"]), work / "calibration.npy")


def load_evaluation(
    section: Evaluation, preprocessing: Mapping[str, Any], progress: Progress, calibration: Path
) -> EvaluationImages:
    """The images that params.evaluation names, without those of the calibration artifact's side.

    Labels are read when `evaluation.labels` allows it, and the log says so. Raises ImagesError.
    """
    shared = bool(artifacts.read_json(calibration / "calibration.json")["shared"])
    source, ids = data.for_evaluation(section.source, shared)
    rows = ((image, source.read(image)) for image in ids)
    pixels = array(rows, len(ids), parse(preprocessing), progress.checkpoints / "evaluation.npy")
    if section.labels is False:
        progress.log(f"{len(ids)} images, labels are not read")
        return EvaluationImages(pixels, ids, None, None)
    progress.log(f"{len(ids)} images, labels are read (evaluation.labels)")
    if section.labels is True:
        return EvaluationImages(pixels, ids, _own_labels(source, ids), None)
    table = data.read_labels(Path(section.labels), ids)
    subsets = None if section.subsets is None else table.column(section.subsets, ids)
    return EvaluationImages(pixels, ids, torch.tensor([table.labels[image] for image in ids]), subsets)


def load_source(spec: str, preprocessing: Preprocessing, work: Path) -> tuple[ImageArray, Tensor | None, list[str]]:
    """All images of a source, their labels if it has them, and their ids."""
    source = data.open_source(spec)
    ids = list(source.ids())
    rows = ((image, source.read(image)) for image in ids)
    labels = source.labels()
    pixels = array(rows, len(ids), preprocessing, work / "images.npy")
    return pixels, None if labels is None else torch.tensor([labels[image] for image in ids]), ids


def array(rows: Iterable[tuple[str, bytes]], count: int, preprocessing: Preprocessing, path: Path) -> ImageArray:
    """Decode (id, encoded bytes) by way of a file at `path`; a few images are in memory at a time.

    The file has no name any more when this returns, so a killed process leaves nothing and nobody
    takes it for a checkpoint. Raises ImagesError naming the image that cannot be decoded.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (count, *preprocessing.size, 3)
    if count == 0:
        raise ImagesError(f"{path.stem}: there are no images")
    pixels = open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    done, remaining = 0, iter(rows)
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(remaining, _CHUNK)):
            for decoded in pool.map(lambda row: _pixels(row, preprocessing), chunk):
                pixels[done] = decoded
                done += 1
    assert done == count
    pixels.flush()
    mapped: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    path.unlink()
    return ImageArray(mapped, preprocessing)


def _pixels(row: tuple[str, bytes], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    image, encoded = row
    try:
        return preprocessing.pixels(encoded)
    except ImagesError as error:
        raise ImagesError(f"image {image} {error}; replace or remove it") from error


def _own_labels(source: data.Source, ids: Sequence[str]) -> Tensor:
    labels = source.labels()
    if labels is None:
        raise ImagesError(
            f"evaluation.labels is true, but {source.name} has no labels; name a CSV file with columns file,label, "
            "or set it to false"
        )
    return torch.tensor([labels[image] for image in ids])
