"""Prune nothing: the baseline that shows what the rest of the road does to a dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.values import Allocation, Mask, Statistics


@dataclass(frozen=True)
class NoPruning:
    """Leaves the model as it is."""

    unit: ClassVar[str] = "any"

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def prune(self, model: nn.Module, allocation: Allocation, statistics: Statistics) -> Mask:
        """An empty mask."""
        return Mask({})
