"""The curves that an allocation rests on, as a heat map of layers by densities for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A value: its text, its shade in per cent, and whether it lies above 1, where repair does harm."""

    text: str
    shade: int
    is_above: bool


@dataclass(frozen=True)
class HeatMap:
    """Rows of cells by layer, under densities."""

    densities: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def repairability(evidence: Mapping[str, Any]) -> HeatMap | None:
    """RR of every layer at every density, of the variant that was used; None when RR did not make the allocation."""
    variant = evidence.get("rests_on", "raw_damage")
    if variant == "raw_damage":
        return None
    # A layer without damage has nothing to repair: the dense column says nothing.
    densities = [density for density in evidence["densities"] if density < 1]
    rows = tuple(
        (layer, tuple(_cell(value) for value in values[: len(densities)]))
        for layer, values in evidence[variant].items()
    )
    return HeatMap(tuple(f"{density:g}" for density in densities), rows)


def _cell(value: float) -> Cell:
    """Full shade at 0 and at 2; white at 1, where repair changes nothing."""
    return Cell(f"{value:.2f}", round(70 * min(abs(value - 1), 1)), value > 1)
