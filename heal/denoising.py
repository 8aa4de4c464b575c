"""The part of a covariance that few images can tell from noise, by the law of Marchenko and Pastur.

Source: DVBP (arXiv 2608.17657). Of n independent rows of d equal and independent channels the eigenvalues of the
covariance fill sigma^2 (1 - sqrt(beta))^2 to sigma^2 (1 + sqrt(beta))^2, beta = d / n. sigma^2 is read from the median
eigenvalue; what lies above is signal. n counts images, not positions, which depend on each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heal.errors import NumericalError
from heal.values import LayerStats

GRID = 1 << 16
"""Steps of the integral; the median is then known to about 1e-8."""


def denoised(stats: LayerStats) -> Tensor:
    """The covariance [d, d] made of the eigenpairs that are signal. Raises NumericalError without a count of images."""
    if stats.images < 1:
        raise NumericalError("denoising: the statistics do not say of how many images they are; capture them anew")
    values, vectors = torch.linalg.eigh((stats.covariance + stats.covariance.T) / 2)
    beta = len(values) / stats.images
    positive = values[values > values[-1] * 1e-12]
    if not len(positive):
        return torch.zeros_like(stats.covariance)
    noise = float(_lower_median(positive)) / median(beta)
    kept = values > noise * (1 + math.sqrt(beta)) ** 2
    signal: Tensor = (vectors[:, kept] * values[kept]) @ vectors[:, kept].T
    return signal


def median(beta: float) -> float:
    """The median of the law for sigma = 1, beta > 0. Where there are more channels than images the share
    1 - 1 / beta of the eigenvalues is 0 and tells nothing: the median of the others then (ours; the source is silent).

    The density sqrt((upper - t)(t - lower)) / (2 pi beta t) is integrated over the angle that t goes through.
    """
    lower, upper = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    angle = (torch.arange(GRID, dtype=torch.float64) + 0.5) * (math.pi / GRID)
    t = (upper + lower) / 2 - (upper - lower) / 2 * torch.cos(angle)
    mass = torch.cumsum(((upper - lower) / 2 * torch.sin(angle)).square() / t, 0)
    return float(t[int(torch.searchsorted(mass, mass[-1] / 2))])


def _lower_median(ascending: Tensor) -> Tensor:
    return ascending[(len(ascending) - 1) // 2]
