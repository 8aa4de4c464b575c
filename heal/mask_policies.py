"""What becomes of masked weights in one step of training: they stay what they are, or the mask follows the weights.

No policy needs a trick of autograd: between forward and backward the parameter is what the network computes
with, afterwards its gradient is put right, and the optimiser sees an ordinary parameter with its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from heal.masking import keep_best
from heal.values import NM, ChannelCut, Mask

Weights = Mapping[str, nn.Parameter]
"""What trains, by its dotted name."""


class MaskPolicy(Protocol):
    """The loop runs forward and backward inside `masked`, then the optimiser, then `settle`."""

    def masked(self, weights: Weights) -> AbstractContextManager[None]: ...

    def settle(self, weights: Weights) -> None: ...


@dataclass(frozen=True)
class Fixed:
    """The mask stays: gradients are masked before the step and weights after it.

    keep: 1 where a weight stays, else 0, by the parameter's name, in its dtype and on its device.
    """

    keep: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, pruned: Mask | ChannelCut, weights: Weights) -> Fixed:
        """The mask of those weights that train; of a cut nothing needs to be held."""
        keep = {f"{layer}.weight": keep for layer, keep in pruned.keep.items()} if isinstance(pruned, Mask) else {}
        return cls({name: kept.to(weights[name]) for name, kept in keep.items() if name in weights})

    @contextmanager
    def masked(self, weights: Weights) -> Iterator[None]:
        """Forward and backward; then no masked weight has a gradient."""
        yield
        for name, kept in self.keep.items():
            gradient = weights[name].grad
            if gradient is not None:
                gradient.mul_(kept)

    def settle(self, weights: Weights) -> None:
        """What the optimiser's memory or decay moved goes back to zero."""
        with torch.no_grad():
            for name, kept in self.keep.items():
                weights[name].mul_(kept)


@dataclass(frozen=True)
class Dynamic:
    """Between steps a parameter is a dense, latent weight w; the network computes with m w, where the mask m
    keeps its `kept` largest |w|, chosen anew in every step; every weight gets the gradient g of m w:

        grad = g + decay (1 - m) w

    kept: how many weights stay, by the parameter's name. decay: of what is masked, >= 0, on top of the
    optimiser's own; 5e-5 in UniPTS, 2e-4 in SR-STE. pattern: how they lie, if not anyhow. Source: SR-STE (Zhou et
    al., ICLR 2021), UniPTS.
    """

    kept: Mapping[str, int]
    decay: float
    pattern: NM | None = None

    @contextmanager
    def masked(self, weights: Weights) -> Iterator[None]:
        """The parameters hold m w inside, and the latent w again afterwards, also after an exception."""
        masks = self.masks(weights)
        latent = {name: weights[name].detach().clone() for name in masks}
        self._write(weights, masks)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, dense in latent.items():
                    weights[name].copy_(dense)
        for name, keep in masks.items():
            gradient = weights[name].grad
            if gradient is not None:
                gradient.add_(latent[name].masked_fill(keep, 0), alpha=self.decay)

    def settle(self, weights: Weights) -> None:
        """Latent weights stay dense until the end."""

    def materialise(self, weights: Weights) -> dict[str, Tensor]:
        """Write m w into the parameters for good; the masks (bool, by the parameter's name)."""
        masks = self.masks(weights)
        self._write(weights, masks)
        return masks

    def masks(self, weights: Weights) -> dict[str, Tensor]:
        """Where the largest |w| are; of equal ones the lower index stays. Raises NumericalError on NaN."""
        return {name: keep_best(weights[name].detach().abs(), count, self.pattern) for name, count in self.kept.items()}

    def _write(self, weights: Weights, masks: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, keep in masks.items():
                weights[name].masked_fill_(~keep, 0)
