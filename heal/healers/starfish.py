"""STARFISH: heal by aligning the student's internal states with the dense model's.

Source: "STARFISH: faST Accuracy Recovery in pruned networks From Internal State Healing",
arXiv 2606.01126, and its official code. Loss: one minus the cosine of every token of every block's
output, mean over tokens and images, then over blocks; no labels, no logits, no augmentation. Only
the weights of the prune scope train; Adam, cosine per step; batches replayed in one fixed order.
Deviations: teacher states are kept as float16 unit rows (same cosine, no overflow); the student
stays in eval mode (same for ViTs; for BatchNorm the code lets running statistics move); where the
hardware multiplies bfloat16, `precision: auto` autocasts to it (the code is float32 throughout).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from heal.errors import MethodError
from heal.families.lookup import describe
from heal.images import Images, Replay, is_array, shuffled
from heal.mask_policies import Fixed
from heal.method import HealContext, HealingReport
from heal.modes import evaluating
from heal.naming import refuse_unknown
from heal.soft_answers import softened_kl
from heal.states import Answer, TeacherStates, alignment, block_outputs, cosine, rows
from heal.training import Schedule, Step, Training, fit, precision_on


@dataclass(frozen=True)
class Starfish:
    """Align block outputs by cosine; all surviving weights of the prunable layers train.

    epochs, batch_size: at least 1; 10 and 32. lr, min_lr: 0 <= min_lr <= lr; 6e-4 and 1e-6 (all as
    the official code). precision: "auto" takes bfloat16 autocast where the hardware has it; the loss
    is float32 in any case.

    Ours, and off: affine: every vector trains, too (biases, norms, layer scales). mse: weight, >= 0, of the squared
    error of the states over the mean square of the teacher's; the cosine is blind to their lengths. kl: weight, >= 0,
    of T^2 KL(teacher's classes, student's) at temperature T, > 0; 2. depth: exponent, >= 0, of a block's number
    among those compared in its share of the loss; 0 is the plain mean. final: the output of the norm behind the
    blocks is a state, too, the last.
    """

    unit: ClassVar[str] = "any"
    epochs: int = 10
    batch_size: int = 32
    lr: float = 6e-4
    min_lr: float = 1e-6
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    affine: bool = False
    mse: float = 0.0
    kl: float = 0.0
    temperature: float = 2.0
    depth: float = 0.0
    final: bool = False

    def __post_init__(self) -> None:
        for name in ("mse", "kl", "depth"):
            if not 0 <= getattr(self, name) < math.inf:
                raise MethodError(f"starfish.{name} = {getattr(self, name):g} must be at least 0, and finite")
        if not 0 < self.temperature < math.inf:
            raise MethodError(f"starfish.temperature = {self.temperature:g} must be greater than 0, and finite")
        Schedule(self.epochs, self.lr, self.min_lr)
        refuse_unknown("starfish.precision", self.precision, ("auto", "float32", "bfloat16"))
        if self.batch_size < 1:
            raise MethodError(f"starfish.batch_size = {self.batch_size} must be at least 1")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it hooks the blocks itself."""
        return frozenset({"block_outputs", "last_norm"} if self.final else {"block_outputs"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Train the student in place; the teacher is only read."""
        began = time.perf_counter()
        notes: list[str] = []
        log = _both(notes, context.log)
        device = next(student.parameters()).device
        schedule = Schedule(self.epochs, self.lr, self.min_lr, precision_on(device, self.precision))
        log(f"precision: {schedule.precision} on {device.type}")
        order = shuffled(images.shape[0], context.seed, "healing order") if is_array(images) else None
        replay = Replay(images, self.batch_size, order)
        before = alignment(student, teacher, images, context.pruned)
        beyond = (describe(teacher).last_norm,) if self.final else ()
        states = TeacherStates(teacher, replay, context.cache_bytes, context.spill_bytes, log, context.pruned, beyond)
        try:
            losses = self._train(student, teacher, replay, states, schedule, context)
        finally:
            states.close()
        after = alignment(student, teacher, images, context.pruned)
        return HealingReport("starfish", asdict(self), losses, before, after, time.perf_counter() - began, tuple(notes))

    def _train(
        self,
        student: nn.Module,
        teacher: nn.Module,
        replay: Replay,
        states: TeacherStates,
        schedule: Schedule,
        context: HealContext,
    ) -> tuple[float, ...]:
        family, blocks = describe(teacher), tuple(states.goals)
        weights = {f"{layer}.weight" for layer in family.layers}
        trainable = {
            name: parameter
            for name, parameter in student.named_parameters()
            if name in weights or (self.affine and parameter.ndim == 1)
        }
        device = next(student.parameters()).device
        shares = torch.arange(1, len(blocks) + 1, device=device).float() ** self.depth
        shares /= shares.mean()
        with evaluating(teacher), block_outputs(student, blocks) as ours:

            def loss(step: Step, batch: Tensor) -> Tensor:
                batch = batch.to(device)
                logits = student(batch)
                with torch.autocast(device.type, enabled=False):
                    answer = states.of(step.index, batch)
                    apart = [self._apart(rows(ours[block], family.states), answer, block) for block in blocks]
                    total = (torch.stack(apart) * shares).mean()
                    return total + self.kl * softened_kl(logits, answer.logits, self.temperature) if self.kl else total

            masks = Fixed.of(context.pruned, trainable)
            losses = fit(student, Training("starfish", lambda _: replay, loss, trainable, schedule, masks), context)
            if not states.where:  # a resumed training with no step left must leave the same notes
                states.of(0, next(iter(replay)).to(device))
            return losses

    def _apart(self, state: Tensor, answer: Answer, block: str) -> Tensor:
        """How far rows [r, d] of a block are from the teacher's (scalar)."""
        unit, length = answer.units[block], answer.lengths[block]
        turned = 1 - cosine(state, unit)
        if not self.mse:
            return turned
        error = (state - unit * length.unsqueeze(-1)).square().sum(-1).mean()
        return turned + self.mse * error / length.square().mean()


def _both(notes: list[str], log: Callable[[str], None]) -> Callable[[str], None]:
    def note(message: str) -> None:
        notes.append(message)
        log(message)

    return note
