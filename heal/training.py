"""The one training loop: a healer brings the loss, what trains and how, and what becomes of masked weights.

The loop owns autocast, optimiser, schedule, masks, modes, progress, checkpoints and resume. It draws no
random number; a loss that does draws from a generator named by its step. So what a checkpoint holds is all
there is to continue from, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from heal.checkpoint import Checkpoint
from heal.errors import MethodError, NumericalError
from heal.families.discovery import batch_norms
from heal.mask_policies import Fixed, MaskPolicy
from heal.method import HealContext
from heal.modes import evaluating, normalising_by_batch, training_only, without_fused_attention

Precision = Literal["float32", "bfloat16"]

UNFUSED_TOKENS = 300
"""Longest attention without a fused kernel, whose weights, which that never holds, take memory by their square."""

Batch = TypeVar("Batch")
Given = TypeVar("Given", covariant=True)


class Batches(Protocol[Given]):
    """What one epoch walks through, in a fixed order; heal.images.Replay is one."""

    def __len__(self) -> int: ...

    def starting_at(self, first: int, /) -> Iterator[Given]: ...


@dataclass(frozen=True)
class Step:
    """Where the training is: steps and epochs done, the batch's place in its epoch, the losses of all steps before."""

    number: int
    epoch: int
    index: int
    losses: Sequence[float] = ()


@dataclass(frozen=True)
class Adam:
    """Adam with torch's betas and epsilon. factors: of the learning rate of a parameter by its name, where not 1.

    weight_decay: >= 0, decoupled (AdamW).
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight_decay < math.inf:
            raise MethodError(f"weight_decay = {self.weight_decay:g} must be at least 0, and finite")

    def over(self, trainable: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser; the loop sets its learning rates."""
        # On a CPU a third of the time; the kernel takes a weight's and its gradient's memory to lie alike, unasked.
        fused = all(parameter.is_cpu and parameter.is_contiguous() for parameter in trainable.values())
        groups = _groups(trainable, self.factors)
        return torch.optim.AdamW(groups, weight_decay=self.weight_decay, foreach=False, fused=fused)


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent. momentum: in [0, 1), not Nesterov's. weight_decay: >= 0, of all that trains."""

    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise MethodError(f"momentum = {self.momentum:g} is not in [0, 1)")
        if not 0 <= self.weight_decay < math.inf:
            raise MethodError(f"weight_decay = {self.weight_decay:g} must be at least 0, and finite")

    def over(self, trainable: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser; the loop sets its learning rate."""
        options: dict[str, Any] = {"momentum": self.momentum, "weight_decay": self.weight_decay, "foreach": False}
        return torch.optim.SGD(_groups(trainable, {}), lr=0.0, **options)


@dataclass(frozen=True)
class Schedule:
    """A cosine from `lr` to `min_lr` over all steps, one step a batch, under autocast if in bfloat16.

    warmup_epochs: before them the rate rises on a line from 0, which step 0 has; the cosine's clock
    runs meanwhile. stop_below: the training ends early when a step's loss is less.
    """

    epochs: int
    lr: float
    min_lr: float
    precision: Precision = "float32"
    warmup_epochs: int = 0
    optimiser: Adam | Sgd = field(default_factory=Adam)
    stop_below: float = -math.inf

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise MethodError(f"epochs = {self.epochs} must be at least 1")
        if not 0 <= self.min_lr <= self.lr or self.lr <= 0:
            raise MethodError(f"lr = {self.lr:g} and min_lr = {self.min_lr:g} must satisfy 0 <= min_lr <= lr, lr > 0")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise MethodError(
                f"warmup_epochs = {self.warmup_epochs} must be at least 0 and less than epochs = {self.epochs}, "
                "or lr is never reached; lower it"
            )

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of one step, 0 <= step < steps."""
        warmup = self.warmup_epochs * (steps // self.epochs)
        if step < warmup:
            return self.lr * step / warmup
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * step / steps))

    def is_over(self, losses: Sequence[float], steps: int) -> bool:
        """Whether all steps are done, or the last was good enough."""
        return len(losses) >= steps or (bool(losses) and losses[-1] < self.stop_below)


