"""From scores to widths: exact totals, stable ties, minimum widths, rounding to a multiple."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from heal.allocators.cut_cost import CutCost
from heal.errors import BudgetError, MethodError
from heal.families.family import ChannelGroup
from heal.method import AllocationContext
from heal.values import Allocation, Budget


def refuse_multiple(param: str, multiple: int) -> None:
    """Raise MethodError unless widths can be multiples of it."""
    if multiple < 1:
        raise MethodError(f"{param} = {multiple} must be at least 1")


def widths_of(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    scores: Mapping[str, Tensor],
    budget: Budget,
    context: AllocationContext,
    multiple: int,
    scope: str = "global",
) -> Allocation:
    """Of every group the width that its scores [channels] earn. Raises BudgetError.

    Every kind of channels loses the same share; within one kind scope "global" ranks all channels together, "layer"
    takes the same share of every group. Heads are wide enough to go one by one. A budget in neurons is met to one
    channel; one in MACs by the most channels that fit, and the evidence says how many MACs are left.
    """
    totals = {name: len(score) for name, score in scores.items()}
    whole, asking = sum(totals.values()), f"{budget.unit} = {budget.fraction:g}"

    def shared(kept: int) -> dict[str, int]:
        return _shared(groups, scores, totals, kept, multiple, scope, asking)

    if budget.unit == "neurons":
        asked = budget.kept(whole)
        return Allocation("neurons", shared(asked), totals, asked)
    cost = CutCost.of(model, context)
    limit = budget.kept(cost.dense)
    least = bisect_left(range(whole), True, key=lambda kept: _is_possible(shared, kept))
    fitting = bisect_right(range(least, whole + 1), limit, key=lambda kept: cost.macs(shared(kept)))
    if fitting == 0:
        raise BudgetError(
            f"budget {asking} cannot be met: the narrowest cut of these channels leaves {cost.macs(shared(least))} "
            f"of {cost.dense} MACs; remove less, or cut more kinds of channels"
        )
    asked = least + fitting - 1
    kept = shared(asked)
    evidence = {"macs": {"dense": cost.dense, "asked": limit, "got": cost.macs(kept)}}
    return Allocation("neurons", kept, totals, asked, evidence=evidence)


def _is_possible(shared: Callable[[int], object], kept: int) -> bool:
    try:
        shared(kept)
    except BudgetError:
        return False
    return True


def _shared(
    groups: Mapping[str, ChannelGroup],
    scores: Mapping[str, Tensor],
    totals: Mapping[str, int],
    kept: int,
    multiple: int,
    scope: str,
    asking: str,
) -> dict[str, int]:
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group.kind, []).append(name)
    shares = shared_evenly({kind: sum(totals[name] for name in names) for kind, names in members.items()}, kept)
    found: dict[str, int] = {}
    for kind, names in members.items():
        step = 1 if kind == "heads" else multiple
        refuse_if_too_small(shares[kind], len(names), step, asking)
        own = {name: scores[name] for name in names}
        if scope == "global":
            counts = ranked_globally(own, shares[kind], step)
        else:
            counts = shared_evenly({name: totals[name] for name in names}, shares[kind], step)
        found |= rounded(own, counts, step)
    return {name: found[name] for name in groups}


def ranked_globally(scores: Mapping[str, Tensor], kept: int, minimum: int) -> dict[str, int]:
    """Keep the `kept` highest of all scores [d] together; at least `minimum` in every layer.

    Ties fall by (score, layer, index): of equal scores the earlier one goes first.
    """
    protected = {layer: _protected(score, minimum) for layer, score in scores.items()}
    pooled = torch.cat([protected[layer] for layer in scores])
    owner = torch.cat([torch.full((len(score),), i) for i, score in enumerate(scores.values())])
    order = torch.argsort(pooled, stable=True)
    counts = torch.bincount(owner[order[len(order) - kept :]], minlength=len(scores))
    return {layer: int(count) for layer, count in zip(scores, counts, strict=True)}


def shared_evenly(totals: Mapping[str, int], kept: int, minimum: int = 0) -> dict[str, int]:
    """The same share of every layer, the exact total met by largest remainders (ties: earlier layer).

    A layer whose share is below the minimum, or all that it has, keeps that, and the others share the rest.
    """
    everything = sum(totals.values())
    counts = {layer: total * kept // everything for layer, total in totals.items()}
    remainders = sorted(totals, key=lambda layer: -(totals[layer] * kept % everything))
    for layer in remainders[: kept - sum(counts.values())]:
        counts[layer] += 1
    short = {layer: least for layer, total in totals.items() if counts[layer] < (least := min(minimum, total))}
    if not short:
        return counts
    others = {layer: total for layer, total in totals.items() if layer not in short}
    counts = short | shared_evenly(others, kept - sum(short.values()), minimum)
    return {layer: counts[layer] for layer in totals}


def rounded(scores: Mapping[str, Tensor], counts: Mapping[str, int], multiple: int) -> dict[str, int]:
    """Round widths to a multiple and keep their sum to one.

    Every layer is rounded down; what is freed goes back in steps of `multiple` to the layers whose
    next channels score highest. A remainder (of the total, or of a layer whose own width is no
    multiple) stays where it fits.
    """
    if multiple == 1:
        return dict(counts)
    ordered = {layer: score.sort(descending=True, stable=True).values for layer, score in scores.items()}
    widths = {layer: _rounded_down(count, len(ordered[layer]), multiple) for layer, count in counts.items()}
    while (freed := sum(counts.values()) - sum(widths.values())) > 0:
        steps = {layer: min(multiple, freed, len(ordered[layer]) - width) for layer, width in widths.items()}
        # A whole step before a part of one, then the step whose channels score highest.
        best = max(widths, key=lambda layer: (steps[layer], _worth(ordered[layer], widths[layer], steps[layer])))
        widths[best] += steps[best]
    return widths


def _rounded_down(count: int, total: int, multiple: int) -> int:
    """A multiple, or all of a layer; never nothing."""
    return count if count == total else max(count - count % multiple, min(count, multiple))


def _worth(ordered: Tensor, width: int, step: int) -> float:
    return float(ordered[width : width + step].sum())


def refuse_if_too_small(kept: int, layers: int, minimum: int, asked: str) -> None:
    """Raise BudgetError when not every layer can keep its minimum."""
    if kept < layers * minimum:
        raise BudgetError(
            f"budget {asked} cannot be met: it keeps {kept} channels, but {layers} layers need at least "
            f"{minimum} each ({layers * minimum}); remove less, or lower `multiple`"
        )


def _protected(score: Tensor, minimum: int) -> Tensor:
    """The scores with the `minimum` highest out of reach."""
    score = score.double().clone()
    top = torch.argsort(score, stable=True)[len(score) - min(minimum, len(score)) :]
    score[top] = torch.inf
    return score
