"""Layer-wise variance matching (LW): one factor a layer, so that its mean variance is the dense one's.

Source: the baseline of ASR (arXiv 2605.21426), there called "in the style of REFLOW"; REFLOW itself is
described as a recalibration of BatchNorm statistics, so this is not called by its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heal.errors import MethodError
from heal.healers.matching import BATCH
from heal.healers.reporting import reported
from heal.healers.signal_resuscitation import rescale
from heal.images import Images, first
from heal.method import HealContext, HealingReport, name_of


@dataclass(frozen=True)
class LayerwiseVariance:
    """images: how many of the calibration images are measured, >= 1; 64."""

    unit: ClassVar[str] = "weights"
    images: int = 64

    def __post_init__(self) -> None:
        if self.images < 1:
            raise MethodError(f"layerwise_variance.images = {self.images} must be at least 1")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it measures both networks itself."""
        return frozenset({"batch_norms"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Rescale the student's layers in place."""

        def repair() -> None:
            rescale(student, teacher, first(images, self.images, BATCH), gain, False, context, name_of(self))

        return reported(self, student, teacher, images, repair)


def gain(dense: Tensor, pruned: Tensor) -> Tensor:
    """The same factor for every channel [d]: sqrt(mean v_d / mean v_p); 1 where nothing varies any more."""
    if not pruned.mean() > 0:
        return torch.ones_like(pruned)
    return (dense.mean() / pruned.mean()).sqrt().expand_as(pruned)
