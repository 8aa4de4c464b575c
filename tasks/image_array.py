"""Images as an array on disk: decoded once, fetched by index, normalised on the way out.

Apart from images.py, so that stages which only read a calibration artifact do not depend on where
images come from.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from heal.errors import ImagesError
from tasks import artifacts
from tasks.preprocessing import Preprocessing, parse

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
