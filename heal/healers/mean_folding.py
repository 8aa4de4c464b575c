"""Mean folding: what the cut channels gave on average goes into the bias of the layer that read them.

Source: VBP (arXiv 2507.12988), where it is part of the cut. As a healer it also serves cuts that fold nothing, and
weights that were trained since: the bias is set so that the consumer's mean output is the dense one,

    b' = b + W mean - W' mean[S]

with the dense weights W, the present ones W' and the dense means. Twice is as good as once. Behind a convolution of
several places with zero padding it is exact but for the border, behind a stride but for what is not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.channels import consumed, through
from heal.errors import MethodError
from heal.families.lookup import cuttable_or_raise
from heal.healers.reporting import reported
from heal.images import Images
from heal.masking import write
from heal.method import HealContext, HealingReport
from heal.pruned import kept
from heal.values import ChannelCut


@dataclass(frozen=True)
class MeanFolding:
    """It has no params."""

    unit: ClassVar[str] = "neurons"

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics it reads."""
        return frozenset({"moments"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Write the consumers' biases; one that has none gets one."""
        return reported(self, student, teacher, images, lambda: _fold(student, teacher, context), context.pruned)


def _fold(student: nn.Module, teacher: nn.Module, context: HealContext) -> None:
    if not isinstance(context.pruned, ChannelCut):
        raise MethodError("mean_folding repairs what a cut left; the pruner gave a mask: heal it by bias_correction")
    groups, rows = cuttable_or_raise(teacher).cuttable, kept(teacher, context.pruned, "producers")
    for name, keep in context.pruned.keep.items():
        for consumer in groups[name].consumers:
            dense, module = teacher.get_submodule(consumer), student.get_submodule(consumer)
            mean = context.statistics[f"{consumer}.input"].mean
            bias = through(dense, mean)
            if dense.bias is not None:
                bias = bias + dense.get_parameter("bias").detach().double().cpu()
            stay = consumed(teacher, groups[name], keep)
            new = bias[rows.get(consumer, slice(None))] - through(module, mean[stay])
            write(student, {f"{consumer}.bias": new})
