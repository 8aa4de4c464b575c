"""Tuning one masked layer, so that it answers as the dense layer does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heal.families.discovery import channel_axis
from heal.healers.layer_batches import Pair, Site
from heal.healers.matching import shift, shifted
from heal.healers.tuning_budgets import TuningBudget
from heal.mask_policies import Fixed
from heal.method import HealContext
from heal.training import Step, Training, fit
from heal.wiring import Wiring


@dataclass(frozen=True)
class Rates:
    """Learning rates of weights and of biases, both > 0."""

    weight: float
    bias: float


def tune(
    site: Site, keeps: Sequence[Tensor], wiring: Wiring, budget: TuningBudget, rates: Rates, context: HealContext
) -> list[tuple[float, ...]]:
    """Tune the student's layer in place, level after level; the losses of all steps, by level.

    keeps: which weights stay at each level, the student's own mask at the last. Weights that stay at an
    earlier level only begin with their dense values. A layer without a bias trains a shift in the BatchNorm
    that takes its output, where there is one; what earlier healers shifted there is where it begins.
    """
    layer = site.student.get_submodule(site.layer)
    weight, begins = layer.get_parameter("weight"), None
    trainable = {"weight": weight}
    if layer.bias is not None:
        trainable["bias"] = layer.get_parameter("bias")
    elif site.layer in wiring.norm_after:
        begins = shifted(site.student, site.teacher, wiring.norm_after[site.layer])
        trainable["bias"] = nn.Parameter(begins.clone())
    loss = _Loss(layer, None if begins is None else trainable["bias"], trainable, budget)
    schedule = budget.schedule(rates.weight, {"bias": rates.bias / rates.weight})
    losses = []
    _fill(weight, keeps[-1], site.teacher.get_parameter(f"{site.layer}.weight"))
    for level, keep in enumerate(keeps):
        masks = Fixed({"weight": keep.to(weight)})
        masks.settle(trainable)
        part = f"{site.layer}-{level}"
        training = Training(budget.name, budget.batches(site, level), loss, trainable, schedule, masks, part=part)
        losses.append(fit(layer, training, context))
    if begins is not None:
        shift(site.student, site.layer, trainable["bias"].detach() - begins, wiring)
    return losses


@dataclass(frozen=True)
class _Loss:
    """The error of the layer's answer; a coasting step has a gradient of zeros, so that Adam goes on by its moments."""

    layer: nn.Module
    shift: nn.Parameter | None
    trainable: Mapping[str, nn.Parameter]
    budget: TuningBudget

    def __call__(self, step: Step, pair: Pair) -> Tensor:
        entered, wanted = pair
        channels = channel_axis(self.layer)
        answer = self.layer(entered)
        if self.shift is not None:
            answer = answer + (self.shift.view(-1, 1, 1) if channels == 1 else self.shift)
        error = self.budget.error(answer, wanted, channels)
        if not self.budget.coasts(step, error):
            return error
        nothing = torch.stack([(0 * parameter).sum() for parameter in self.trainable.values()])
        return error.detach() + nothing.sum()


def _fill(weight: nn.Parameter, keep: Tensor, dense: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(torch.where(keep.to(weight.device), weight, dense))
