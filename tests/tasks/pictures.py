"""Small image files, folders and tables for the tests of sources, calibration and evaluation."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def picture(seed: int, width: int = 12, height: int = 10, form: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded image of noise that differs with the seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(encoded, form)
    return encoded.getvalue()


def folder(root: Path, names: list[str]) -> Path:
    """Files of these names, each another picture."""
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed))
    return root


def table(path: Path, count: int, columns: Mapping[str, list[Any]] | None = None, first: int = 0) -> Path:
    """A parquet file of `count` pictures in row groups of four, with further columns."""
    images = [picture(first + number) for number in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, **(columns or {})}), path, row_group_size=4)
    return path
