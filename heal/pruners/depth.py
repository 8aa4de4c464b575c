"""Drops the blocks that the allocation does not keep; what came in passes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.values import Allocation, ChannelCut, Statistics


@dataclass(frozen=True)
class Depth:
    """It decides nothing by itself: the allocation says which."""

    unit: ClassVar[str] = "blocks"

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def prune(self, model: nn.Module, allocation: Allocation, statistics: Statistics) -> ChannelCut:
        """The blocks that go, first those that the allocation let go first; no channels."""
        gone = [block for block, kept in allocation.kept.items() if not kept]
        order = list(allocation.evidence.get("order", gone))
        return ChannelCut({}, {}, dropped=tuple(sorted(gone, key=order.index)))
