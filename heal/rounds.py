"""Cutting in rounds: what the pruner chose goes in nested steps, and all healers run after each of them.

What goes is decided once, from the dense network; of every layer or group each step takes an equal share, and the last
step leaves exactly what the pruner left. First goes what weighs least: of masks the weights of least magnitude, of cuts
the channels of least norm of the rows that make them; both read the dense weights and no statistics, so the order is
known before anything is healed. Blocks go in the order in which they were chosen.
Widths are multiples of something only at the end.

Pruning and training in turns: Han et al. (arXiv 1506.02626). These steps are ours, and which network a healer is shown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from heal import channels
from heal.errors import MethodError
from heal.families.lookup import cuttable_or_raise
from heal.healer_rules import SOLVE_ANEW, STAND_ON_DENSE_STATISTICS, refuse_rounds
from heal.images import Images
from heal.masking import keep_largest, masked_weight
from heal.method import HealContext, Healer, HealingReport, after, name_of, taps
from heal.pruned import apply
from heal.states import alignment
from heal.statistics import capture
from heal.values import ChannelCut, Mask


@dataclass(frozen=True)
class Healed:
    """One healer has run: its place in the list, its report, and what is pruned by then, in dense numbering.

    in_last: whether no round comes after this one's.
    """

    number: int
    report: HealingReport
    pruned: Mask | ChannelCut
    in_last: bool


def heal_in_rounds(
    student: nn.Module,
    dense: nn.Module,
    healers: Sequence[Healer],
    images: Images,
    context: HealContext,
    rounds: int = 1,
) -> Iterator[Healed]:
    """Cut `student`, a copy of the dense network, down to context.pruned in so many steps; heal after each, in place.

    It goes on when it is asked for the next. context.statistics: the dense network's. context.checkpoints: every
    healer of every round has a folder of its own below. Raises MethodError.
    """
    refuse_rounds(rounds, [name_of(healer) for healer in healers], writes_weights=False, patterned=False)
    taking = _taking(steps(dense, context.pruned, rounds))
    for number in sorted(set(range(1, rounds + 1)) - taking.keys()):
        context.log(f"round {number}: nothing goes that was not gone before, so nothing is healed")
    done, taken = 0, None
    for number, step in taking.items():
        context = replace(context, pruned=step)
        now = step if taken is None else onwards(step, taken)
        shown = _shown(student, dense, healers, images, context, None if taken is None else now)
        apply(student, now)
        for place, healer in enumerate(healers):
            folder = context.checkpoints and context.checkpoints / f"{done}-{name_of(healer)}"
            report = replace(shown.heal(healer, student, images, folder), round=number)
            shown = replace(shown, context=after(shown.context, _unmoved(report, rounds)))
            yield Healed(place, report, shown.context.pruned, number == max(taking))
            done += 1
        taken = step


def _taking(nested: Sequence[Mask | ChannelCut]) -> dict[int, Mask | ChannelCut]:
    """The steps that take something beyond the one before, by the number of the round; if none does, the last."""
    before = [0, *map(_taken, nested[:-1])]
    found = {at: step for at, (step, less) in enumerate(zip(nested, before, strict=True), 1) if _taken(step) > less}
    return found or {len(nested): nested[-1]}


def _taken(pruned: Mask | ChannelCut) -> int:
    return pruned.zeros if isinstance(pruned, Mask) else pruned.removed + len(pruned.dropped)


def reads_the_step(healer: Healer, dense: nn.Module, cut: frozenset[str] = frozenset()) -> bool:
    """Whether a healer is shown the network as it was before the step, with that step's cut and that network's
    statistics, in place of the dense network with all that is gone by then.

    Those are that read statistics, that solve layers for the teacher's outputs, or that bring a layer back to what
    the BatchNorm after it expected: from the dense weights they would undo what was trained in the rounds before, or
    make up a second time for what is made up for. All others train towards, or measure, what the whole network
    answers, and the dense one is what they shall reach. cut: its needs, "cuts <kind>".
    """
    named = SOLVE_ANEW | STAND_ON_DENSE_STATISTICS
    return name_of(healer) in named or bool(taps(dense, [healer], cut))


@dataclass(frozen=True)
class _Shown:
    """What the healers of one round are shown: the dense network in `context`; some, the one before the step."""

    dense: nn.Module
    context: HealContext
    before: nn.Module
    step: HealContext
    some: tuple[Healer, ...] = ()

    def heal(self, healer: Healer, student: nn.Module, images: Images, checkpoints: Path | None) -> HealingReport:
        """Run it; its report compares with the dense network in any case."""
        if healer not in self.some:
            return healer.heal(student, self.dense, images, replace(self.context, checkpoints=checkpoints))
        start = alignment(student, self.dense, images, self.context.pruned)
        report = healer.heal(student, self.before, images, replace(self.step, checkpoints=checkpoints))
        end = alignment(student, self.dense, images, self.context.pruned)
        return replace(report, alignment_before=start, alignment_after=end)


def _shown(
    student: nn.Module,
    dense: nn.Module,
    healers: Sequence[Healer],
    images: Images,
    context: HealContext,
    now: Mask | ChannelCut | None,
) -> _Shown:
    """now: the step's cut of the student, None in the first round, before which it is the dense network."""
    cut = _kinds(dense, context.pruned)
    some = tuple(healer for healer in healers if now is not None and reads_the_step(healer, dense, cut))
    if now is None or not some:
        return _Shown(dense, context, dense, context)
    before = copy.deepcopy(student)
    wanted = taps(before, some, cut)
    statistics = capture(before, images, wanted, report=context.report) if wanted else {}
    return _Shown(dense, context, before, replace(context, statistics=statistics, pruned=now), some)