@dataclass(frozen=True)
class Training(Generic[Batch]):
    """What a healer brings to the loop.

    name: the method's. batches: of an epoch, equally many in each. loss: of a step and its batch, a scalar
    in float32, computed with `trainable`. norms: BatchNorms normalise by their running statistics, as in
    eval mode, or by the batch, and their running statistics move. part: which training of the method it
    is, if it has several; each has a checkpoint.
    """

    name: str
    batches: Callable[[int], Batches[Batch]]
    loss: Callable[[Step, Batch], Tensor]
    trainable: Mapping[str, nn.Parameter]
    schedule: Schedule
    masks: MaskPolicy = field(default_factory=Fixed)
    norms: Literal["running", "batch"] = "running"
    part: str = ""


def fit(student: nn.Module, training: Training[Batch], context: HealContext) -> tuple[float, ...]:
    """Train in place and return the loss of every step.

    The student is in eval mode: no dropout, no stochastic depth; BatchNorms as `norms` says. Takes up
    the checkpoint of an attempt that was cut off. Raises NumericalError when the loss leaves the finite
    numbers.
    """
    schedule, name = training.schedule, training.name
    optimiser = schedule.optimiser.over(training.trainable)
    batches = len(training.batches(0))
    steps = schedule.epochs * batches
    checkpoint = _checkpoint(student, training, steps, optimiser, context)
    losses = checkpoint.restore()
    trainable = frozenset(training.trainable)
    with (
        evaluating(student),
        training_only(student, trainable),
        _norms(student, training),
        _attention(student, schedule),
    ):
        while not schedule.is_over(losses, steps):
            epoch, first = divmod(len(losses), batches)
            for index, batch in enumerate(training.batches(epoch).starting_at(first), start=first):
                _set_lr(optimiser, schedule.lr_at(len(losses), steps))
                losses.append(_descend(training, optimiser, Step(len(losses), epoch, index, losses), batch))
                context.report(name, len(losses), steps)
                checkpoint.save_if_due(losses)
                if schedule.is_over(losses, steps):
                    break
    checkpoint.save(losses)
    return tuple(losses)


def _descend(training: Training[Batch], optimiser: torch.optim.Optimizer, step: Step, batch: Batch) -> float:
    """One step; its loss."""
    device = next(iter(training.trainable.values())).device
    with training.masks.masked(training.trainable):
        with torch.autocast(device.type, torch.bfloat16, enabled=training.schedule.precision == "bfloat16"):
            value = training.loss(step, batch)
        loss = _finite(value, training, step.number)
        value.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    training.masks.settle(training.trainable)
    return loss


def _finite(value: Tensor, training: Training[Batch], step: int) -> float:
    number = float(value.detach())
    if not math.isfinite(number):
        name, of = training.name, training.part and f" of {training.part}"
        raise NumericalError(
            f"{name}: the loss{of} is {number} at step {step}; lower healing.{name}.lr, or use float32"
        )
    return number


def _checkpoint(
    student: nn.Module,
    training: Training[Batch],
    steps: int,
    optimiser: torch.optim.Optimizer,
    context: HealContext,
) -> Checkpoint:
    trainable = training.trainable
    device = next(iter(trainable.values())).device.type
    identity = json.dumps(
        asdict(training.schedule) | {"steps": steps, "seed": context.seed, "device": device}, sort_keys=True
    )
    moving = batch_norms(student) if training.norms == "batch" else {}
    buffers = {f"{name}.{leaf}": tensor for name, norm in moving.items() for leaf, tensor in norm.named_buffers()}
    name = f"{training.name}-{training.part}" if training.part else training.name
    return Checkpoint(context, name, identity, trainable, buffers, optimiser)


def _norms(student: nn.Module, training: Training[Batch]) -> AbstractContextManager[object]:
    return normalising_by_batch(student, moving=True) if training.norms == "batch" else nullcontext()


def _attention(student: nn.Module, schedule: Schedule) -> AbstractContextManager[object]:
    """A CPU's fused kernel is slow backwards in bfloat16, the more so the shorter the sequence (benchmarks/cost.py)."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in student.parameters())
    slow = on_cpu and schedule.precision == "bfloat16"
    return without_fused_attention(student, UNFUSED_TOKENS) if slow else nullcontext()


def _groups(trainable: Mapping[str, nn.Parameter], factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """One group for every factor."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        groups.setdefault(factors.get(name, 1.0), []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def _set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr * group["factor"]


def precision_on(device: torch.device, wanted: Precision | Literal["auto"]) -> Precision:
    """bfloat16 where the hardware multiplies it natively, else float32 (emulation is 20 times slower)."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if _multiplies_bfloat16(device) else "float32"


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
