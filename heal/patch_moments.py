"""Second moments of a layer's patches, streamed, in two halves of the images.

With them every variance and covariance of a layer's output, dense or masked, is a quadratic form in its
weight: a whole grid of densities costs one pass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor, nn

from heal.errors import NumericalError
from heal.merging import merge
from heal.patch_correlation import Correlation, finished, is_correlated
from heal.patches import patches
from heal.values import LayerStats

HALVES = (0, 1)


class Sums(Protocol):
    """Sums over the patches of a layer's input; begun with the first batch."""

    def add(self, x: Tensor) -> None:
        """Take in inputs [n, ...]."""

    def moments(self) -> LayerStats:
        """mean and m2 [groups * d], comoment [groups, d, d], on the CPU."""


class PatchStream:
    """Moments of the patches of images with even (0) and odd (1) number.

    The images are the outermost part of a layer's first axis, which may hold several rows of each (Swin's windows).
    Where that cannot be, as the rows are no multiple of the images, they depend on no single image and count in both.
    Correlations are of one size of map, the first that came; what has another size is laid out in columns.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.layer = layer
        self.first = self.images = 0
        self.size: torch.Size | None = None
        self.halves: tuple[dict[type, Sums], dict[type, Sums]] = ({}, {})

    def begin(self, images: int) -> None:
        """A forward pass of so many images begins; the layer may be called several times in it."""
        self.first += self.images
        self.images = images

    def add(self, x: Tensor) -> None:
        """Take in the layer's input [rows, ...]."""
        self.size = self.size or x.shape[1:]
        kind = Correlation if is_correlated(self.layer) and x.shape[1:] == self.size else Columns
        for half, sums in enumerate(self.halves):
            chosen = self._rows(half, x).float()
            if len(chosen) == 0:
                continue
            if kind not in sums:
                sums[kind] = kind(self.layer, chosen)
            sums[kind].add(chosen)

    def results(self, tap: str) -> dict[str, LayerStats]:
        """By tap: "<layer>.patches/0" and "/1"; none of a layer that was never called.

        Raises NumericalError when a half saw no image.
        """
        if not any(self.halves):
            return {}
        if not all(self.halves):
            raise NumericalError(f"statistics: {tap} needs two images at least; {self.first + self.images} passed it")
        whole = self.first + self.images
        return {
            f"{tap}/{half}": replace(
                reduce(merge, (part.moments() for part in sums.values())), images=(whole + 1 - half) // 2
            )
            for half, sums in enumerate(self.halves)
        }

    def _rows(self, half: int, x: Tensor) -> Tensor:
        rows, rest = divmod(len(x), self.images)
        if rest:
            return x
        return x.reshape(self.images, rows, *x.shape[1:])[(half - self.first) % 2 :: 2].flatten(0, 1)


class Columns:
    """Any layer: its patches are laid out as columns.

    Products are float32 within an image, around a shift near the mean, and float64 beyond.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, x: Tensor) -> None:
        self.layer = layer
        first = patches(layer, x[:1])[0].float()
        groups, width, _ = first.shape
        self.shift = first.mean(-1, keepdim=True)
        self.count = 0
        self.sums = first.new_zeros(groups, width, dtype=torch.float64)
        self.products = first.new_zeros(groups, width, width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """One image at a time: columns are as many times larger than the image as the kernel has places."""
        for image in torch.split(x, 1):
            centred = patches(self.layer, image)[0] - self.shift
            self.sums += centred.sum(-1).double()
            self.products += torch.bmm(centred, centred.mT).double()
            self.count += centred.shape[-1]

    def moments(self) -> LayerStats:
        """Of all patches so far."""
        comoment = self.products - torch.einsum("gi,gj->gij", self.sums, self.sums) / self.count
        mean = self.shift[..., 0].double() + self.sums / self.count
        return finished(self.count, mean, comoment)
