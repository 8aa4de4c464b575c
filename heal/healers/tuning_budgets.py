"""How much a layer is tuned, on what, and by which error: the two published codes of POT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from heal.healers.layer_batches import Drawn, Pair, Repeated, Site
from heal.images import generator
from heal.training import Adam, Batches, Schedule, Step

EPS = 1e-8
"""Added to the loss that others are relative to (POT)."""


class TuningBudget(Protocol):
    """name: the method's. looser: by how much the sparsity of each level is less than the final one; the last is 0."""

    name: ClassVar[str]
    looser: ClassVar[tuple[float, ...]]

    def schedule(self, lr: float, factors: Mapping[str, float]) -> Schedule: ...

    def batches(self, site: Site, level: int) -> Callable[[int], Batches[Pair]]: ...

    def error(self, answer: Tensor, wanted: Tensor, channel_axis: int) -> Tensor: ...

    def coasts(self, step: Step, error: Tensor) -> bool: ...


@dataclass(frozen=True)
class Openvino:
    """Two levels of `iterations` random batches of 50 images, `steps` steps on each; mean squared error.

    images: the pool [n, c, h, w] that batches are drawn from, the same ones for all layers.
    """

    images: Tensor
    seed: int
    iterations: int = 30
    steps: int = 40

    name: ClassVar[str] = "layerwise"
    looser: ClassVar[tuple[float, ...]] = (0.1, 0.0)
    POOL: ClassVar[int] = 300
    BATCH: ClassVar[int] = 50

    def schedule(self, lr: float, factors: Mapping[str, float]) -> Schedule:
        """An epoch is a batch; the rate is constant."""
        return Schedule(self.iterations, lr, lr, optimiser=Adam(factors))

    def batches(self, site: Site, level: int) -> Callable[[int], Batches[Pair]]:
        """The batch of an iteration, as often as there are steps."""

        def repeated(iteration: int) -> Repeated:
            drawn = generator(self.seed, f"layerwise batch {level * self.iterations + iteration}")
            return Repeated(
                site, self.images[torch.randperm(len(self.images), generator=drawn)[: self.BATCH]], self.steps
            )

        return repeated

    def error(self, answer: Tensor, wanted: Tensor, channel_axis: int) -> Tensor:
        """The mean over all that the layer answers."""
        return mse_loss(answer, wanted)

    def coasts(self, step: Step, error: Tensor) -> bool:
        """Whether the error, relative to the first on its batch, is less than it was a step before."""
        if step.number == 0:
            return False
        losses = [*step.losses[-2 * self.steps :], float(error.detach())]
        return self._relative(losses, step.number) < self._relative(losses[:-1], step.number - 1)

    def _relative(self, losses: Sequence[float], number: int) -> float:
        """Of the last of these losses, which is that of step `number`."""
        return losses[-1] / (losses[-1 - number % self.steps] + EPS)


@dataclass(frozen=True)
class Msbench:
    """Up to `steps` steps, each on a batch drawn with replacement; squared error summed over channels.

    images: the batches, of 64 unless the caller made them. cache_bytes: of memory for a layer's inputs and outputs.
    """

    images: Sequence[Tensor]
    seed: int
    cache_bytes: int
    steps: int = 20_000

    name: ClassVar[str] = "layerwise"
    looser: ClassVar[tuple[float, ...]] = (0.0,)
    BATCH: ClassVar[int] = 64
    ENOUGH: ClassVar[float] = 1e-5

    def schedule(self, lr: float, factors: Mapping[str, float]) -> Schedule:
        """A constant rate, until the error is small enough."""
        return Schedule(1, lr, lr, optimiser=Adam(factors), stop_below=self.ENOUGH)

    def batches(self, site: Site, level: int) -> Callable[[int], Batches[Pair]]:
        """One epoch that draws a batch for each step."""
        drawn = generator(self.seed, f"layerwise batches of {site.layer}")
        numbers = torch.randint(len(self.images), (self.steps,), generator=drawn).tolist()
        batches = Drawn(site, self.images, numbers, self.cache_bytes)
        return lambda _: batches

    def error(self, answer: Tensor, wanted: Tensor, channel_axis: int) -> Tensor:
        """The sum over channels, the mean over images and positions."""
        return (answer - wanted).square().sum(channel_axis).mean()

    def coasts(self, step: Step, error: Tensor) -> bool:
        """Never: every step has its gradient."""
        return False
