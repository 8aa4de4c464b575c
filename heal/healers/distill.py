"""Knowledge distillation: the whole network is trained by the dense network's answers alone.

Source: Hinton et al. (arXiv 1503.02531); epochs, AdamW, rate and decay as Variance-Based Pruning fine-tunes
(arXiv 2507.12988), which adds labels and does not say with which weight. Here there are none, and no augmentation.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heal.errors import MethodError
from heal.images import Images, Replay, is_array, shuffled
from heal.mask_policies import Fixed
from heal.method import HealContext, HealingReport
from heal.modes import evaluating
from heal.soft_answers import softened_kl
from heal.states import alignment
from heal.training import Adam, Schedule, Step, Training, fit


@dataclass(frozen=True)
class Distill:
    """epochs, batch_size: >= 1; 10 and 32. lr: > 0, a cosine to 0; 1.5e-5. weight_decay: >= 0, decoupled; 0.01.

    temperature: > 0; 2 (the paper does not say).
    """

    unit: ClassVar[str] = "any"
    epochs: int = 10
    batch_size: int = 32
    lr: float = 1.5e-5
    weight_decay: float = 0.01
    temperature: float = 2.0

    def __post_init__(self) -> None:
        _ = self.schedule
        if self.batch_size < 1:
            raise MethodError(f"distill.batch_size = {self.batch_size} must be at least 1")
        if not 0 < self.temperature < math.inf:
            raise MethodError(f"distill.temperature = {self.temperature:g} must be greater than 0, and finite")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it runs both networks itself."""
        return frozenset()

    @property
    def schedule(self) -> Schedule:
        """How it trains. Raises MethodError."""
        return Schedule(self.epochs, self.lr, 0.0, optimiser=Adam(weight_decay=self.weight_decay))

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Train all parameters of the student in place; masks stay."""
        began = time.perf_counter()
        before = alignment(student, teacher, images, context.pruned)
        device, trainable = next(student.parameters()).device, dict(student.named_parameters())
        order = shuffled(images.shape[0], context.seed, "distill order") if is_array(images) else None
        replay = Replay(images, self.batch_size, order)

        def loss(step: Step, batch: Tensor) -> Tensor:
            batch = batch.to(device)
            with torch.no_grad():
                wanted = teacher(batch)
            return softened_kl(student(batch), wanted, self.temperature)

        masks = Fixed.of(context.pruned, trainable)
        with evaluating(teacher):
            losses = fit(student, Training("distill", lambda _: replay, loss, trainable, self.schedule, masks), context)
        after = alignment(student, teacher, images, context.pruned)
        return HealingReport("distill", asdict(self), losses, before, after, time.perf_counter() - began)
