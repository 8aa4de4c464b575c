"""The recoverability transition: the sparsities between which repair stops bringing a network back, without labels.

Relative Repairability (arXiv 2605.25508) says that it lies at an architecture's own place and that allocation
matters in it; how it is found there could not be read, so this is ours. Agreement with the dense network on
held-out unlabeled images, A(S), normalised so that chance (1 / classes) is 0 and the plateau is 1, is fitted by a
logistic in logit(S). The band is where the fit lies between 0.8 and 0.2, its centre where A falls fastest in S.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heal.errors import InputError
from heal.evaluation import agreement, predict
from heal.images import Images
from heal.method import AllocationContext, Allocator, HealContext, Healer, Pruner, after, check, taps
from heal.pruned import apply
from heal.statistics import capture
from heal.values import Budget

HIGH, LOW = 0.8, 0.2
WORST = 0.15
"""The residual above which a curve is no logistic: real ones were below 0.04."""


@dataclass(frozen=True)
class Transition:
    """centre: the sparsity at which agreement falls fastest. band: from 0.8 to 0.2 of the plateau.

    steepness: of the logistic in logit(S). residual: root mean square of the fit, on the normalised scale.
    """

    centre: float
    band: tuple[float, float]
    steepness: float
    residual: float


def locate(sparsities: Sequence[float], agreements: Sequence[float], classes: int, plateau: float = 1.0) -> Transition:
    """The transition of a measured curve; agreements are shares in [0, 1].

    plateau: the agreement of the repaired network at little sparsity. Raises InputError when there are fewer than
    four points, when a sparsity is not inside (0, 1), or when the curve does not fall through half of its height as a
    logistic does.
    """
    if len(sparsities) < 4 or not all(0 < s < 1 for s in sparsities):
        raise InputError(f"transition: sparsities {list(sparsities)} must be four or more between 0 and 1")
    x = torch.tensor([_logit(s) for s in sparsities], dtype=torch.float64)
    a = torch.tensor([normalised(agreement, classes, plateau) for agreement in agreements], dtype=torch.float64)
    if not float(a.min()) < 0.5 < float(a.max()):
        raise InputError(
            f"transition: agreement goes from {max(agreements):.2f} to {min(agreements):.2f} and never crosses half of "
            "its height; measure at other sparsities"
        )
    middle, steepness = _fitted(x, a)
    residual = float((_logistic(x, middle, steepness) - a).square().mean().sqrt())
    if residual > WORST:
        raise InputError(
            f"transition: agreement does not fall along a logistic (it misses it by {residual:.2f} of its height); "
            "measure at more sparsities, or on more images"
        )
    reach = math.log(HIGH / LOW) / float(steepness)
    band = (_sparsity(float(middle) - reach), _sparsity(float(middle) + reach))
    return Transition(_steepest(float(middle), float(steepness)), band, float(steepness), residual)


def normalised(agreement: float, classes: int, plateau: float = 1.0) -> float:
    """Agreement on the scale on which chance is 0 and the plateau 1."""
    return (agreement - 1 / classes) / (plateau - 1 / classes)


def is_repair_sensitive(recalibrated: float, repaired: float, classes: int, plateau: float = 1.0) -> bool:
    """Whether BatchNorm recalibration alone no longer brings the network back, and a repair of statistics does.

    Both are agreements in [0, 1] at one sparsity; the regime is that of arXiv 2605.21972, its bound is LOW (ours).
    """
    return normalised(recalibrated, classes, plateau) < LOW <= normalised(repaired, classes, plateau)


def measure(
    model: nn.Module,
    images: Images,
    held_out: Images,
    sparsities: Sequence[float],
    allocator: Allocator,
    pruner: Pruner,
    healers: Sequence[Healer],
    seed: int = 0,
) -> list[float]:
    """Agreement with the dense model on `held_out`, after pruning to each sparsity and healing on `images`."""
    check(model, Budget(weights=sparsities[0]), allocator, pruner, healers)
    wanted = taps(model, [allocator, pruner, *healers])
    statistics = capture(model, images, wanted) if wanted else {}
    answers = predict(model, held_out)
    found = []
    for sparsity in sparsities:
        context = AllocationContext(statistics=statistics, images=images, seed=seed)
        allocation = allocator.allocate(model, Budget(weights=sparsity), context)
        pruned = pruner.prune(model, allocation, statistics)
        student = copy.deepcopy(model)
        apply(student, pruned)
        healing = HealContext(statistics=statistics, pruned=pruned, seed=seed)
        for healer in healers:
            healing = after(healing, healer.heal(student, model, images, healing))
        found.append(agreement(predict(student, held_out), answers))
    return found


def _fitted(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(middle, steepness) by least squares, begun where the curve crosses its half."""
    start = x[(a - 0.5).abs().argmin()]
    free = torch.tensor([float(start), math.log(2.0)], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([free], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (_logistic(x, free[0], free[1].exp()) - a).square().mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return free[0].detach(), free[1].detach().exp()


def _logistic(x: Tensor, middle: Tensor, steepness: Tensor) -> Tensor:
    return torch.sigmoid(steepness * (middle - x))


def _steepest(middle: float, steepness: float) -> float:
    """Where the fit falls fastest as a function of sparsity; found on a grid of 1e-5."""
    s = torch.arange(1e-5, 1, 1e-5, dtype=torch.float64)
    a = torch.sigmoid(steepness * (middle - torch.logit(s)))
    return float(s[(a * (1 - a) / (s * (1 - s))).argmax()])


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _sparsity(x: float) -> float:
    return 1 / (1 + math.exp(-x))
