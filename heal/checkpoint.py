"""What a training needs to go on after a kill: one safetensors file, replaced atomically.

It holds the weights, the optimiser's state, the BatchNorm statistics that move, and the losses so far,
whose number is the step. Nothing else has a memory: the loop draws every random number from (seed, step).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from heal.method import HealContext

PAUSE = 2.0
"""Seconds between checkpoints, at least."""


class Checkpoint:
    """The file `<context.checkpoints>/<name>.safetensors`; without a folder nothing is saved.

    identity: what must be equal for a checkpoint to be taken up. buffers: tensors that move without a gradient.
    """

    def __init__(
        self,
        context: HealContext,
        name: str,
        identity: str,
        trainable: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor],
        optimiser: torch.optim.Optimizer,
    ) -> None:
        self.path = None if context.checkpoints is None else Path(context.checkpoints) / f"{name}.safetensors"
        self.context, self.identity = context, identity
        self.trainable, self.buffers, self.optimiser = trainable, buffers, optimiser
        self.due_at = time.monotonic() + PAUSE
        self.saved = 0

    def restore(self) -> list[float]:
        """Take up the last checkpoint, if there is one of this identity; the losses so far."""
        if self.path is None or not self.path.exists():
            return []
        with safe_open(self.path, framework="pt") as file:
            if (file.metadata() or {}).get("identity") != self.identity:
                self.context.log(f"checkpoint {self.path.name} is of another schedule: starting anew")
                return []
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        losses = [float(loss) for loss in stored.pop("losses")]
        for key, tensor in stored.items():
            kind, _, of = key.partition("/")
            self._put(kind, of, tensor)
        self.saved = len(losses)
        self.context.log(f"resuming after step {len(losses)}")
        return losses

    def save_if_due(self, losses: list[float]) -> None:
        """Write the file, seldom enough that at most a twentieth of the time goes into it."""
        began = time.monotonic()
        if self.path is None or began < self.due_at:
            return
        self.save(losses)
        took = time.monotonic() - began
        self.due_at = time.monotonic() + max(PAUSE, 20 * took)

    def save(self, losses: list[float]) -> None:
        """Write the file, unless it holds this step already."""
        if self.path is None or self.saved == len(losses):
            return
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in self._tensors().items()}
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        save_file(tensors, beside, metadata={"identity": self.identity})
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, self.path)
        self.saved = len(losses)
        self.context.checkpoint_saved()

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"buffer/{name}": buffer for name, buffer in self.buffers.items()}
        for name, parameter in self.trainable.items():
            tensors[f"weight/{name}"] = parameter
            # A layer after the last block gets no gradient, and an optimiser keeps nothing of it.
            state = self.optimiser.state.get(parameter, {})
            tensors |= {f"{key}/{name}": value for key, value in state.items() if isinstance(value, Tensor)}
        return tensors

    def _put(self, kind: str, name: str, tensor: Tensor) -> None:
        if kind == "buffer":
            self.buffers[name].copy_(tensor)
            return
        parameter = self.trainable[name]
        if kind == "weight":
            with torch.no_grad():
                parameter.copy_(tensor)
            return
        # Adam counts its steps on the CPU wherever the weights are.
        self.optimiser.state[parameter][kind] = tensor if tensor.ndim == 0 else tensor.to(parameter.device)
