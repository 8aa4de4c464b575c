"""Which methods serve where none is named: by the kind of network, by what goes, and how it has to lie.

"Which method when" in README.md says of each choice on which measured rows it rests, or that it rests on none yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from heal.families.discovery import batch_norms
from heal.families.family import HIDDEN, Family
from heal.families.lookup import describe
from heal.method import Allocator, Healer, Pruner, kinds_of, name_of, refuse_unit
from heal.values import Budget

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


GLOBAL = Named("global_variance", {"statistic": "weighted"})
VARIANCE = Named("variance", {"statistic": "weighted"})
SOLVED = Named("closed_form")
RECALIBRATED = Named("batchnorm_recalibration")
ALIGNED = Named("starfish")
SQUARED = Named("least_squares")
COMPENSATED = Named("qk_compensation")
FREED = Named("starfish", {"affine": True, "kl": 0.03, "batch_size": 8})

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
    "normalised": (Named("lamp"), Named("magnitude"), (SQUARED, ALIGNED)),
    "other": (Named("lamp"), Named("magnitude"), (ALIGNED,)),
    "blockless": (Named("lamp"), Named("magnitude"), (SQUARED,)),
}
PATTERNS: Mapping[Kind, Methods] = {
    kind: (Named("n_of_m"), pruner, healers) for kind, (_, pruner, healers) in MASKS.items()
}
DROPS: Mapping[Kind, Methods] = {
    "transformer": (Named("depth"), Named("depth"), (ALIGNED,)),
    "normalised": (Named("depth"), Named("depth"), (RECALIBRATED, ALIGNED)),
    "other": (Named("depth"), Named("depth"), (ALIGNED,)),
}
GENTLE = 0.25
"""Of a transformer's channels: up to this share training adds nothing to the solved layers."""
TABLES = {
    "blocks dropped": DROPS,
    "channels cut": CUTS,
    "weights masked": MASKS,
    "weights in a pattern": PATTERNS,
}


def choose(
    model: nn.Module,
    budget: Budget,
    allocator: Allocator | None = None,
    pruner: Pruner | None = None,
    healers: Sequence[Healer] = (),
    rounds: int = 1,
) -> Preset:
    """What serves this network beside the methods that are named. rounds: of `heal.rounds`.

    Raises ArchitectureError when the network has nothing of what the budget removes.
    """
    family = describe(model)
    named = [method.unit for method in (allocator, pruner, *healers) if method is not None and method.unit != "any"]
    default = "neurons" if family.groups_of(HIDDEN) else "weights"
    removes = budget.removes(named[0] if named else default)
    refuse_unit(model, removes)
    has_pattern = getattr(allocator, "pattern", None) is not None
    masked = "weights in a pattern" if has_pattern else "weights masked"
    what = {"neurons": "channels cut", "blocks": "blocks dropped", "weights": masked}[removes]
    kind = _kind(model, family)
    where, which, how = TABLES[what][kind]
    if kind == "transformer" and budget.unit == "neurons" and budget.fraction <= GENTLE:
        what, how = f"few {what}", (SOLVED,)
    kinds = set(kinds_of(allocator.needs)) if allocator is not None and removes == "neurons" else set()
    which = _pruning(which, kinds, rounds)
    how = (Named("none"),) if pruner is not None and name_of(pruner) == "none" else _healing(how, kinds, rounds)
    return Preset(f"{what}, {family.name} ({kind})", where, which, how)


def _pruning(pruner: Named, kinds: set[str], rounds: int) -> Named:
    """Of these kinds of channels: behind queries and keys no weight follows; in rounds a pruner must write none."""
    if pruner == VARIANCE:
        ranked = {} if "qk" in kinds else pruner.params
        return replace(pruner, params={**ranked, "fold_mean": False} if rounds > 1 else ranked)
    return Named("magnitude") if rounds > 1 and pruner.name == "obs" else pruner


def _healing(healers: tuple[Named, ...], kinds: set[str], rounds: int) -> tuple[Named, ...]:
    """Of cuts of these kinds of channels: queries and keys have no consumer that could be solved anew."""
    if kinds == {"qk"}:
        healers = tuple(healer for healer in healers if healer != SOLVED)
    healers = (COMPENSATED, *healers) if "qk" in kinds and rounds == 1 else healers
    return healers or (ALIGNED,)


def taken() -> set[str]:
    """The names of all methods that any preset takes."""
    methods = [row for table in TABLES.values() for row in table.values()]
    chosen = {method.name for allocator, pruner, healers in methods for method in (allocator, pruner, *healers)}
    return chosen | {COMPENSATED.name}


def _kind(model: nn.Module, family: Family) -> Kind:
    if not family.blocks:
        return "blockless"
    if family.states == "tokens":
        return "transformer"
    return "normalised" if batch_norms(model) else "other"