def _kinds(model: nn.Module, pruned: Mask | ChannelCut) -> frozenset[str]:
    if isinstance(pruned, Mask) or not pruned.keep:
        return frozenset()
    groups = cuttable_or_raise(model).cuttable
    return channels.cuts({groups[name].kind for name in pruned.keep})


def _unmoved(report: HealingReport, rounds: int) -> HealingReport:
    if rounds > 1 and report.pruned is not None:
        raise MethodError(f"rounds = {rounds}, but {report.method} moved what is pruned; set rounds to 1")
    return report


def steps(model: nn.Module, pruned: Mask | ChannelCut, rounds: int) -> list[Mask | ChannelCut]:
    """What stays after each round, in the numbering of the dense `model`; nested, the last is `pruned` itself.

    After round r, r / rounds of what every layer or group loses is gone, rounded half up. Raises MethodError when
    `pruned` also writes weights or keeps a pattern.
    """
    refuse_rounds(rounds, (), bool(pruned.updates), isinstance(pruned, Mask) and pruned.pattern is not None)
    return [*(_part(model, pruned, number, rounds) for number in range(1, rounds)), pruned]


def gone(lost: int, number: int, rounds: int) -> int:
    """How many of `lost` are gone after round `number` of `rounds`."""
    return (2 * lost * number + rounds) // (2 * rounds)


def onwards(step: ChannelCut | Mask, taken: ChannelCut | Mask) -> ChannelCut | Mask:
    """A cut of the dense network as one of the network that the earlier, looser cut `taken` left; masks are as they
    were."""
    if isinstance(step, Mask) or isinstance(taken, Mask):
        return step
    keep = {name: torch.searchsorted(taken.keep[name], kept.contiguous()) for name, kept in step.keep.items()}
    dropped = tuple(block for block in step.dropped if block not in taken.dropped)
    return replace(step, keep=keep, total=taken.kept, dropped=dropped)


def _part(model: nn.Module, pruned: Mask | ChannelCut, number: int, rounds: int) -> Mask | ChannelCut:
    if isinstance(pruned, Mask):
        weights = {layer: masked_weight(model, layer, keep) for layer, keep in pruned.keep.items()}
        return Mask({layer: _mask(weights[layer], keep, number, rounds) for layer, keep in pruned.keep.items()})
    groups = cuttable_or_raise(model).cuttable if pruned.keep else {}
    scores = {name: channels.norms(model, groups[name]) for name in pruned.keep}
    keep = {name: _cut(scores[name], keep, number, rounds) for name, keep in pruned.keep.items()}
    dropped = pruned.dropped[: gone(len(pruned.dropped), number, rounds)]
    return ChannelCut(keep, pruned.total, dropped=dropped)


def _mask(weight: Tensor, keep: Tensor, number: int, rounds: int) -> Tensor:
    lost = keep.numel() - int(keep.count_nonzero())
    scores = weight.detach().abs().cpu().masked_fill(keep.cpu(), math.inf)
    return keep_largest(scores, keep.numel() - gone(lost, number, rounds))


def _cut(scores: Tensor, keep: Tensor, number: int, rounds: int) -> Tensor:
    """keep: [kept], or [heads, kept]; of scores by head, the sum over heads ranks what stays in all heads alike."""
    if scores.ndim > keep.ndim:
        scores = torch.linalg.vector_norm(scores, dim=0)
    width = scores.shape[-1]
    return channels.highest(scores.scatter(-1, keep, math.inf), width - gone(width - keep.shape[-1], number, rounds))
