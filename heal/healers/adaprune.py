"""AdaPrune: what was removed is spread on what stays, then every layer alone learns to answer as the dense one does.

Source: Hubara et al. (arXiv 2102.08124), github.com/papers-submission/structured_transposable_masks. First the weights
that stay absorb what went. In a pattern, in every block of M along the input, with k of its weights kept:

    w <- w + (sum of the removed) / k

Without a pattern every weight that stays takes the mean of all that the layer lost, as the code's unstructured helper
does; that the code then spreads block by block once more, dividing by 0 in a block that keeps none, is left out. Then
every layer tunes its weights and bias on the dense network's inputs and outputs, by mean squared error: Adam, 1000
steps on 50 of the same 400 images each, 1e-3 for weights, 1e-2 for biases (the code's own, whatever its caller passes).

Deviations: Linear layers and those of three input channels, which the source skips, are masked here and so are tuned,
too. What is missing counts against the weights that the student has: behind a pruner that moves weights (OBS) the rest
alone is spread. A layer without a bias trains a shift of the BatchNorm that takes its output, as in `layerwise`. The
source ends with a pass that measures BatchNorm anew: name batchnorm_recalibration behind this healer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from heal.errors import MethodError
from heal.healers.layer_batches import Pair, Sampled, Site
from heal.healers.layer_tuning import Rates, tune
from heal.healers.layerwise import mean_relative
from heal.healers.matching import BATCH
from heal.healers.reporting import reported
from heal.images import Images, first, generator
from heal.masking import carries
from heal.method import HealContext, HealingReport
from heal.modes import evaluating
from heal.progress import quiet
from heal.training import Adam, Batches, Schedule, Step
from heal.values import NM, Mask
from heal.wiring import trace


@dataclass(frozen=True)
class Adaprune:
    """images: how many of the calibration images are drawn from, >= 1; 400. iterations: steps of every layer, >= 1;
    1000. batch_size: images of a step, >= 1; 50. lr, bias_lr: of weights and of biases, > 0; 1e-3 and 1e-2 (all the
    code's).

    absorb: spread what was removed first; true. It pays where the pruner only masked.
    """

    unit: ClassVar[str] = "weights"
    images: int = 400
    iterations: int = 1000
    batch_size: int = 50
    lr: float = 1e-3
    bias_lr: float = 1e-2
    absorb: bool = True

    def __post_init__(self) -> None:
        for name in ("images", "iterations", "batch_size"):
            if getattr(self, name) < 1:
                raise MethodError(f"adaprune.{name} = {getattr(self, name)} must be at least 1")
        for name in ("lr", "bias_lr"):
            if not getattr(self, name) > 0:
                raise MethodError(f"adaprune.{name} = {getattr(self, name):g} must be greater than 0")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it runs both networks itself."""
        return frozenset()

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Tune the student's masked layers in place; the report's losses are relative to each layer's first."""
        curves: list[tuple[float, ...]] = []

        def repair() -> None:
            curves.extend(self._tune(student, teacher, images, context))

        report = reported(self, student, teacher, images, repair)
        return replace(report, losses=mean_relative(curves))

    def _tune(
        self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext
    ) -> list[tuple[float, ...]]:
        assert isinstance(context.pruned, Mask)
        mask, rates = context.pruned, Rates(self.lr, self.bias_lr)
        budget = _Budget(self, torch.cat(first(images, self.images, BATCH)), context.seed, context.cache_bytes)
        wiring = trace(teacher, mask.keep, budget.images[:1])
        alone = replace(context, report=quiet, log=lambda message: None)
        curves: list[tuple[float, ...]] = []
        with evaluating(student), evaluating(teacher):
            for layer in wiring.order:
                if self.absorb:
                    _absorb(student, teacher, layer, mask)
                site = Site(layer, student, teacher, "dense")
                losses = tune(site, [mask.keep[layer]], wiring, budget, rates, alone)
                curves.append(tuple(chain.from_iterable(losses)))
                context.report("adaprune", len(curves), len(wiring.order))
        return curves


def absorbed(dense: Tensor, present: Tensor, keep: Tensor, pattern: NM | None) -> Tensor:
    """The weight [out, in, ...] after what `present` lacks of `dense` was spread on what stays; 0 elsewhere."""
    lost = dense - present * keep
    if pattern is None or not carries(dense, pattern):
        return torch.where(keep, present + lost.sum() / (~keep).sum().clamp_min(1), 0)
    lost, kept = (x.movedim(1, -1) for x in (lost, keep))
    blocks = [x.reshape(*x.shape[:-1], -1, pattern.m) for x in (lost, kept)]
    share = blocks[0].sum(-1, keepdim=True) / blocks[1].sum(-1, keepdim=True).clamp_min(1)
    spread: Tensor = share.expand_as(blocks[0]).flatten(-2).movedim(-1, 1)
    return torch.where(keep, present + spread, 0)


def _absorb(student: nn.Module, teacher: nn.Module, layer: str, mask: Mask) -> None:
    weight, dense = (model.get_parameter(f"{layer}.weight") for model in (student, teacher))
    with torch.no_grad():
        weight.copy_(absorbed(dense, weight, mask.keep[layer].to(weight.device), mask.pattern))


@dataclass(frozen=True)
class _Budget:
    """How much a layer is tuned, on the pool [n, c, h, w] of images."""

    method: Adaprune
    images: Tensor
    seed: int
    cache_bytes: int

    looser: ClassVar[tuple[float, ...]] = (0.0,)
    name: ClassVar[str] = "adaprune"

    def schedule(self, lr: float, factors: Mapping[str, float]) -> Schedule:
        """A constant rate."""
        return Schedule(1, lr, lr, optimiser=Adam(factors))

    def batches(self, site: Site, level: int) -> Callable[[int], Batches[Pair]]:
        """One epoch that draws images for each step, without replacement."""
        drawn = generator(self.seed, f"adaprune batches of {site.layer}")
        count, size = len(self.images), self.method.batch_size
        numbers = [torch.randperm(count, generator=drawn)[:size] for _ in range(self.method.iterations)]
        batches = Sampled(site, self.images, numbers, self.cache_bytes)
        return lambda _: batches

    def error(self, answer: Tensor, wanted: Tensor, channel_axis: int) -> Tensor:
        """The mean over all that the layer answers."""
        return mse_loss(answer, wanted)

    def coasts(self, step: Step, error: Tensor) -> bool:
        """Never: every step has its gradient."""
        return False
