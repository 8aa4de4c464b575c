"""Variance matching: at the output of every norm, mean and variance of each channel become the dense ones.

Source: the statistics correction of OBC (Frantar and Alistarh 2022, github.com/IST-DASLab/OBC), which hooks
the outputs of BatchNorm and LayerNorm while it measures. Here it is folded into the norm's own weight and
bias (r the ratio of standard deviations): weight <- r weight, bias <- r (bias - mean_p) + mean_d. Where a
branch ends in a LayerScale module, that is matched too, in variance alone, as it has no bias; ConvNeXt keeps that
scale as a parameter of the block, where it is left alone. Norms that do more than weight * x_hat + bias are left
alone: those with an activation inside, other than timm's BatchNorms, which are matched before it, and
GlobalResponseNorm, which adds its input. No weight matrix changes, so masks hold; no hook stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from heal.errors import MethodError
from heal.families.discovery import is_batch_norm, is_layer_scale
from heal.families.lookup import describe
from heal.healers.matching import BATCH, in_order, variance
from heal.healers.reporting import reported
from heal.images import Images, first
from heal.method import HealContext, HealingReport, name_of
from heal.modes import evaluating, listening
from heal.pruned import kept
from heal.values import LayerStats
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
        repair = partial(self._repair, student, teacher, images, context)
        return reported(self, student, teacher, images, repair, context.pruned)

    def _repair(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> str | None:
        batches = first(images, self.images, BATCH)
        there = dict(student.named_modules())  # not all of the teacher's, where blocks were dropped
        scales = [name for name, module in teacher.named_modules() if is_layer_scale(module) and name in there]
        norms = {name: affine for name, affine in _affine(teacher, batches[0][:1]).items() if name in there}
        sites = [name for name, is_affine in norms.items() if is_affine]
        order = trace(teacher, [*sites, *scales], batches[0][:1]).order
        stays = kept(teacher, context.pruned, "followers")

        def correct(tap: str, dense: LayerStats, pruned: LayerStats) -> None:
            name = tap.rpartition(".")[0]
            stay = stays.get(name, slice(None))
            mean, deviation = _output(teacher.get_submodule(name), dense)
            module = student.get_submodule(name)
            _match(module, mean[stay], deviation[stay], *_output(module, pruned))

        in_order(student, teacher, batches, [_tap(teacher, name) for name in order], correct, context, name_of(self))
        left = len(norms) - len(sites)
        return f"{left} norms that do more than weight * x_hat + bias were left alone" if left else None


def _tap(model: nn.Module, name: str) -> str:
    """BatchNorm is measured before it, because timm's may hold an activation; it treats every channel alone."""
    return f"{name}.input" if _is_known(model.get_submodule(name)) else f"{name}.output"


def _is_known(norm: nn.Module) -> bool:
    """Whether its output is a function of its input's channel alone: a BatchNorm with running statistics."""
    return is_batch_norm(norm) and norm.running_mean is not None


def _output(module: nn.Module, stats: LayerStats) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [d], float64, of the norm's output before any activation."""
    mean, deviation = stats.mean, variance(stats).sqrt()
    if not _is_known(module):
        return mean, deviation
    buffers = {name: tensor.detach().double().cpu() for name, tensor in module.state_dict().items()}
    gain = buffers["weight"] / (buffers["running_var"] + module.eps).sqrt()
    return gain * (mean - buffers["running_mean"]) + buffers["bias"], gain.abs() * deviation


def _match(module: nn.Module, dense_mean: Tensor, dense_std: Tensor, mean: Tensor, std: Tensor) -> None:
    ratio = torch.where(std > 1e-9 * dense_std, dense_std / std, 1.0)
    gain = module.gamma if is_layer_scale(module) else module.weight
    assert isinstance(gain, Tensor)
    with torch.no_grad():
        gain.mul_(ratio.to(gain))
        bias = getattr(module, "bias", None)
        if bias is not None:
            bias.copy_((ratio * (bias.double().cpu() - mean) + dense_mean).to(bias))


def _affine(model: nn.Module, image: Tensor) -> dict[str, bool]:
    """Of every norm that is called, whether it is weight * x_hat + bias; a BatchNorm is, up to its activation."""
    seen: dict[str, Tensor] = {}
    norms = {name: model.get_submodule(name) for name in describe(model).norms}
    listeners = {f"{name}.input": partial(seen.__setitem__, name) for name in norms}
    with evaluating(model), torch.no_grad():
        with listening(model, listeners):
            model(image.to(next(model.parameters()).device))
        return {name: _is_known(norms[name]) or _is_affine(norms[name], x) for name, x in seen.items()}


def _is_affine(norm: nn.Module, x: Tensor) -> bool:
    """Whether -2 times its weight and bias give -2 times the answer: nothing is added, and no activation follows."""
    own = dict(norm.named_parameters(recurse=False))
    once, other = (functional_call(norm, {name: k * value for name, value in own.items()}, (x,)) for k in (1, -2))
    return torch.allclose(other, -2 * once, rtol=1e-4, atol=1e-4 * float(once.abs().max()))
