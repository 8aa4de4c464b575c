"""Which blocks to drop: those that do least, or those without which the answers change least.

"influence" is ShortGPT's Block Influence (arXiv 2403.03853): 1 - mean cos(block's input, block's output), over the
tokens of all images; the lowest go. Of maps [n, c, h, w] a place is a token (ours).

"greedy" drops one block after another: of those that stay, the one without which the network answers most like the
dense one, KL(dense || shallower) in nats, the mean over images. The search is SLEB's (arXiv 2402.09025), which judges
by the perplexity of text; the divergence from the dense answers is ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from heal.allocators.dropping import Goal
from heal.allocators.trial import at_most, divergence
from heal.errors import ArchitectureError, MethodError, NumericalError
from heal.evaluation import predict
from heal.families.lookup import describe
from heal.families.skips import Dropped
from heal.images import Images, Replay
from heal.method import AllocationContext
from heal.modes import Listener, evaluating, listening
from heal.naming import refuse_unknown
from heal.states import Layout
from heal.surgery import drop, swap
from heal.values import Allocation, Budget

BATCH = 64

Scores = dict[str, float]
"""By block; the lowest goes first, of equal ones the earlier."""


@dataclass(frozen=True)
class Depth:
    """Drops whole blocks of the table's `droppable`; one block of the network stays.

    rule: "greedy", or "influence", which needs one pass over the images where greedy needs one for every block that is
    left, for every block that goes. images: how many of the calibration images judge, >= 1; 128.
    """

    unit: ClassVar[str] = "blocks"
    rule: Literal["greedy", "influence"] = "greedy"
    images: int = 128

    def __post_init__(self) -> None:
        refuse_unknown("depth.rule", self.rule, ("greedy", "influence"))
        if self.images < 1:
            raise MethodError(f"depth.images = {self.images} must be at least 1")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it runs the model."""
        return frozenset({"images"})

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """0 or 1 for every block; the evidence has what was dropped in its order, and the scores.

        Scores are a dict of the blocks for every choice among them: one for each block that went, or of influence one
        in all. Raises BudgetError, ImagesError, NumericalError, ArchitectureError where the table names a block that
        gives another shape than it takes.
        """
        goal = Goal.of(model, budget, context)
        images = at_most(context, self.images, "depth")
        _refuse_reshaping(model, goal.blocks, images)
        if self.rule == "influence":
            scores = influences(model, goal.blocks, describe(model).states, images)
            dropped, choices = goal.first(sorted(scores, key=lambda block: scores[block])), [scores]
        else:
            dropped, choices = _greedy(model, goal, images, context)
        return goal.allocation(dropped, {"order": dropped, "scores": choices})


def _refuse_reshaping(model: nn.Module, blocks: Iterable[str], images: Images) -> None:
    """Only a table of the user's can name such a block; one image tells."""
    shapes: dict[str, torch.Size] = {}

    def leaving(block: str) -> Listener:
        def listen(output: Tensor) -> None:
            if output.shape != shapes[block]:
                raise ArchitectureError(
                    f"depth: {block} takes {list(shapes[block])} and gives {list(output.shape)}, so its input cannot "
                    "pass on in its place; take it out of `droppable` of the network's table (regrow_family)"
                )

        return listen

    def entering(block: str) -> Listener:
        return lambda x: shapes.__setitem__(block, x.shape)

    taps = {f"{block}.input": entering(block) for block in blocks} | {f"{b}.output": leaving(b) for b in blocks}
    image = next(iter(Replay(images, 1)))[:1]
    with evaluating(model), torch.inference_mode(), listening(model, taps):
        model(image.to(next(model.parameters())))


def influences(model: nn.Module, blocks: Iterable[str], layout: Layout, images: Images) -> Scores:
    """Block Influence of every block, float64, in [0, 2]. Raises NumericalError."""
    sums, rows = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0)
    entered: dict[str, Tensor] = {}

    def entering(block: str) -> Listener:
        return lambda x: entered.__setitem__(block, x.clone())  # a block may add in place

    def leaving(block: str) -> Listener:
        def listen(output: Tensor) -> None:
            cosines = cosine_similarity(_tokens(entered.pop(block), layout), _tokens(output, layout), dim=-1)
            sums[block] += float(cosines.sum())
            rows[block] += cosines.numel()

        return listen

    taps = {f"{block}.input": entering(block) for block in sums} | {f"{b}.output": leaving(b) for b in sums}
    with evaluating(model), torch.inference_mode(), listening(model, taps):
        for batch in Replay(images, BATCH):
            model(batch.to(next(model.parameters())))
    for block, total in sums.items():
        if not math.isfinite(total):
            raise NumericalError(f"depth: the output of {block} is not finite; the weights or images hold NaN")
    return {block: 1 - total / rows[block] for block, total in sums.items()}


def _tokens(state: Tensor, layout: Layout) -> Tensor:
    """A block's input or output as float64 [tokens, channels]."""
    return (state if layout == "tokens" else state.movedim(1, -1)).flatten(0, -2).double()


def _greedy(model: nn.Module, goal: Goal, images: Images, context: AllocationContext) -> tuple[list[str], list[Scores]]:
    """The blocks in the order in which they go, and what each choice was made by."""
    dense, network = predict(model, images, BATCH), copy.deepcopy(model).eval()
    dropped: list[str] = []
    choices: list[Scores] = []
    while not goal.is_met(dropped):
        if len(dropped) == goal.most:
            raise goal.unmet(dropped)
        candidates, scores = [block for block in goal.blocks if block not in dropped], Scores()
        for block in candidates:
            dense_block = swap(network, block, Dropped())
            scores[block] = divergence(dense, predict(network, images, BATCH))
            swap(network, block, dense_block)
            context.report(f"depth, block {len(dropped) + 1}", len(scores), len(candidates))
        dropped.append(min(candidates, key=lambda block: scores[block]))
        choices.append(scores)
        drop(network, dropped[-1:])
    return dropped, choices
