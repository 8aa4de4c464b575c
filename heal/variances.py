"""How much a hidden channel varies: what it costs to put its mean in its place, by which channels are ranked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from heal.denoising import denoised
from heal.families.family import ChannelGroup
from heal.method import Statistics
from heal.values import LayerStats

Statistic = Literal["post", "pre", "weighted", "denoised"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)

NEEDS: dict[Statistic, str] = {
    "post": "moments",
    "pre": "preactivation_moments",
    "weighted": "moments",
    "denoised": "channel_second_moment",
}


def variances(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    statistics: Statistics,
    statistic: Statistic,
    removed: float,
) -> dict[str, Tensor]:
    """A score [channels] in float64 for every group; of several consumers it is the sum.

    post: the variance of what the consumer is given (VBP). pre: of what the producer gives (VBP's ablation). weighted:
    post times the squared norm of the consumer's weights of that channel, which is its cost in the consumer's output.
    denoised: (1 - removed) post + removed * the part that is not noise (DVBP), `removed` being the budget's share.
    """
    if statistic == "pre":
        return {name: statistics[f"{group.producers[0]}.output"].variance for name, group in groups.items()}
    return {
        name: torch.stack(
            [_score(model, consumer, statistics, statistic, removed) for consumer in group.consumers]
        ).sum(0)
        for name, group in groups.items()
    }


def _score(model: nn.Module, consumer: str, statistics: Statistics, statistic: Statistic, removed: float) -> Tensor:
    stats: LayerStats = statistics[f"{consumer}.input"]
    if statistic == "weighted":
        weight = model.get_submodule(consumer).get_parameter("weight").detach().double().cpu()
        return stats.variance * weight.reshape(*weight.shape[:2], -1).square().sum((0, 2))
    if statistic == "denoised":
        return (1 - removed) * stats.covariance.diagonal() + removed * denoised(stats).diagonal()
    return stats.variance
