"""The face of the library: prune a network and heal it without labels, in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from heal.allocators import ALLOCATORS
from heal.block_inputs import refuse_more_inputs
from heal.errors import BudgetError, ImagesError, MethodError
from heal.healers import HEALERS
from heal.images import Images, Replay
from heal.method import (
    AllocationContext,
    Allocator,
    HealContext,
    Healer,
    HealingReport,
    Pruner,
    check,
    name_of,
    taps,
)
from heal.naming import AUTO, nearest
from heal.presets import Named, choose
from heal.progress import Report, quiet
from heal.pruned import describe_cuts, refuse_broken
from heal.pruners import PRUNERS
from heal.rounds import heal_in_rounds
from heal.statistics import capture
from heal.values import Allocation, Budget, ChannelCut, Mask

T = TypeVar("T")


@dataclass(frozen=True)
class RecompressionReport:
    """What was asked, what came of it, and what each healer did."""

    budget: Budget
    allocation: Allocation
    cuts: tuple[str, ...]
    healing: tuple[HealingReport, ...]


@dataclass(frozen=True)
class Result:
    """A pruned and healed model in eval mode, what was pruned, and the report."""

    model: nn.Module
    pruned: Mask | ChannelCut
    report: RecompressionReport


def recompress(
    model: nn.Module,
    images: Images,
    budget: Budget,
    allocator: str | Allocator = AUTO,
    pruner: str | Pruner = AUTO,
    healers: Sequence[str | Healer] = (AUTO,),
    seed: int = 0,
    report: Report = quiet,
    log: Callable[[str], None] = lambda message: None,
    rounds: int = 1,
) -> Result:
    """Prune `model` to `budget` and heal it on unlabeled `images`; the model itself is not touched.

    images: a float tensor [n, c, h, w], already normalised for the model, or any re-iterable of
    such batches. Methods go by name or as instances; "auto" is what heal.presets takes for such a network and
    budget. rounds: in how many steps what goes is taken away, with all healers after each (heal/rounds.py). Raises
    InputError subclasses when the combination or the images make no sense, before anything is computed, and when the
    allocator finds no way to meet the budget, which it may know only after the pass for its statistics.
    """
    _refuse_types(budget, healers)
    allocate, prune, heal = _methods(model, budget, allocator, pruner, healers, rounds, log)
    if "labels" in allocate.needs:
        raise MethodError(
            f"allocator {name_of(allocate)} reads labels, and recompress takes none; choose another fitness"
        )
    check(model, budget, allocate, prune, heal, rounds)
    refuse_broken(model)
    teacher = copy.deepcopy(model).eval()
    wanted = taps(model, [allocate, prune, *heal])
    if wanted or heal:
        refuse_more_inputs(teacher, heal, _answered(teacher, images))
    statistics = capture(teacher, images, wanted, report=report) if wanted else {}
    surroundings = AllocationContext(statistics=statistics, images=images, seed=seed, report=report, log=log)
    allocation = allocate.allocate(teacher, budget, surroundings)
    pruned = prune.prune(teacher, allocation, statistics)
    student = copy.deepcopy(teacher)
    cuts = describe_cuts(teacher, pruned)
    context = HealContext(statistics=statistics, pruned=pruned, seed=seed, report=report, log=log)
    healing: list[HealingReport] = []
    for healed in heal_in_rounds(student, teacher, heal, images, context, rounds):
        healing.append(healed.report)
        pruned = healed.pruned
    return Result(student.eval(), pruned, RecompressionReport(budget, allocation, cuts, tuple(healing)))


def _methods(
    model: nn.Module,
    budget: Budget,
    allocator: str | Allocator,
    pruner: str | Pruner,
    healers: Sequence[str | Healer],
    rounds: int,
    log: Callable[[str], None],
) -> tuple[Allocator, Pruner, list[Healer]]:
    """The methods as instances, those of the preset where none is named."""
    if AUTO in healers and len(healers) > 1:
        raise MethodError("healers: auto stands alone; drop it or the others")
    where = None if allocator == AUTO else method(ALLOCATORS, allocator, "allocator")
    which = None if pruner == AUTO else method(PRUNERS, pruner, "pruner")
    how = None if AUTO in healers else [method(HEALERS, healer, "healer") for healer in healers]
    if where is not None and which is not None and how is not None:
        return where, which, how
    chosen = choose(model, budget, where, which, how or (), rounds)
    log(f"auto: {chosen.why}")
    return (
        _built(ALLOCATORS, chosen.allocator) if where is None else where,
        _built(PRUNERS, chosen.pruner) if which is None else which,
        [_built(HEALERS, healer) for healer in chosen.healers] if how is None else how,
    )


def _refuse_types(budget: object, healers: object) -> None:
    if not isinstance(budget, Budget):
        raise BudgetError(f"budget {budget!r} has no unit; write heal.Budget(neurons=0.5) or heal.Budget(weights=0.5)")
    if isinstance(healers, str):
        raise MethodError(f"healers {healers!r} is one name where a list is wanted; write [{healers!r}]")


def _answered(model: nn.Module, images: Images) -> Tensor:
    """The first of them [1, c, h, w]. Raises ImagesError when there is none, or the model cannot answer it."""
    batch = next(iter(Replay(images, 1)), None)
    if batch is None or not len(batch):
        raise ImagesError("images: there are none; pass a tensor [n, channels, height, width] or batches of them")
    device = next((parameter.device for parameter in model.parameters()), batch.device)
    try:
        with torch.no_grad():
            model(batch[:1].to(device))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ImagesError(
            f"images: {type(model).__name__} cannot answer [n, {', '.join(map(str, batch.shape[1:]))}]: {first}"
        ) from error
    return batch[:1]


def _built(entries: Mapping[str, type[T]], named: Named) -> T:
    return entries[named.name](**named.params)


def method(entries: Mapping[str, type[T]], wanted: str | T, kind: str) -> T:
    """The method of that name with its default params, or the instance as it is. Raises MethodError."""
    if not isinstance(wanted, str):
        return wanted
    if wanted not in entries:
        raise MethodError(f"{kind} {wanted!r} is unknown; {nearest(wanted, entries)}")
    return entries[wanted]()
