"""Heal nothing: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from heal.images import Images
from heal.method import HealContext, HealingReport


@dataclass(frozen=True)
class NoHealing:
    """Leaves the student as it is."""

    unit: ClassVar[str] = "any"

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics."""
        return frozenset()

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """An empty report."""
        return HealingReport("none", {})
