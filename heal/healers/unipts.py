"""UniPTS: all weights train by the teacher's soft answers, and the mask follows the weights.

Source: github.com/xjjxmu/UniPTS, its code (the paper's formula differs from it). In epoch e, with the
teacher's logits y_t, the student's y_s and B images:

    tem(e) = base base_decay^e        p_t = softmax(y_t / T)
    L = T^2 / B  sum p_t [log p_t - log_softmax(y_s) / tem(e)]

The student is not tempered: it learns the teacher's softened answer as its own, so top-1 heals and
calibration does not, and the loss may be negative. Dividing by tem(e) scales the gradient alone, by
T^2 / tem(e): 2.00, 3.31 and 5.41 at epochs 0, 50 and 99. Masks are those of heal.mask_policies.Dynamic.

Deviations: the last epoch counts, where the code takes the best on the validation set. Images are the
calibration set's, already cropped once and normalised, and are cropped from there; all of them take part,
where the code draws with replacement. An incomplete last batch is left out of an epoch. The first step has
a rate of 0; in the code the first two have. Of the teacher in train mode only the BatchNorms are, and their
buffers stay. Where a healer before this one changed weights, training starts from those, else from the
dense ones, which is the code's start.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, softmax

from heal.augmentation import crop_and_flip
from heal.errors import ArchitectureError, ImagesError, MethodError
from heal.families.discovery import batch_norms
from heal.images import Images, Replay, generator, is_array, shuffled
from heal.mask_policies import Dynamic, Fixed, Weights
from heal.method import HealContext, HealingReport
from heal.modes import evaluating, normalising_by_batch
from heal.naming import refuse_unknown
from heal.states import alignment
from heal.training import Schedule, Sgd, Step, Training, fit
from heal.values import Mask


@dataclass(frozen=True)
class Unipts:
    """Defaults are the official code's for ResNets; it takes lr 0.05 and weight_decay 4e-5 for MobileNetV2.

    epochs: >= 1; 100. batch_size: images, >= 2 where there are BatchNorms; 64. lr: falls to 0 along a
    cosine, > 0; 0.01. warmup_epochs: of a linear start from 0, >= 0, < epochs; 1. momentum: in [0, 1);
    0.9. weight_decay: of everything, >= 0; 1e-4. decay: of masked weights, added to it, >= 0; 5e-5.
    temperature (T), base, base_decay: of the loss, > 0; 4, 8 and 0.99. augment: crop and flip at random.
    teacher: its BatchNorms normalise by the batch ("train", the code) or by running statistics ("eval").
    mask: follows the weights ("moving", the code) or stays the pruner's ("fixed": the loss alone, for comparison).
    """

    unit: ClassVar[str] = "weights"
    epochs: int = 100
    batch_size: int = 64
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay: float = 5e-5
    warmup_epochs: int = 1
    temperature: float = 4.0
    base: float = 8.0
    base_decay: float = 0.99
    augment: bool = True
    teacher: Literal["train", "eval"] = "train"
    mask: Literal["moving", "fixed"] = "moving"

    def __post_init__(self) -> None:
        refuse_unknown("unipts.teacher", self.teacher, ("train", "eval"))
        refuse_unknown("unipts.mask", self.mask, ("moving", "fixed"))
        if self.batch_size < 1:
            raise MethodError(f"unipts.batch_size = {self.batch_size} must be at least 1")
        if not self.decay >= 0:
            raise MethodError(f"unipts.decay = {self.decay:g} must be at least 0; 5e-5 is the published value")
        for name in ("temperature", "base", "base_decay"):
            if not getattr(self, name) > 0:
                raise MethodError(f"unipts.{name} = {getattr(self, name):g} must be greater than 0")
        _ = self.schedule  # checked when it is made

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it asks the teacher for logits."""
        return frozenset()

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Train all of the student in place; the report has the mask that came of it.

        Raises ArchitectureError unless the network answers logits [n, classes], ImagesError when a
        BatchNorm would see a single image.
        """
        assert isinstance(context.pruned, Mask)
        began = time.perf_counter()
        before = alignment(student, teacher, images)
        losses, pruned = self._train(student, teacher, images, context.pruned, context)
        after = alignment(student, teacher, images)
        seconds = time.perf_counter() - began
        return HealingReport("unipts", asdict(self), losses, before, after, seconds, pruned=pruned)

    def _train(
        self, student: nn.Module, teacher: nn.Module, images: Images, mask: Mask, context: HealContext
    ) -> tuple[tuple[float, ...], Mask | None]:
        trainable = dict(student.named_parameters())
        masks = self._policy(mask, trainable)
        batches = _Epochs(images, self.batch_size, context.seed)
        loss = _Loss(self, student, teacher, context.seed)
        training = Training("unipts", batches.of, loss, trainable, self.schedule, masks, norms="batch")
        if isinstance(masks, Dynamic):
            _make_dense(student, teacher, mask)
        with evaluating(teacher), _normalising(teacher, self.teacher):
            losses = fit(student, training, context)
        if isinstance(masks, Fixed):
            return losses, None
        keep = masks.materialise(trainable)
        return losses, Mask({layer: keep[f"{layer}.weight"].cpu() for layer in mask.keep}, pattern=mask.pattern)

    def _policy(self, mask: Mask, trainable: Weights) -> Dynamic | Fixed:
        if self.mask == "fixed":
            return Fixed.of(mask, trainable)
        kept = {f"{layer}.weight": int(keep.count_nonzero()) for layer, keep in mask.keep.items()}
        return Dynamic(kept, self.decay, mask.pattern)

    @property
    def schedule(self) -> Schedule:
        """How it trains. Raises MethodError."""
        optimiser = Sgd(self.momentum, self.weight_decay)
        return Schedule(self.epochs, self.lr, 0.0, warmup_epochs=self.warmup_epochs, optimiser=optimiser)


def base_decayed_kl(student: Tensor, teacher: Tensor, temperature: float, divisor: float) -> Tensor:
    """L above (scalar) of logits [n, classes] at tem(e) = divisor."""
    answer = softmax(teacher / temperature, dim=1)
    return kl_div(log_softmax(student, dim=1) / divisor, answer, reduction="sum") * temperature**2 / len(student)


@dataclass(frozen=True)
class _Epochs:
    """The images in an order of its own for every epoch, in whole batches; batches that the caller made stay."""

    images: Images
    batch_size: int
    seed: int

    def of(self, epoch: int) -> Replay:
        """The batches of an epoch."""
        if not is_array(self.images):
            return Replay(self.images, self.batch_size)
        count = int(self.images.shape[0])
        whole = max(count // self.batch_size, 1) * self.batch_size
        return Replay(self.images, self.batch_size, shuffled(count, self.seed, f"unipts order {epoch}")[:whole])


@dataclass(frozen=True)
class _Loss:
    """The loss of a step: teacher and student see the same crops."""

    method: Unipts
    student: nn.Module
    teacher: nn.Module
    seed: int

    def __call__(self, step: Step, batch: Tensor) -> Tensor:
        images = batch.to(next(self.student.parameters()).device)
        if self.method.augment:
            images = crop_and_flip(images, generator(self.seed, f"unipts crops step {step.number}"))
        with torch.no_grad():
            answer = _logits(self.teacher, images)
        divisor = self.method.base * self.method.base_decay**step.epoch
        return base_decayed_kl(_logits(self.student, images), answer, self.method.temperature, divisor)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    if len(images) < 2 and batch_norms(model):
        raise ImagesError("unipts: a batch of a single image has no variance for BatchNorm; pass batches of 2 or more")
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ArchitectureError(
            f"unipts: {type(model).__name__} answers {found}, not logits [n, classes]; use another healer"
        )
    return logits


def _normalising(teacher: nn.Module, mode: str) -> AbstractContextManager[object]:
    return normalising_by_batch(teacher, moving=False) if mode == "train" else nullcontext()


def _make_dense(student: nn.Module, teacher: nn.Module, mask: Mask) -> None:
    """Masked weights begin where the dense network has them, so that the first mask is the largest of those."""
    with torch.no_grad():
        for layer, keep in mask.keep.items():
            weight = student.get_parameter(f"{layer}.weight")
            weight.copy_(torch.where(keep.to(weight.device), weight, teacher.get_parameter(f"{layer}.weight")))
