"""Magnitude pruning: in every layer the weights of least absolute value go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.masking import keep_best
from heal.values import Allocation, Mask, Statistics


@dataclass(frozen=True)
class Magnitude:
    """Keep each layer's weights of largest magnitude: as many as the allocation says, in its pattern if it has one."""

    unit: ClassVar[str] = "weights"

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def prune(self, model: nn.Module, allocation: Allocation, statistics: Statistics) -> Mask:
        """The mask."""
        weights = {layer: model.get_submodule(layer).get_parameter("weight").detach() for layer in allocation.kept}
        keep = {layer: keep_best(w.abs(), allocation.kept[layer], allocation.pattern) for layer, w in weights.items()}
        return Mask({layer: kept.cpu() for layer, kept in keep.items()}, pattern=allocation.pattern)
