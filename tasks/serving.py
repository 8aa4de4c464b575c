"""What a registered model says of itself to a server: an example, the shapes, the packages it needs."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from heal import bundle
from heal.errors import BundleError
from heal.evaluation import predict

PACKAGES = ("torch", "timm", "safetensors", "numpy")


def example(folder: Path) -> NDArray[np.float32]:
    """One image of noise [1, 3, height, width] in the bundle's input size: short in JSON, and nobody's data."""
    preprocessing = bundle.read(folder)["preprocessing"] or {}
    if "size" not in preprocessing:
        raise BundleError(f"{folder} does not say its input size (preprocessing.size); pass an input_example")
    height, width = preprocessing["size"]
    return np.random.default_rng(0).normal(size=(1, 3, height, width)).round(2).astype(np.float32)


def shapes(
    folder: Path, images: NDArray[np.float32], allow_adapters: Collection[str] = ()
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of images and logits, -1 for how many; found by running the bundle on `images`."""
    logits = predict(bundle.load(folder, allow_adapters), torch.from_numpy(images))
    return (-1, *images.shape[1:]), (-1, *logits.shape[1:])


def requirements() -> list[str]:
    """The installed versions, pinned, without their local part (+cpu), which package indexes do not have."""
    return [f"{package}=={metadata.version(package).partition('+')[0]}" for package in PACKAGES]


@contextmanager
def own_modules() -> Iterator[None]:
    """MLflow puts a model's copy of heal first on the path; this process goes on with its own, imported above."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before
