"""Which methods serve where none is named: by the kind of network, by what goes, and how it has to lie.

Every choice rests on rows of the committed tables; "Which method when" in README.md names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from heal.families.discovery import batch_norms
from heal.families.family import Family
from heal.families.lookup import describe
from heal.values import Budget

AUTO = "auto"
"""What stands in place of a method's name where it is to be chosen."""

Kind = Literal["transformer", "normalised", "other", "blockless"]
"""Blocks that give tokens; blocks that give maps, with BatchNorm or without; no blocks to align."""


@dataclass(frozen=True)
class Named:
    """A method by name, with those of its params that are not at their defaults, as plain JSON."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """What is taken. `why`: for whom, as people read it."""

    why: str
    allocator: Named
    pruner: Named
    healers: tuple[Named, ...]


GLOBAL = Named("global_variance")
VARIANCE = Named("variance")
SOLVED = Named("closed_form")
RECALIBRATED = Named("batchnorm_recalibration")
MATCHED = Named("variance_matching")
ALIGNED = Named("starfish")
SQUARED = Named("least_squares")
FREED = Named("starfish", {"affine": True, "kl": 0.1})

Methods = tuple[Named, Named, tuple[Named, ...]]
"""Allocator, pruner, healers."""

CUTS: Mapping[Kind, Methods] = {
    "transformer": (GLOBAL, VARIANCE, (SOLVED, ALIGNED)),
    "normalised": (GLOBAL, VARIANCE, (SOLVED, RECALIBRATED, ALIGNED)),
    "other": (GLOBAL, VARIANCE, (SOLVED, ALIGNED)),
    "blockless": (GLOBAL, VARIANCE, (SOLVED,)),
}
MASKS: Mapping[Kind, Methods] = {
    "transformer": (Named("uniform"), Named("obs"), (FREED,)),
    "normalised": (Named("lamp"), Named("magnitude"), (MATCHED, ALIGNED)),
    "other": (Named("lamp"), Named("magnitude"), (ALIGNED,)),
    "blockless": (Named("lamp"), Named("magnitude"), (SQUARED,)),
}
PATTERNS: Mapping[Kind, Methods] = {
    "transformer": (Named("n_of_m"), Named("obs"), (FREED,)),
    "normalised": (Named("n_of_m"), Named("magnitude"), (MATCHED, ALIGNED)),
    "other": (Named("n_of_m"), Named("magnitude"), (ALIGNED,)),
    "blockless": (Named("n_of_m"), Named("magnitude"), (SQUARED,)),
}
DROPS: Mapping[Kind, Methods] = {
    "transformer": (Named("depth"), Named("depth"), (ALIGNED,)),
    "normalised": (Named("depth"), Named("depth"), (RECALIBRATED, ALIGNED)),
    "other": (Named("depth"), Named("depth"), (ALIGNED,)),
    "blockless": (Named("depth"), Named("depth"), (Named("none"),)),
}
TABLES = {
    "blocks dropped": DROPS,
    "channels cut": CUTS,
    "weights masked": MASKS,
    "weights in a pattern": PATTERNS,
}


def preset(model: nn.Module, removes: str, has_pattern: bool = False) -> Preset:
    """What serves this network. removes: an allocator's unit. has_pattern: whether weights stay in an N:M pattern."""
    family = describe(model)
    kind = _kind(model, family)
    masked = "weights in a pattern" if has_pattern else "weights masked"
    what = {"neurons": "channels cut", "blocks": "blocks dropped", "weights": masked}[removes]
    return Preset(f"{what}, {family.name} ({kind})", *TABLES[what][kind])


def taken() -> set[str]:
    """The names of all methods that any preset takes."""
    methods = [row for table in TABLES.values() for row in table.values()]
    return {method.name for allocator, pruner, healers in methods for method in (allocator, pruner, *healers)}


def removed_by_default(model: nn.Module, budget: Budget) -> str:
    """What goes when no allocator says so: a budget in MACs cuts channels where there are any to cut."""
    return budget.removes("neurons" if describe(model).cuttable else "weights")


def _kind(model: nn.Module, family: Family) -> Kind:
    if not family.blocks:
        return "blockless"
    if family.states == "tokens":
        return "transformer"
    return "normalised" if batch_norms(model) else "other"
