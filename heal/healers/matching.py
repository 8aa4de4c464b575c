"""Matching the moments of the student's layers to the teacher's, one layer after another.

A layer is measured after all layers before it were repaired, on the same images as the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from heal.method import HealContext
from heal.statistics import capture
from heal.values import LayerStats
from heal.wiring import Wiring

Correct = Callable[[str, LayerStats, LayerStats], None]
"""(tap, the teacher's moments, the student's moments); repairs the student in place."""

BATCH = 64


def in_order(
    student: nn.Module,
    teacher: nn.Module,
    images: list[Tensor],
    taps: Iterable[str],
    correct: Correct,
    context: HealContext,
    name: str,
) -> None:
    """Measure and correct every tap, in the order given, which is that of the forward pass."""
    taps = list(taps)
    wanted = capture(teacher, images, dict.fromkeys(taps, False), BATCH)
    for done, tap in enumerate(taps, start=1):
        found = capture(student, images, {tap: False}, BATCH, stop_early=True)
        if found[tap].count < wanted[tap].count:  # the tap lies behind where the pass was left, too
            found = capture(student, images, {tap: False}, BATCH)
        correct(tap, wanted[tap], found[tap])
        context.report(name, done, len(taps))


def variance(stats: LayerStats) -> Tensor:
    """Per channel [d], divisor N, float64."""
    return stats.m2 / stats.count


def scale(layer: nn.Module, factor: Tensor) -> None:
    """Multiply a layer's output by `factor` [out]: its filters and its bias."""
    weight = layer.get_parameter("weight")
    factor = factor.to(weight)
    with torch.no_grad():
        weight.mul_(factor.view(-1, *[1] * (weight.ndim - 1)))
        if layer.bias is not None:
            layer.get_parameter("bias").mul_(factor)


def shift(model: nn.Module, layer: str, offset: Tensor, wiring: Wiring) -> None:
    """Add `offset` [out] to a layer's output: in its bias, or exactly the same in the BatchNorm that takes it.

    A layer with neither gets a bias.
    """
    module = model.get_submodule(layer)
    weight = module.get_parameter("weight")
    offset = offset.to(weight)
    with torch.no_grad():
        if module.bias is not None:
            module.get_parameter("bias").add_(offset)
        elif layer in wiring.norm_after:
            norm = model.get_submodule(wiring.norm_after[layer])
            norm.get_buffer("running_mean").sub_(offset)
        else:
            module.bias = nn.Parameter(offset.clone(), weight.requires_grad)


def shifted(student: nn.Module, teacher: nn.Module, norm: str) -> Tensor:
    """By how much a BatchNorm's running mean is less than the dense one [d]: what that adds to its input."""
    ours, theirs = (model.get_submodule(norm).get_buffer("running_mean") for model in (student, teacher))
    return theirs - ours
