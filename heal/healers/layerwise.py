"""Layer-wise tuning of POT: every masked layer alone learns to answer as the dense layer does.

Source: Lazarevich, Kozlov and Malinin (arXiv 2104.15023), in two budgets. "openvino", the authors' code
(github.com/openvinotoolkit/openvino, SparseModelFinetuning): 300 images; first at a sparsity less by 0.1, then
at the final one; each time 30 random batches of 50 images with 40 steps on each; mean squared error; a
gradient is only computed where the error, relative to the batch's first, did not fall, else Adam goes on by
its moments. "msbench" (github.com/ModelTC/msbench, advanced_pts): up to 20000 steps, each on a random batch of
64 out of all images; squared error summed over channels and averaged over the rest; it ends below 1e-5.
Both: Adam without decay, 1e-5 for weights, 1e-4 for biases, inputs and targets of the dense network.

Deviations: the mask is the pruner's throughout; at the lower sparsity those weights return, with their dense
values, that rank highest by |w| / |W_layer|, POT's own score. POT decides for all layers together whether
the error fell, here each layer does for itself; it corrects statistics and biases at both levels, which here
are healers of their own. Both sources fuse BatchNorm, so that every layer has a bias; here a layer without
one trains a shift of the BatchNorm that takes its output, where there is one, which is the same. Name
batchnorm_recalibration after this healer: it moves the statistics that the shift stands on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, Literal

import torch
from torch import nn

from heal.errors import MethodError
from heal.healers.layer_batches import Site, numbered
from heal.healers.layer_tuning import Rates, tune
from heal.healers.matching import BATCH
from heal.healers.reporting import reported
from heal.healers.tuning_budgets import EPS, Msbench, Openvino, TuningBudget
from heal.images import Images, first
from heal.masking import keep_largest
from heal.method import HealContext, HealingReport
from heal.modes import evaluating
from heal.naming import refuse_unknown
from heal.progress import quiet
from heal.values import Mask
from heal.wiring import trace


@dataclass(frozen=True)
class Layerwise:
    """budget: "openvino" or "msbench", as above. inputs: of the dense network ("dense", as published), or of
    the student with all earlier layers tuned ("pruned", one layer after another; ours).

    iterations: batches at each of openvino's two levels, >= 1; null takes the budget's 30; msbench has none.
    steps: on each of those batches, or at most in all for msbench, >= 1; null takes 40, or 20000. lr, bias_lr:
    of weights and of biases, > 0; 1e-5 and 1e-4 (both codes).
    """

    unit: ClassVar[str] = "weights"
    budget: Literal["openvino", "msbench"] = "openvino"
    inputs: Literal["dense", "pruned"] = "dense"
    iterations: int | None = None
    steps: int | None = None
    lr: float = 1e-5
    bias_lr: float = 1e-4

    def __post_init__(self) -> None:
        refuse_unknown("layerwise.budget", self.budget, ("openvino", "msbench"))
        refuse_unknown("layerwise.inputs", self.inputs, ("dense", "pruned"))
        if self.budget == "msbench" and self.iterations is not None:
            raise MethodError(
                f"layerwise.iterations = {self.iterations}, but budget msbench draws a batch for every step; "
                "set layerwise.steps, or budget openvino"
            )
        for name in ("iterations", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MethodError(f"layerwise.{name} = {value} must be at least 1, or null for the budget's own")
        for name in ("lr", "bias_lr"):
            if not getattr(self, name) > 0:
                raise MethodError(f"layerwise.{name} = {getattr(self, name):g} must be greater than 0")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it runs both networks itself."""
        return frozenset()

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Tune the student's masked layers in place, in the order in which they run.

        The report's losses are relative to the first of the layer at that level, mean over layers, step by
        step and level after level; a layer that ended early counts with its last.
        """
        curves: list[list[tuple[float, ...]]] = []

        def repair() -> None:
            curves.extend(self._tune(student, teacher, images, context))

        report = reported(self, student, teacher, images, repair)
        return replace(report, losses=tuple(chain.from_iterable(map(mean_relative, zip(*curves, strict=True)))))

    def _tune(
        self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext
    ) -> list[list[tuple[float, ...]]]:
        """The losses of every layer, by level."""
        assert isinstance(context.pruned, Mask)
        budget, rates = self._budget(images, context), Rates(self.lr, self.bias_lr)
        wiring = trace(teacher, context.pruned.keep, first(images, 1, 1)[0])
        levels = [loosened(teacher, context.pruned, less) for less in budget.looser]
        curves = []
        with evaluating(student), evaluating(teacher):
            for layer in wiring.order:
                keeps = [level.keep[layer] for level in levels]
                site = Site(layer, student, teacher, self.inputs)
                curves.append(tune(site, keeps, wiring, budget, rates, _quietly(context)))
                context.report("layerwise", len(curves), len(wiring.order))
        return curves

    def _budget(self, images: Images, context: HealContext) -> TuningBudget:
        given = {name: value for name in ("iterations", "steps") if (value := getattr(self, name)) is not None}
        if self.budget == "openvino":
            return Openvino(torch.cat(first(images, Openvino.POOL, BATCH)), context.seed, **given)
        return Msbench(numbered(images, Msbench.BATCH), context.seed, context.cache_bytes, **given)


def loosened(dense: nn.Module, mask: Mask, less: float) -> Mask:
    """The mask with a share `less` of all its weights returned, as far as there are as many masked.

    Those return that rank highest by |w| / |W_layer|, of the dense weights and over all layers.
    """
    weights = {layer: dense.get_parameter(f"{layer}.weight").detach().cpu() for layer in mask.keep}
    scores = [w.abs() / torch.linalg.vector_norm(w).clamp_min(1e-30) for w in weights.values()]
    masked = [score.masked_fill(keep, -1) for score, keep in zip(scores, mask.keep.values(), strict=True)]
    count = min(math.floor(less * mask.total + 0.5), mask.zeros)
    returned = keep_largest(torch.cat([score.flatten() for score in masked]), count)
    parts = torch.split(returned, [keep.numel() for keep in mask.keep.values()])
    return Mask(
        {layer: keep | part.view_as(keep) for (layer, keep), part in zip(mask.keep.items(), parts, strict=True)}
    )


def mean_relative(curves: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Step by step the mean over curves of loss / first loss; a curve that is shorter goes on with its last."""
    longest = max((len(curve) for curve in curves), default=0)
    padded = [[*curve, *[curve[-1]] * (longest - len(curve))] for curve in curves]
    relative = [torch.tensor(curve, dtype=torch.float64) / (curve[0] + EPS) for curve in padded]
    return tuple(torch.stack(relative).mean(0).tolist()) if relative else ()


def _quietly(context: HealContext) -> HealContext:
    """A layer is one step of the progress that is shown."""
    return replace(context, report=quiet, log=lambda message: None)
