"""Weight statistic correction: every filter gets the standard deviation and the mean of its dense weights back.

Source: POT (arXiv 2104.15023), github.com/openvinotoolkit/openvino, magnitude sparsity. Per output channel, over
all weights of the filter with the zeros counted: a = std(W) / (std(W mask) + 1e-9), shift = mean(W) -
mean(a W mask), W <- mask (a W + shift). As the mask is put on again, the mean comes back in part only.
No image is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heal.healers.reporting import reported
from heal.images import Images
from heal.method import HealContext, HealingReport
from heal.values import Mask


@dataclass(frozen=True)
class WeightStatisticCorrection:
    """It has no params."""

    unit: ClassVar[str] = "weights"

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Rescale and shift what is left of every masked layer."""

        def repair() -> None:
            assert isinstance(context.pruned, Mask)
            for layer, keep in context.pruned.keep.items():
                weight = student.get_submodule(layer).get_parameter("weight")
                with torch.no_grad():
                    dense = teacher.get_submodule(layer).get_parameter("weight")
                    weight.copy_(corrected(dense.to(weight), weight, keep.to(weight.device)))

        return reported(self, student, teacher, images, repair)


def corrected(dense: Tensor, pruned: Tensor, keep: Tensor) -> Tensor:
    """The corrected weight; all three [out, ...]."""
    over = tuple(range(1, dense.ndim))

    def deviation(x: Tensor) -> Tensor:
        return x.std(dim=over, correction=0, keepdim=True)

    scaled = pruned * (deviation(dense) / (deviation(pruned) + 1e-9))
    offset = dense.mean(dim=over, keepdim=True) - scaled.mean(dim=over, keepdim=True)
    return (scaled + offset) * keep
