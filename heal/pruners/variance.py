"""Variance-Based Pruning: drop the hidden neurons of least variance, fold their mean into the bias.

Source: arXiv 2507.12988, section 3: replacing a neuron by its mean costs its variance, the least a
constant can cost; so the mean goes into the next layer's bias and the neuron goes away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from heal.allocators.global_variance import variances
from heal.families.lookup import cuttable_or_raise
from heal.method import Statistics
from heal.naming import refuse_unknown
from heal.values import Allocation, ChannelCut


@dataclass(frozen=True)
class Variance:
    """Keep each MLP's neurons of highest variance, as many as the allocation says.

    fold_mean: add W[:, cut] @ mean[cut] to the consumer's bias (the paper); off is its ablation.
    statistic: "post" or "pre" the activation, as in the allocator. The folded mean is always the
        one after the activation, whichever ranks (ours; the paper does not say).
    """

    unit: ClassVar[str] = "neurons"
    fold_mean: bool = True
    statistic: Literal["post", "pre"] = "post"

    def __post_init__(self) -> None:
        refuse_unknown("variance.statistic", self.statistic, ("post", "pre"))

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics it reads."""
        return frozenset({"moments"} | ({"preactivation_moments"} if self.statistic == "pre" else set()))

    def prune(self, model: nn.Module, allocation: Allocation, statistics: Statistics) -> ChannelCut:
        """The neurons that stay, and the consumers' new biases."""
        scores = variances(model, statistics, self.statistic)
        keep = {layer: _highest(scores[layer], kept) for layer, kept in allocation.kept.items()}
        updates = self._folded(model, keep, statistics) if self.fold_mean else {}
        return ChannelCut(keep, dict(allocation.total), updates)

    def _folded(self, model: nn.Module, keep: dict[str, Tensor], statistics: Statistics) -> dict[str, Tensor]:
        updates = {}
        for pair in cuttable_or_raise(model).pairs:
            consumer = model.get_submodule(pair.consumer)
            mean = statistics[f"{pair.consumer}.input"].mean.clone()
            mean[keep[pair.producer]] = 0
            weight = consumer.get_parameter("weight").detach().flatten(1)
            bias = getattr(consumer, "bias", None)
            shift = weight.double().cpu() @ mean
            folded = shift if bias is None else bias.detach().double().cpu() + shift
            updates[f"{pair.consumer}.bias"] = folded.to(weight)
        return updates


def _highest(scores: Tensor, kept: int) -> Tensor:
    """Ascending indices of the `kept` highest scores; of equal ones the later stays."""
    order = torch.argsort(scores, stable=True)
    return order[len(order) - kept :].sort().values
