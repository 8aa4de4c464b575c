"""SNIP's cut: the channels go whose loss the network's answer feels least; nothing is folded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.allocators.snip import felt
from heal.channels import PLAIN, highest
from heal.families.lookup import cuttable_or_raise
from heal.values import Allocation, ChannelCut, Statistics


@dataclass(frozen=True)
class Snip:
    """Keep each group's channels of highest saliency (heal/saliency.py), as many as the allocation says."""

    unit: ClassVar[str] = "neurons"
    kinds: ClassVar[tuple[str, ...]] = PLAIN

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics it reads."""
        return frozenset({"saliency"})

    def prune(self, model: nn.Module, allocation: Allocation, statistics: Statistics) -> ChannelCut:
        """The channels that stay."""
        groups = cuttable_or_raise(model).cuttable
        keep = {name: highest(felt(groups[name], statistics), kept) for name, kept in allocation.kept.items()}
        return ChannelCut(keep, dict(allocation.total))
