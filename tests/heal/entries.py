"""The entries of the dictionaries with params that suit a test, and the combinations that make sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import nn

from heal.allocators import ALLOCATORS
from heal.allocators.depth import Depth
from heal.allocators.global_variance import GlobalVariance
from heal.errors import InputError
from heal.healers import HEALERS
from heal.method import Allocator, Healer, Pruner, check
from heal.pruners import PRUNERS
from heal.values import Budget

BUDGETS = (Budget(weights=0.6), Budget(neurons=0.5), Budget(blocks=0.6))
SHORT = {"epochs": 1, "warmup_epochs": 0, "iterations": 1, "steps": 1}

M = TypeVar("M")


def combinations(model: nn.Module, healer: str) -> Iterator[tuple[Budget, Allocator, Pruner]]:
    """Of the allocators one for each kind of budget: what they give differs in numbers alone.

    Of the pruners all for the healer `none`, else one for each kind: healers see what stays, not who chose it. Channels
    are of the kinds that are cut by default, and of the kind that the healer is for.
    """
    neurons = GlobalVariance(kinds=("qk",)) if healer == "qk_compensation" else GlobalVariance()
    chosen = (
        PRUNERS if healer == "none" else {name: PRUNERS[name] for name in ("depth", "magnitude", "none", "variance")}
    )
    for budget, allocator in zip(BUDGETS, (ALLOCATORS["uniform"](), neurons, Depth("influence", 4)), strict=True):
        for pruner in chosen.values():
            methods: tuple[Allocator, Pruner] = (allocator, pruner())
            try:
                check(model, budget, *methods, [quick(healer)])
            except InputError:
                continue
            yield budget, *methods


def small(name: str) -> Allocator:
    """With its default params, or a search of a few candidates."""
    short = {
        "depth": {"images": 2},
        "evolutionary": {"population": 3, "generations": 1, "parents": 2, "images": 4},
        "sequence": {"step": 0.05, "images": 4},
    }
    allocator: Allocator = ALLOCATORS[name](**short.get(name, {}))
    return allocator


def quick(name: str, **params: object) -> Healer:
    """A step or an epoch where it trains, and those of the params that it has."""
    healer: Healer = HEALERS[name]()
    return replaced(healer, {**SHORT, **params})


def replaced(method: M, params: Mapping[str, object]) -> M:
    """The method with those of the params that it has."""
    if not dataclasses.is_dataclass(method):
        return method
    fields = {field.name for field in dataclasses.fields(method)}
    return dataclasses.replace(method, **{name: value for name, value in params.items() if name in fields})
