"""What the benchmarks on ImageNet share: 1 000 images for calibration, 1 397 of three sources for the test, a loop."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.cross import Cross, Images, Methods, options, table_of, with_weights
from heal.compat import timm

SUBSETS = ("val1000", "val100", "nips17")
SHORT, SIZE = 256, 224


def measure(
    about: str, path: Path, nets: Sequence[str], sparsities: Sequence[float], methods: Methods, repairs: Sequence[str]
) -> None:
    """Ask the command line what to run of these networks, and run the points that the table at `path` lacks."""
    asked = options(about.partition("\n")[0], nets, sparsities, methods, repairs).parse_args()
    torch.set_num_threads(asked.threads)
    table = table_of(path, methods.allocations, methods.repairs, SUBSETS)
    for net in asked.net:
        dense = dense_of(net, asked.data)
        images = read(asked.data, dense.pretrained_cfg)  # type: ignore[arg-type]
        for seed in asked.seeds:
            Cross(net, dense, images, seed, methods).run(table, asked)


def dense_of(net: str, data: Path) -> nn.Module:
    """A timm network with its weights from the data."""
    return with_weights(timm.create_model(net), data / "weights" / f"{net}.safetensors")


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
