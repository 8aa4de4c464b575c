"""Statistics correction: the output of every BatchNorm, LayerNorm and GroupNorm gets the dense mean and deviation.

Source: the last step of OBC (Frantar and Alistarh 2022, github.com/IST-DASLab/OBC, postproc.py). Norm after norm, in
the order of the forward pass, per channel over images and positions:

    y <- (y - mean_p) std_d / (std_p + 1e-9) + mean_d

The source leaves hooks that do so; here it is folded into the norm's weight and bias, which is the same, and nothing
stays. Deviations: a channel that is dead in the pruned network keeps its weight, where the source divides by 1e-9
(what it answers is the dense mean in both); the source measures 1024 images in one batch, and knows no GroupNorm. A
norm without a bias takes the deviation alone. Norms without weight, and those that do more than weight * x_hat + bias,
are left alone and named in the report.

`variance_matching` is the same step on the same norms, and goes on to the LayerScales at the ends of branches, which
are ours; this is the published method, for comparisons with it. In a network without LayerScale they are one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.errors import MethodError
from heal.healers.matching import BATCH
from heal.healers.norm_outputs import are_affine, match_outputs
from heal.healers.reporting import reported
from heal.images import Images, first
from heal.method import HealContext, HealingReport, name_of
from heal.wiring import trace


@dataclass(frozen=True)
class StatisticsCorrection:
    """images: how many of the calibration images are measured, >= 1; 256 (ours). They are walked once a norm."""

    unit: ClassVar[str] = "any"
    images: int = 256

    def __post_init__(self) -> None:
        if self.images < 1:
            raise MethodError(f"statistics_correction.images = {self.images} must be at least 1")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it measures both networks itself."""
        return frozenset({"norms"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Rewrite weight and bias of the student's norms in place."""
        return reported(self, student, teacher, images, lambda: self._repair(student, teacher, images, context))

    def _repair(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> tuple[str, ...]:
        batches = first(images, self.images, BATCH)
        norms = are_affine(teacher, batches[0][:1])
        order = trace(teacher, [name for name, is_affine in norms.items() if is_affine], batches[0][:1]).order
        match_outputs(student, teacher, batches, order, context, name_of(self))
        more = (name for name, is_affine in norms.items() if not is_affine)
        return (
            *_left("norms without weight", _without_weight(teacher)),
            *_left("norms that do more than weight * x_hat + bias", more),
        )


def _without_weight(model: nn.Module) -> Iterable[str]:
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and module._parameters.get("weight", module) is None:
            yield name


def _left(what: str, names: Iterable[str]) -> tuple[str, ...]:
    names = list(names)
    return (f"{what} were left alone: {', '.join(names)}",) if names else ()
