"""Variance matching: at the output of every norm, mean and variance of each channel become the dense ones.

Source: the statistics correction of OBC (Frantar and Alistarh 2022, github.com/IST-DASLab/OBC), which hooks
the outputs of BatchNorm and LayerNorm while it measures. Here it is folded into the norm's own weight and
bias (r the ratio of standard deviations): weight <- r weight, bias <- r (bias - mean_p) + mean_d. Where a
branch ends in a LayerScale module, that is matched too, in variance alone, as it has no bias; ConvNeXt keeps that
scale as a parameter of the block, where it is left alone. Norms that do more than weight * x_hat + bias are left
alone: those with an activation inside, and GlobalResponseNorm, which adds its input. No weight matrix changes, so
masks hold; no hook stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.errors import MethodError
from heal.families.discovery import is_layer_scale
from heal.healers.matching import BATCH
from heal.healers.norm_outputs import are_affine, match_outputs
from heal.healers.reporting import reported
from heal.images import Images, first
from heal.method import HealContext, HealingReport, name_of
from heal.wiring import trace


@dataclass(frozen=True)
class VarianceMatching:
    """images: how many of the calibration images are measured, >= 1; 256. They are walked once a norm."""

    unit: ClassVar[str] = "any"
    images: int = 256

    def __post_init__(self) -> None:
        if self.images < 1:
            raise MethodError(f"variance_matching.images = {self.images} must be at least 1")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it measures both networks itself."""
        return frozenset({"norms"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Rewrite the affine parameters of the student's norms in place."""
        return reported(self, student, teacher, images, lambda: self._repair(student, teacher, images, context))

    def _repair(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> str | None:
        batches = first(images, self.images, BATCH)
        scales = [name for name, module in teacher.named_modules() if is_layer_scale(module)]
        norms = are_affine(teacher, batches[0][:1])
        sites = [name for name, is_affine in norms.items() if is_affine]
        order = trace(teacher, [*sites, *scales], batches[0][:1]).order
        match_outputs(student, teacher, batches, order, context, name_of(self))
        left = len(norms) - len(sites)
        return f"{left} norms that do more than weight * x_hat + bias were left alone" if left else None
