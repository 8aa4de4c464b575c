"""How much a hidden channel varies: what it costs to put its mean in its place, by which channels are ranked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from heal.denoising import denoised
from heal.errors import MethodError
from heal.families.family import ChannelGroup
from heal.families.heads import Heads
from heal.values import LayerStats, Statistics

Statistic = Literal["post", "pre", "weighted", "denoised"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)

NEEDS: dict[Statistic, str] = {
    "post": "moments",
    "pre": "preactivation_moments",
    "weighted": "moments",
    "denoised": "channel_second_moment",
}

MEANINGLESS: dict[str, tuple[Statistic, ...]] = {
    "qk": ("pre", "weighted", "denoised"),
    "v": ("pre",),
    "heads": ("pre",),
    "residual": ("pre",),
}
"""What does not rank a kind of channels: no activation and, behind queries and keys, no weight follows; many add up
in a residual stream, and none gives it alone."""


def refuse_statistic(method: str, statistic: Statistic, kinds: Collection[str]) -> None:
    """Raise MethodError when channels of one of the kinds cannot be ranked by the statistic."""
    for kind in kinds:
        if statistic in MEANINGLESS.get(kind, ()):
            fitting = " or ".join(one for one in STATISTICS if one not in MEANINGLESS[kind])
            raise MethodError(f"{method}.statistic = {statistic} does not rank channels of kind {kind}; take {fitting}")


def variances(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    statistics: Statistics,
    statistic: Statistic,
    removed: float,
) -> dict[str, Tensor]:
    """A score [channels] in float64 for every group, of kind qk [heads, channels]; of several consumers it is the sum.

    post: the variance of what the consumer is given (VBP). pre: of what the producer gives (VBP's ablation). weighted:
    post times the squared norm of the consumer's weights of that channel, which is its cost in the consumer's output.
    denoised: (1 - removed) post + removed * the part that is not noise (DVBP), `removed` being the budget's share.
    Of attention: v is the mean over heads (DVBP); heads the sum over their dimensions, each weighted; qk E[q^2] E[k^2],
    the mean square of what a dimension adds to the scores, over all pairs of tokens of all images (CORP, there the
    fallback). Raises MethodError where the statistic does not rank a kind.
    """
    refuse_statistic("variance", statistic, {group.kind for group in groups.values()})
    return {name: _of_group(model, group, statistics, statistic, removed) for name, group in groups.items()}


def of_all_heads(score: Tensor) -> Tensor:
    """What the j-th best channel is worth where each head keeps its own best: [heads, channels] to [channels]."""
    return score if score.ndim == 1 else score.sort(descending=True).values.mean(0)


def _of_group(
    model: nn.Module, group: ChannelGroup, statistics: Statistics, statistic: Statistic, removed: float
) -> Tensor:
    if group.kind == "qk":
        return _in_scores(model, group, statistics)
    if statistic == "pre":
        return statistics[f"{group.producers[0]}.output"].variance
    weighted = statistic == "weighted" or group.kind == "heads"
    found = [_consumed(model, consumer, statistics, statistic, removed, weighted) for consumer in group.consumers]
    score = torch.stack(found).sum(0)
    if not group.attention:
        return score
    by_head = score.view(Heads.of(model.get_submodule(group.attention)).number, -1)
    return by_head.sum(1) if group.kind == "heads" else by_head.mean(0)


def _in_scores(model: nn.Module, group: ChannelGroup, statistics: Statistics) -> Tensor:
    heads, stats = Heads.of(model.get_submodule(group.attention)), statistics[f"{group.modules[0]}.output"]
    square = stats.m2 / stats.count + stats.mean.square()
    return square[: 2 * heads.number * heads.qk].view(2, heads.number, heads.qk).prod(0)


def _consumed(
    model: nn.Module, consumer: str, statistics: Statistics, statistic: Statistic, removed: float, weighted: bool
) -> Tensor:
    stats: LayerStats = statistics[f"{consumer}.input"]
    variance = stats.variance
    if statistic == "denoised":
        variance = (1 - removed) * stats.covariance.diagonal() + removed * denoised(stats).diagonal()
    if not weighted:
        return variance
    weight = model.get_submodule(consumer).get_parameter("weight").detach().double().cpu()
    return variance * weight.reshape(*weight.shape[:2], -1).square().sum((0, 2))
