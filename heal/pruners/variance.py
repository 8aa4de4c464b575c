"""Variance-Based Pruning: drop the hidden neurons of least variance, fold their mean into the bias.

Source: arXiv 2507.12988, section 3: replacing a neuron by its mean costs its variance, the least a
constant can cost; so the mean goes into the next layer's bias and the neuron goes away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.channels import folded, highest
from heal.families.lookup import cuttable_or_raise
from heal.naming import refuse_unknown
from heal.values import Allocation, ChannelCut, Statistics
from heal.variances import NEEDS, STATISTICS, Statistic, variances


@dataclass(frozen=True)
class Variance:
    """Keep each group's channels of highest variance, as many as the allocation says.

    fold_mean: add W[:, cut] @ mean[cut] to the consumer's bias (the paper); off is its ablation.
    statistic: "post", "pre", "weighted" or "denoised", as in the allocator. The folded mean is always the
        one after the activation, whichever ranks (ours; the paper does not say). Behind a convolution of several
        places with zero padding it is exact but for the border, behind a stride but for what is not read.
    """

    unit: ClassVar[str] = "neurons"
    fold_mean: bool = True
    statistic: Statistic = "post"

    def __post_init__(self) -> None:
        refuse_unknown("variance.statistic", self.statistic, STATISTICS)

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics it reads."""
        return frozenset({"moments", NEEDS[self.statistic]})

    @property
    def writes_weights(self) -> bool:
        """Whether it also repairs: then the whole cut goes at once."""
        return self.fold_mean

    def prune(self, model: nn.Module, allocation: Allocation, statistics: Statistics) -> ChannelCut:
        """The channels that stay, and the consumers' new biases."""
        cuttable = cuttable_or_raise(model).cuttable
        groups = {name: cuttable[name] for name in allocation.kept}
        budget = allocation.budget
        removed = 1 - int(budget["asked"]) / int(budget["total"])
        scores = variances(model, groups, statistics, self.statistic, removed)
        keep = {name: highest(scores[name], kept) for name, kept in allocation.kept.items()}
        updates = folded(model, groups, keep, statistics) if self.fold_mean else {}
        return ChannelCut(keep, dict(allocation.total), updates)
