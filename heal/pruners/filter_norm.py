"""The magnitude cut: the channels go whose own weights have the smallest norm; nothing is folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.channels import PLAIN, highest, norms
from heal.families.lookup import cuttable_or_raise
from heal.values import Allocation, ChannelCut, Statistics


@dataclass(frozen=True)
class FilterNorm:
    """Keep each group's channels of largest norm, as many as the allocation says."""

    unit: ClassVar[str] = "neurons"
    kinds: ClassVar[tuple[str, ...]] = PLAIN

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def prune(self, model: nn.Module, allocation: Allocation, statistics: Statistics) -> ChannelCut:
        """The channels that stay."""
        groups = cuttable_or_raise(model).cuttable
        keep = {name: highest(norms(model, groups[name]), kept) for name, kept in allocation.kept.items()}
        return ChannelCut(keep, dict(allocation.total))
