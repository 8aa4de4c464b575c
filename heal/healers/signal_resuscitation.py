"""ASR, Adaptive Signal Resuscitation: give every channel its dense variance back, the less the weaker it is.

Source: arXiv 2605.21426, Algorithm 1. Per convolution, the first excepted, on its very output, before any norm
(dense v_d, pruned v_p, both over images and positions):

    g = sqrt(v_d / v_p)    s = v_p / (v_p + median(v_p))    gamma = s g + (1 - s)
    W <- gamma W           b <- gamma b + E[Y_d] - gamma E[Y_p]

Deviations: a bias is scaled with its filter, so that the mean comes out right (the paper's networks have
none); without a bias the shift goes into the running mean of the BatchNorm that takes the output, which is
the same, and is left out where none does (DenseNet concatenates first); a layer half of whose channels are dead is
not rescaled (the paper leaves that open), but its mean is put right. A Linear that feeds a BatchNorm counts as a
convolution. Before a recalibration that forgets (`cumulative`, `exact`) this changes nothing wherever all that a
convolution feeds is BatchNorm, which divides it out again; a convolution that no BatchNorm follows, as in a
squeeze-and-excitation, keeps what it was given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from heal.errors import MethodError
from heal.families.parts import called
from heal.healers.matching import BATCH, in_order, scale, shift, variance
from heal.healers.reporting import reported
from heal.images import Images, first
from heal.method import HealContext, HealingReport, name_of
from heal.naming import refuse_unknown
from heal.values import LayerStats
from heal.wiring import trace

DEAD = 1e-12


@dataclass(frozen=True)
class SignalResuscitation:
    """images: how many of the calibration images are measured, >= 1; 64.

    shrinkage: "median" (the paper), or "none" for raw variance matching (its ablation). mean: correct
    the mean as well.
    """

    unit: ClassVar[str] = "weights"
    images: int = 64
    shrinkage: Literal["median", "none"] = "median"
    mean: bool = True

    def __post_init__(self) -> None:
        refuse_unknown("signal_resuscitation.shrinkage", self.shrinkage, ("median", "none"))
        if self.images < 1:
            raise MethodError(f"signal_resuscitation.images = {self.images} must be at least 1")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it measures both networks itself."""
        return frozenset({"batch_norms"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Rescale the student's filters in place."""
        return reported(self, student, teacher, images, lambda: self._repair(student, teacher, images, context))

    def _repair(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> None:
        rescale(student, teacher, first(images, self.images, BATCH), self.gains, self.mean, context, name_of(self))

    def gains(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """gamma [d] from the variances [d] of the dense and the pruned output."""
        raw = (dense / (pruned + 1e-12 * dense.max()).clamp_min(1e-300)).sqrt()
        if self.shrinkage == "none":
            return torch.where(pruned > 0, raw, 1.0)
        prior = pruned.quantile(0.5)
        if prior < DEAD:
            return torch.ones_like(pruned)
        strength = pruned / (pruned + prior)
        return strength * raw + (1 - strength)


def rescale(
    student: nn.Module,
    teacher: nn.Module,
    images: list[Tensor],
    gains: Callable[[Tensor, Tensor], Tensor],
    mean: bool,
    context: HealContext,
    name: str,
) -> None:
    """Multiply every convolution, but the first layer, by its gains; correct the mean where that adds no bias."""
    layers = [layer for layer, _ in called(teacher)]
    wiring = trace(teacher, layers, images[0][:1])
    taps = [
        f"{layer}.output"
        for layer in wiring.order[1:]
        if layer in wiring.norm_after or isinstance(teacher.get_submodule(layer), nn.Conv2d)
    ]

    def correct(tap: str, dense: LayerStats, pruned: LayerStats) -> None:
        layer = tap.removesuffix(".output")
        gamma = gains(variance(dense), variance(pruned))
        module = student.get_submodule(layer)
        scale(module, gamma)
        if mean and (module.bias is not None or layer in wiring.norm_after):
            shift(student, layer, dense.mean - gamma * pruned.mean, wiring)

    in_order(student, teacher, images, taps, correct, context, name)
