"""BatchNorm recalibration: running statistics measured anew on the pruned network. Nothing else changes.

The baseline that every repair must beat, always the first row of a table. `cumulative` is the honest
one. `ema_reset` is what published rows use (ASR, arXiv 2605.21426; UniPTS' search): after few batches
the statistics still hold a share of the reset values, 0.9 ** batches, which flatters whatever rescales
weights before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal import batchnorm
from heal.batchnorm import Mode
from heal.errors import MethodError
from heal.healers.reporting import reported
from heal.images import Images
from heal.method import HealContext, HealingReport
from heal.naming import refuse_unknown


@dataclass(frozen=True)
class BatchnormRecalibration:
    """mode: "cumulative", "ema_reset" or "exact". batch_size: images, >= 2; 128.

    batches: at most so many, None for all (`ema_reset` goes around again until it has them).
    momentum: of `ema_reset`, in (0, 1]; 0.1.
    """

    unit: ClassVar[str] = "any"
    mode: Mode = "cumulative"
    batch_size: int = 128
    batches: int | None = None
    momentum: float = 0.1

    def __post_init__(self) -> None:
        refuse_unknown("batchnorm_recalibration.mode", self.mode, ("cumulative", "ema_reset", "exact"))
        if self.batch_size < 2:
            raise MethodError(f"batchnorm_recalibration.batch_size = {self.batch_size} must be at least 2")
        if self.batches is not None and self.batches < 1:
            raise MethodError(f"batchnorm_recalibration.batches = {self.batches} must be at least 1, or null for all")
        if not 0 < self.momentum <= 1:
            raise MethodError(f"batchnorm_recalibration.momentum = {self.momentum:g} is not in (0, 1]")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it runs the student."""
        return frozenset({"batch_norms"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Write the student's running means and variances."""

        def repair() -> str:
            args = (self.mode, self.batch_size, self.batches, self.momentum)
            used = batchnorm.reestimate(student, images, *args, context.report)
            return f"{used} images in batches of {self.batch_size}"

        return reported(self, student, teacher, images, repair, context.pruned)
