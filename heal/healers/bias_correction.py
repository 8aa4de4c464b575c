"""Fast bias correction: every pruned layer's mean output becomes the dense one's.

Source: POT (arXiv 2104.15023), github.com/openvinotoolkit/openvino, fast bias correction. The pruned layer is
run, without its bias, on a constant image that holds the dense mean of every input channel:

    b_c = mean_c(dense output) - mean_c(pruned layer on the constant image)

The layers are independent: all statistics are the dense network's. POT fuses BatchNorm first, so that every
layer has a bias; here the shift goes into the running mean of the BatchNorm that follows, which is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heal.errors import MethodError
from heal.healers.matching import BATCH, shift
from heal.healers.reporting import reported
from heal.images import Images, first
from heal.method import HealContext, HealingReport
from heal.statistics import capture
from heal.values import Mask
from heal.wiring import trace


@dataclass(frozen=True)
class BiasCorrection:
    """images: how many of the calibration images are measured, >= 1; 256."""

    unit: ClassVar[str] = "weights"
    images: int = 256

    def __post_init__(self) -> None:
        if self.images < 1:
            raise MethodError(f"bias_correction.images = {self.images} must be at least 1")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it measures the dense network itself."""
        return frozenset()

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Shift the outputs of the student's masked layers in place."""
        return reported(self, student, teacher, images, lambda: self._repair(student, teacher, images, context))

    def _repair(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> None:
        assert isinstance(context.pruned, Mask)
        batches = first(images, self.images, BATCH)
        wiring = trace(teacher, context.pruned.keep, batches[0][:1])
        taps = {f"{layer}.{side}": False for layer in wiring.order for side in ("input", "output")}
        dense = capture(teacher, batches, taps, BATCH, context.report)
        for layer in wiring.order:
            module = student.get_submodule(layer)
            answer = _mean_answer(module, dense[f"{layer}.input"].mean, wiring.input_size.get(layer))
            bias = 0 if module.bias is None else module.get_parameter("bias").detach().double().cpu()
            shift(student, layer, dense[f"{layer}.output"].mean - answer - bias, wiring)


def _mean_answer(layer: nn.Module, means: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Mean output [out] of the layer without its bias, on an image whose channels are constant."""
    weight = layer.get_parameter("weight").detach()
    channels = means.to(weight)
    with torch.no_grad():
        image = channels.unsqueeze(0) if size is None else channels.view(1, -1, 1, 1).expand(-1, -1, *size)
        answer: Tensor = layer(image)
        answer = answer if layer.bias is None else answer - _as_output(layer.get_parameter("bias"), answer)
    return (answer if size is None else answer.mean((-2, -1)))[0].double().cpu()


def _as_output(bias: Tensor, answer: Tensor) -> Tensor:
    return bias.view(-1, 1, 1) if answer.ndim == 4 else bias
