"""Blockwise reconstruction: block after block trains to answer as the dense block does, on the student's own inputs.

Source: BRECQ (arXiv 2102.05426) and QDrop (arXiv 2203.05740), which do so for quantisation; here the weights that
stay, and biases and norms, of one block train at a time. Its inputs come from the blocks before it as they are healed
by then, its targets from the dense network. QDrop's mixing of dense and student inputs is left out.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from heal.block_inputs import refuse_more_inputs
from heal.errors import MethodError
from heal.families.lookup import describe
from heal.healers.layer_batches import Drawn, Pair, Site, numbered
from heal.images import Images, first, generator
from heal.mask_policies import Fixed
from heal.method import HealContext, HealingReport
from heal.modes import evaluating
from heal.progress import quiet
from heal.pruned import goals, kept, listed
from heal.states import alignment
from heal.training import Schedule, Step, Training, fit
from heal.values import ChannelCut, Mask


@dataclass(frozen=True)
class Blockwise:
    """steps: of every block, each on a batch drawn with replacement, >= 1; 1000. batch_size: >= 1; 32. lr: of Adam,
    > 0, a cosine to 0; 1e-4. The error is the squared one over the mean square of the dense output.
    """

    unit: ClassVar[str] = "any"
    steps: int = 1000
    batch_size: int = 32
    lr: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise MethodError(f"blockwise.{name} = {getattr(self, name)} must be at least 1")
        if not self.lr > 0:
            raise MethodError(f"blockwise.lr = {self.lr:g} must be greater than 0")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it runs both networks itself."""
        return frozenset({"block_inputs", "block_outputs"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Train the student's blocks in place, in their order. The report's losses are block after block."""
        began = time.perf_counter()
        asked = goals(teacher, context.pruned)
        refuse_more_inputs(teacher, [self], first(images, 1, 1)[0])
        before = alignment(student, teacher, images, context.pruned)
        batches, losses, pairs = numbered(images, self.batch_size), list[float](), None
        layout, stay = describe(teacher).states, kept(teacher, context.pruned, "blocks")
        notes = _untrained(student, context.pruned, [block for block in asked if _parameters(student, block)])
        for note in notes:
            context.log(f"blockwise: {note}")
        with evaluating(student), evaluating(teacher):
            for done, (block, goal) in enumerate(asked.items(), start=1):
                drawn = generator(context.seed, f"blockwise batches of {block}")
                numbers = torch.randint(len(batches), (self.steps,), generator=drawn).tolist()
                site = Site(block, student, teacher, "pruned", stay.get(block), layout, goal)
                pairs = pairs.for_next(site, numbers) if pairs else Drawn(site, batches, numbers, context.cache_bytes)
                losses += self._fit(student, block, pairs, context)
                context.report("blockwise", done, len(asked))
        after = alignment(student, teacher, images, context.pruned)
        seconds = time.perf_counter() - began
        return HealingReport("blockwise", asdict(self), tuple(losses), before, after, seconds, notes)

    def _fit(self, student: nn.Module, block: str, pairs: Drawn, context: HealContext) -> tuple[float, ...]:
        module, trainable = student.get_submodule(block), _parameters(student, block)
        if not trainable:
            return ()

        def loss(step: Step, pair: Pair) -> Tensor:
            entered, wanted = pair
            error: Tensor = (module(entered) - wanted).square().mean() / wanted.square().mean()
            return error

        masks, schedule = Fixed.of(context.pruned, trainable), Schedule(1, self.lr, 0.0)
        training = Training("blockwise", lambda _: pairs, loss, trainable, schedule, masks, part=block)
        return fit(student, training, replace(context, report=quiet))


def _parameters(student: nn.Module, block: str) -> dict[str, nn.Parameter]:
    return {f"{block}.{name}": parameter for name, parameter in student.get_submodule(block).named_parameters()}


def _untrained(student: nn.Module, pruned: Mask | ChannelCut, trained: list[str]) -> tuple[str, ...]:
    """What the report says of layers outside of the blocks."""
    layers = pruned.keep if isinstance(pruned, Mask) else describe(student).layers
    inside = tuple(f"{block}." for block in trained)
    outside = [layer for layer in layers if not f"{layer}.".startswith(inside)]
    return (f"not trained, as outside of the blocks: {listed(outside)}",) if outside else ()
