"""REPAIR for networks without BatchNorm: every layer's output gets the dense mean and standard deviation back.

Source: Jordan et al. (arXiv 2211.08403), github.com/KellerJordan/REPAIR, with the dense network's statistics
as the goal. There a BatchNorm is put behind every layer, measured and folded back; here the same fold is
computed directly, one layer after another: W <- a W, b <- a (b - mean_p) + mean_d, a = std_d / std_p.
Layers are the table's and whatever else is masked, such as a stem or classifier that an allocator included.
With BatchNorm in the network the method is its recalibration; see there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from heal.errors import MethodError
from heal.families.lookup import describe
from heal.healers.matching import BATCH, in_order, scale, shift, variance
from heal.healers.reporting import reported
from heal.images import Images, first
from heal.method import HealContext, HealingReport, name_of
from heal.values import LayerStats, Mask
from heal.wiring import trace


@dataclass(frozen=True)
class Repair:
    """images: how many of the calibration images are measured, >= 1; 256. They are walked once a layer."""

    unit: ClassVar[str] = "weights"
    images: int = 256

    def __post_init__(self) -> None:
        if self.images < 1:
            raise MethodError(f"repair.images = {self.images} must be at least 1")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it measures both networks itself."""
        return frozenset({"no_batch_norms"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Rescale and shift the student's layers in place."""
        return reported(self, student, teacher, images, lambda: self._repair(student, teacher, images, context))

    def _repair(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> None:
        batches = first(images, self.images, BATCH)
        assert isinstance(context.pruned, Mask)
        layers = dict.fromkeys((*describe(teacher).layers, *context.pruned.keep))
        wiring = trace(teacher, layers, batches[0][:1])

        def correct(tap: str, dense: LayerStats, pruned: LayerStats) -> None:
            layer = tap.removesuffix(".output")
            wanted, found = variance(dense).sqrt(), variance(pruned).sqrt()
            factor = torch.where(found > 1e-9 * wanted, wanted / found, 1.0)
            scale(student.get_submodule(layer), factor)
            shift(student, layer, dense.mean - factor * pruned.mean, wiring)

        in_order(
            student, teacher, batches, [f"{layer}.output" for layer in wiring.order], correct, context, name_of(self)
        )
