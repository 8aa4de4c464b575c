"""The ImageNet images of the benchmarks: 1 000 for calibration, 1 397 of three sources for the test."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor

from benchmarks.cross import Images

SUBSETS = ("val1000", "val100", "nips17")
SHORT, SIZE = 256, 224


def read(data: Path, preprocessing: dict[str, tuple[float, ...]]) -> Images:
    """All of them, normalised as the network takes them (its mean and std)."""
    with (data / "imagenet" / "evaluation_labels.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    mean, std = (torch.tensor(preprocessing[name]).view(3, 1, 1) for name in ("mean", "std"))
    calibration = sorted((data / "imagenet" / "calibration").iterdir())
    evaluation = [data / "imagenet" / "evaluation" / row["file"] for row in table]
    return Images(
        views={"plain": torch.stack([(_pixels(path) - mean) / std for path in calibration])},
        test=torch.stack([(_pixels(path) - mean) / std for path in evaluation]),
        labels=torch.tensor([int(row["class_index"]) for row in table]),
        subsets={name: torch.tensor([row["subset"] == name for row in table]) for name in SUBSETS},
    )


def _pixels(path: Path) -> Tensor:
    """The centre [3, 224, 224] of the image, its short side 256, in [0, 1]."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if min(image.size) != SHORT:
        scale = SHORT / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - SIZE) // 2 for side in image.size)
    centre = numpy.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
    return torch.from_numpy(centre.copy()).permute(2, 0, 1).float() / 255
