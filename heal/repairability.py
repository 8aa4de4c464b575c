"""Relative repairability: the share of a layer's damage that a channelwise repair cannot remove.

Source: "Relative Repairability" (arXiv 2605.25508), of which the abstract alone could be read: per layer,
from unlabeled images, the distortion left after channelwise variance matching over the distortion that
pruning this layer makes. The formulas are ours: mean squared error of the layer's output, each channel c
weighted by what the following BatchNorm makes of it, a_c = gain_c^2 / (running_var_c + eps),

    RR(d) = sum_c a_c E(repaired_c - Z_c)^2 / sum_c a_c E(pruned_c - Z_c)^2

with the layer masked by magnitude to density d and its inputs dense. The repair is fitted on one half of
the images and measured on the other, both ways, averaged. RR above 1 is legal and never clipped: matching
the variance of a channel that lost its direction makes it worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from heal.patch_moments import HALVES
from heal.values import LayerStats, Statistics

Variant = Literal["rr", "rr_asr", "rr_nomean", "rr_ls"]
VARIANTS: tuple[Variant, ...] = ("rr", "rr_asr", "rr_nomean", "rr_ls")

EPS = 1e-30
SILENT = 1e-8
"""A channel whose variance is below this share of the layer's mean says nothing and is left out."""

DEAD = 1e-5
"""A channel that keeps less than this share of its variance is dead: no repair would multiply it by 300, and
products in float32 do not tell such a share from none."""


@dataclass(frozen=True)
class Outputs:
    """Moments over images and positions of a layer's dense and masked output, each [channels], float64.

    Without the bias, which cancels. covariance: of the two.
    """

    mean: Tensor
    variance: Tensor
    masked_mean: Tensor
    masked_variance: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Damage:
    """Weighted sums over channels: raw (with the mean), raw_nomean, repaired by each variant, and the energy."""

    raw: float
    raw_nomean: float
    repaired: Mapping[Variant, float]
    energy: float

    def ratio(self, variant: Variant) -> float:
        """RR: what stays over what was done."""
        return self.repaired[variant] / ((self.raw_nomean if variant == "rr_nomean" else self.raw) + EPS)


UNDAMAGED = Damage(0.0, 0.0, dict.fromkeys(VARIANTS, 0.0), 0.0)
"""Of a layer that is never called."""


class Layer:
    """A layer ready to be masked at any density: its weights in order, and what does not depend on the mask.

    weights [channels]: the a_c. statistics: the halves' patch moments of the layer of this name.
    """

    def __init__(self, module: nn.Module, name: str, statistics: Statistics, weights: Tensor) -> None:
        self.weight = module.get_parameter("weight").detach().double().cpu()
        self.order = self.weight.abs().flatten().argsort(descending=True, stable=True)
        self.halves = [_Half(self.weight, statistics[f"{name}.patches/{half}"]) for half in HALVES]
        self.weights = weights

    def damage(self, density: float) -> Damage:
        """Of masking this layer alone to `density` by magnitude; of equal weights the earlier stays."""
        keep = torch.zeros(self.weight.numel(), dtype=torch.float64)
        keep[self.order[: round(density * len(keep))]] = 1
        masked = self.weight * keep.reshape(self.weight.shape)
        first, second = (half.outputs(masked) for half in self.halves)
        one, other = _measured(first, second, self.weights), _measured(second, first, self.weights)
        return Damage(
            raw=(one.raw + other.raw) / 2,
            raw_nomean=(one.raw_nomean + other.raw_nomean) / 2,
            repaired={variant: (one.repaired[variant] + other.repaired[variant]) / 2 for variant in VARIANTS},
            energy=(one.energy + other.energy) / 2,
        )


class _Half:
    """The patch moments of one half of the images, and the dense output's moments by them."""

    def __init__(self, weight: Tensor, stats: LayerStats) -> None:
        assert stats.comoment is not None
        self.covariance = stats.comoment / stats.count
        groups, width = self.covariance.shape[0], self.covariance.shape[-1]
        self.shape = (groups, -1, width)
        self.mean = stats.mean.reshape(groups, width, 1)
        dense = weight.reshape(self.shape)
        self.through = dense @ self.covariance
        self.dense_mean = (dense @ self.mean).flatten()
        self.dense_variance = (self.through * dense).sum(-1).flatten().clamp(min=0)

    def outputs(self, masked: Tensor) -> Outputs:
        pruned = masked.reshape(self.shape)
        return Outputs(
            mean=self.dense_mean,
            variance=self.dense_variance,
            masked_mean=(pruned @ self.mean).flatten(),
            masked_variance=((pruned @ self.covariance) * pruned).sum(-1).flatten().clamp(min=0),
            covariance=(self.through * pruned).sum(-1).flatten(),
        )


def channel_weights(norm: nn.Module | None, channels: int) -> Tensor:
    """a_c [channels], float64: the squared factor by which the BatchNorm passes a channel on; 1 without one."""
    if norm is None:
        return torch.ones(channels, dtype=torch.float64)
    state = {name: tensor.detach().double().cpu() for name, tensor in norm.state_dict().items()}
    eps = float(norm.eps)  # type: ignore[arg-type]
    gain = state.get("weight", torch.ones(channels, dtype=torch.float64))
    factor: Tensor = gain.square() / (state["running_var"] + eps)
    return factor


def _measured(fit: Outputs, held_out: Outputs, weights: Tensor) -> Damage:
    """The repair fitted on one half, the damage measured on the other."""
    alive = held_out.variance >= SILENT * held_out.variance.mean()
    a = torch.where(alive, weights, 0.0)

    def weighted(errors: Tensor) -> float:
        return float((a * errors).sum())

    shift = held_out.masked_mean - held_out.mean
    nomean = held_out.masked_variance + held_out.variance - 2 * held_out.covariance
    repaired = {variant: weighted(_error(gain, fit, held_out)) for variant, gain in gains(fit).items()}
    return Damage(
        raw=weighted(nomean + shift.square()),
        raw_nomean=weighted(nomean),
        repaired=repaired,
        energy=weighted(held_out.variance),
    )


def gains(fit: Outputs) -> dict[Variant, Tensor]:
    """gamma [channels] of every variant's repair; a channel that is dead after masking keeps 1."""
    dead = fit.masked_variance <= DEAD * fit.variance
    safe = torch.where(dead, 1.0, fit.masked_variance)
    matching = torch.where(dead, 1.0, (fit.variance / safe).sqrt())
    prior = fit.masked_variance.quantile(0.5)
    strength = fit.masked_variance / (fit.masked_variance + prior) if prior > 0 else torch.zeros_like(safe)
    return {
        "rr": matching,
        "rr_asr": strength * matching + (1 - strength),
        "rr_nomean": matching,
        "rr_ls": torch.where(dead, 1.0, fit.covariance / safe),
    }


def _error(gain: Tensor, fit: Outputs, held_out: Outputs) -> Tensor:
    """E(gamma * masked + beta - dense)^2 on the held-out half, beta from the fitted half."""
    offset = fit.mean - gain * fit.masked_mean
    shift = gain * held_out.masked_mean + offset - held_out.mean
    return (
        gain.square() * held_out.masked_variance - 2 * gain * held_out.covariance + held_out.variance + shift.square()
    )
