"""Giving a norm's output the dense mean and standard deviation of each channel, by its own weight and bias.

With r the ratio of standard deviations, dense over pruned: weight <- r weight, bias <- r (bias - mean_p) + mean_d. That
is exact for norms that are weight * x_hat + bias. A BatchNorm treats every channel alone, so it is measured at its
input, and an activation inside it (timm's BatchNormAct2d) does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from heal.families.discovery import is_batch_norm, is_layer_scale
from heal.families.lookup import describe
from heal.healers.matching import in_order, variance
from heal.method import HealContext
from heal.modes import evaluating, listening
from heal.values import LayerStats


def match_outputs(
    student: nn.Module, teacher: nn.Module, images: list[Tensor], norms: Sequence[str], context: HealContext, name: str
) -> None:
    """Match the student's norms, and LayerScales in variance alone, in the order given: that of the forward pass."""

    def correct(tap: str, dense: LayerStats, pruned: LayerStats) -> None:
        norm = tap.rpartition(".")[0]
        _match(
            student.get_submodule(norm),
            *_output(teacher.get_submodule(norm), dense),
            *_output(student.get_submodule(norm), pruned),
        )

    in_order(student, teacher, images, [_tap(teacher, norm) for norm in norms], correct, context, name)


def are_affine(model: nn.Module, image: Tensor) -> dict[str, bool]:
    """Of every norm that is called, whether it is weight * x_hat + bias; a BatchNorm is, up to its activation."""
    seen: dict[str, Tensor] = {}
    norms = {name: model.get_submodule(name) for name in describe(model).norms}
    listeners = {f"{name}.input": partial(seen.__setitem__, name) for name in norms}
    with evaluating(model), torch.no_grad():
        with listening(model, listeners):
            model(image.to(next(model.parameters()).device))
        return {name: _is_known(norms[name]) or _is_affine(norms[name], x) for name, x in seen.items()}


def _tap(model: nn.Module, name: str) -> str:
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


def _is_affine(norm: nn.Module, x: Tensor) -> bool:
    """Whether -2 times its weight and bias give -2 times the answer: nothing is added, and no activation follows."""
    own = dict(norm.named_parameters(recurse=False))
    once, other = (functional_call(norm, {name: k * value for name, value in own.items()}, (x,)) for k in (1, -2))
    return torch.allclose(other, -2 * once, rtol=1e-4, atol=1e-4 * float(once.abs().max()))
