"""Random crops and flips of normalised images, every draw from a generator that is given."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image [n, c, h, w] cut at random, resized to [h, w] (bilinear, antialiased), half of them mirrored.

    A crop has 0.08 to 1 of the area and a ratio of sides of 3/4 to 4/3, the latter uniform in its
    logarithm, as torchvision's RandomResizedCrop draws it. On any device the generator, which is the
    CPU's, gives the same crops.
    """
    size = (images.shape[-2], images.shape[-1])
    crops = [_cut(image, draw_box(*size, generator)) for image in images]
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    flipped = [crop.flip(-1) if mirror else crop for crop, mirror in zip(crops, mirrored.tolist(), strict=True)]
    return torch.cat([_resized(crop, size) for crop in flipped])


def draw_box(height: int, width: int, generator: torch.Generator) -> Box:
    """A random part of an image of that size; the largest middle one of a legal ratio when ten draws do not fit."""
    for _ in range(ATTEMPTS):
        area = height * width * _uniform(*SCALE, generator)
        ratio = math.exp(_uniform(math.log(RATIO[0]), math.log(RATIO[1]), generator))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return _below(height - high + 1, generator), _below(width - wide + 1, generator), high, wide
    high, wide = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - high) // 2, (width - wide) // 2, high, wide


def _cut(image: Tensor, box: Box) -> Tensor:
    top, left, height, width = box
    return image[None, :, top : top + height, left : left + width]


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))
