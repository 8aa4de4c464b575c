"""The one training loop: a healer brings the loss, the trainable tensors and the mask.

The loop owns autocast, optimiser, schedule, masks, progress, checkpoints and resume. It draws no
random number and walks batches in a fixed order, so what a checkpoint holds (weights, optimiser
moments, losses, step) is all there is to continue from, bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from heal.errors import MethodError, NumericalError
from heal.images import Replay
from heal.method import HealContext
from heal.modes import evaluating, training_only
from heal.values import Mask

PAUSE = 2.0
"""Seconds between checkpoints, at least."""

Precision = Literal["float32", "bfloat16"]

Loss = Callable[[int, Tensor], Tensor]
"""(number of the batch, images [b, c, h, w]) -> scalar, float32."""


@dataclass(frozen=True)
class Schedule:
    """Adam with a cosine from `lr` to `min_lr` over all steps, one step a batch, under autocast if in bfloat16."""

    epochs: int
    lr: float
    min_lr: float
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise MethodError(f"epochs = {self.epochs} must be at least 1")
        if not 0 <= self.min_lr <= self.lr or self.lr <= 0:
            raise MethodError(f"lr = {self.lr:g} and min_lr = {self.min_lr:g} must satisfy 0 <= min_lr <= lr, lr > 0")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of one step, 0 <= step < steps."""
        return self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + math.cos(math.pi * step / steps))


def fit(
    student: nn.Module,
    replay: Replay,
    loss: Loss,
    trainable: Mapping[str, nn.Parameter],
    mask: Mask | None,
    schedule: Schedule,
    context: HealContext,
    name: str,
) -> tuple[float, ...]:
    """Train `trainable` in place and return the loss of every step.

    The student stays in eval mode: no dropout, no stochastic depth, no moving statistics. Masked
    weights get no gradient and are zeroed after every step. Raises NumericalError when the loss
    leaves the finite numbers.
    """
    parameters = list(trainable.values())
    optimiser = torch.optim.Adam(parameters, lr=schedule.lr, foreach=False)
    keep = {} if mask is None else _on_device(mask, trainable)
    device = parameters[0].device
    checkpoint = _Checkpoint(context, name, schedule, trainable, optimiser)
    losses = checkpoint.restore()
    batches = len(replay)
    steps = schedule.epochs * batches
    with evaluating(student), training_only(student, frozenset(trainable)):
        while len(losses) < steps:
            first = len(losses) % batches
            for index, batch in enumerate(replay.starting_at(first), start=first):
                for group in optimiser.param_groups:
                    group["lr"] = schedule.lr_at(len(losses), steps)
                with torch.autocast(device.type, torch.bfloat16, enabled=schedule.precision == "bfloat16"):
                    value = loss(index, batch.to(device))
                losses.append(_finite(value, name, len(losses)))
                value.backward()  # type: ignore[no-untyped-call]
                _step(optimiser, trainable, keep)
                context.report(name, len(losses), steps)
                checkpoint.save_if_due(losses)
    return tuple(losses)


def _step(optimiser: torch.optim.Optimizer, trainable: Mapping[str, nn.Parameter], keep: Mapping[str, Tensor]) -> None:
    for name, kept in keep.items():
        gradient = trainable[name].grad
        if gradient is not None:
            gradient.mul_(kept)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, kept in keep.items():
            trainable[name].mul_(kept)


def _finite(value: Tensor, name: str, step: int) -> float:
    number = float(value.detach())
    if not math.isfinite(number):
        raise NumericalError(f"{name}: the loss is {number} at step {step}; lower healing.{name}.lr, or use float32")
    return number


def _on_device(mask: Mask, trainable: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    names = {f"{layer}.weight": keep for layer, keep in mask.keep.items()}
    return {name: keep.to(trainable[name]) for name, keep in names.items() if name in trainable}


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


class _Checkpoint:
    """One safetensors file, replaced atomically: weights, Adam moments, losses so far."""

    def __init__(
        self,
        context: HealContext,
        name: str,
        schedule: Schedule,
        trainable: Mapping[str, nn.Parameter],
        optimiser: torch.optim.Adam,
    ) -> None:
        self.path = None if context.checkpoints is None else Path(context.checkpoints) / f"{name}.safetensors"
        self.context, self.trainable, self.optimiser = context, trainable, optimiser
        device = next(iter(trainable.values())).device.type
        self.schedule = json.dumps(asdict(schedule) | {"device": device}, sort_keys=True)
        self.due_at = time.monotonic() + PAUSE

    def restore(self) -> list[float]:
        """Take up the last checkpoint, if there is one of this schedule; the losses so far."""
        if self.path is None or not self.path.exists():
            return []
        with safe_open(self.path, framework="pt") as file:
            if (file.metadata() or {}).get("schedule") != self.schedule:
                self.context.log(f"checkpoint {self.path.name} is of another schedule: starting anew")
                return []
            losses = [float(loss) for loss in file.get_tensor("losses")]
            stored = set(file.keys())
            for name, parameter in self.trainable.items():
                if f"weight/{name}" not in stored:
                    continue
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"weight/{name}"))
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(len(losses))),
                    "exp_avg": file.get_tensor(f"exp_avg/{name}").to(parameter.device),
                    "exp_avg_sq": file.get_tensor(f"exp_avg_sq/{name}").to(parameter.device),
                }
        self.context.log(f"resuming after step {len(losses)}")
        return losses

    def _moved(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.trainable.items() if parameter in self.optimiser.state]

    def save_if_due(self, losses: list[float]) -> None:
        """Write the file, seldom enough that at most a twentieth of the time goes into it."""
        began = time.monotonic()
        if self.path is None or began < self.due_at:
            return
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
        # A layer after the last block gets no gradient, and Adam keeps nothing of it.
        for name, parameter in self._moved():
            state = self.optimiser.state[parameter]
            tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
            tensors[f"exp_avg/{name}"] = state["exp_avg"].cpu().contiguous()
            tensors[f"exp_avg_sq/{name}"] = state["exp_avg_sq"].cpu().contiguous()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        save_file(tensors, beside, metadata={"schedule": self.schedule})
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self.context.checkpoint_saved()
        took = time.monotonic() - began
        self.due_at = time.monotonic() + max(PAUSE, 20 * took)
