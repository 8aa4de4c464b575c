"""Global reconstruction: all layers learn together to answer as the dense ones do, in one pass of both networks.

Source: the "gap" of OBC (Frantar and Alistarh 2022, github.com/IST-DASLab/OBC, postproc.py), global AdaPrune. With the
dense output y_l and the pruned network's own z_l of every Linear and convolution l, masked or not, per batch:

    L = sum over l of |z_l - y_l|^2 / |y_l|^2

Adam at a constant rate over all parameters, norms included; masked weights are 0 after every step. BatchNorms normalise
by their running statistics, which stay. Deviations: calibration images are taken as they are, where the source crops
and flips them anew; an error is divided by 1e-12 at least; a layer that is called several times counts at every call,
where the source sees the last.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heal.errors import ArchitectureError, MethodError
from heal.families.parts import called
from heal.images import Images, Replay, is_array, shuffled
from heal.mask_policies import Fixed
from heal.method import HealContext, HealingReport
from heal.modes import Listener, evaluating, listening
from heal.states import alignment
from heal.training import Schedule, Step, Training, fit

EPS = 1e-12


@dataclass(frozen=True)
class GlobalReconstruction:
    """epochs: >= 1; 100. lr: of Adam, constant, > 0; 1e-5. batch_size: >= 1; 128 (all as the source)."""

    unit: ClassVar[str] = "weights"
    epochs: int = 100
    lr: float = 1e-5
    batch_size: int = 128

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise MethodError(f"global_reconstruction.{name} = {getattr(self, name)} must be at least 1")
        if not self.lr > 0:
            raise MethodError(f"global_reconstruction.lr = {self.lr:g} must be greater than 0")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it runs both networks itself."""
        return frozenset()

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Train all parameters of the student in place; masks stay."""
        began = time.perf_counter()
        before = alignment(student, teacher, images)
        trainable = dict(student.named_parameters())
        losses = self._train(student, teacher, images, trainable, context)
        after = alignment(student, teacher, images)
        seconds = time.perf_counter() - began
        return HealingReport("global_reconstruction", asdict(self), losses, before, after, seconds)

    def _train(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: Images,
        trainable: dict[str, nn.Parameter],
        context: HealContext,
    ) -> tuple[float, ...]:
        layers, device = [layer for layer, _ in called(teacher)], next(student.parameters()).device

        def batches(epoch: int) -> Replay:
            order = None
            if is_array(images):
                order = shuffled(images.shape[0], context.seed, f"global_reconstruction order {epoch}")
            return Replay(images, self.batch_size, order)

        def loss(step: Step, batch: Tensor) -> Tensor:
            return disagreement(student, teacher, layers, batch.to(device))

        masks, schedule = Fixed.of(context.pruned, trainable), Schedule(self.epochs, self.lr, self.lr)
        with evaluating(teacher):
            return fit(student, Training("global_reconstruction", batches, loss, trainable, schedule, masks), context)


def disagreement(student: nn.Module, teacher: nn.Module, layers: list[str], images: Tensor) -> Tensor:
    """L above (scalar) on images [n, c, h, w]. Raises ArchitectureError when no layer is called."""
    wanted: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    terms: list[Tensor] = []

    def keep(layer: str) -> Listener:
        # A clone, as an activation behind the layer may work in place.
        return lambda output: wanted[layer].append(output.detach().clone())

    def compare(layer: str) -> Listener:
        def add(output: Tensor) -> None:
            target = wanted[layer].pop(0)
            terms.append((output - target).float().square().sum() / target.float().square().sum().clamp_min(EPS))

        return add

    with torch.no_grad(), listening(teacher, {f"{layer}.output": keep(layer) for layer in layers}):
        teacher(images)
    with listening(student, {f"{layer}.output": compare(layer) for layer in layers}):
        student(images)
    if not terms:
        raise ArchitectureError(
            f"global_reconstruction: {type(teacher).__name__} calls no Linear or convolution; use distill"
        )
    return torch.stack(terms).sum()
