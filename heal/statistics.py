"""Moments of what flows through a network: one pass, streaming, mergeable.

Each batch gives (count, mean, m2) in float32 around a shift close to its mean, a few images at a time
so that they stay in the processor's cache; batches are merged in float64 by Chan's rule. So the result
does not depend on how images were batched (to about 1e-7), and memory not on how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import Tensor, nn

from heal.errors import ArchitectureError
from heal.families.discovery import channel_axis
from heal.images import Images, Replay
from heal.merging import merge
from heal.modes import Listener, evaluating, listening
from heal.patch_moments import PatchStream
from heal.progress import Report, quiet
from heal.saliency import saliencies
from heal.values import LayerStats

TOGETHER = 4
"""Images whose rows are summed at once. Measured on DeiT-Tiny: half the time of a whole batch of 32."""

BLOCK = 128
"""Channels whose products are formed at once. Measured on 768 channels: two thirds of the time of all at once."""

SAMPLED = 8
"""Every so many rows make the shift; it need not be the mean, only near it."""


def capture(
    model: nn.Module,
    images: Images,
    taps: Mapping[str, bool],
    batch_size: int = 64,
    report: Report = quiet,
    stop_early: bool = False,
) -> dict[str, LayerStats]:
    """Moments at every tap ("<module>.input" or ".output"; True asks for the second moment as well).

    A tap "<layer>.saliency" takes a pass of its own, with gradients (heal/saliency.py).

    A tap "<layer>.patches" gives two, ".patches/0" and ".patches/1": the second moments of what its weight
    multiplies, over the images with even and with odd number; none for a layer that is never called.

    Rows are pooled over images and positions; channels are the last axis of what a Linear sees and
    axis 1 of what a convolution sees. The model is run once, in eval mode, without gradients, and
    keeps its mode and hooks. stop_early: leave each pass as soon as every tap was seen once, which saves
    what lies behind them. Raises NumericalError on NaN or infinity, ArchitectureError where nothing passed a tap.
    """
    felt = [tap.removesuffix(".saliency") for tap in taps if tap.endswith(".saliency")]
    if felt:
        rest = {tap: comoment for tap, comoment in taps.items() if not tap.endswith(".saliency")}
        found = saliencies(model, images, felt, batch_size, report)
        return found | (capture(model, images, rest, batch_size, report, stop_early) if rest else {})
    streams = {tap: _stream(model, tap, comoment) for tap, comoment in taps.items()}
    replay = Replay(images, batch_size)
    total = len(replay)
    device = next(model.parameters()).device
    waiting: set[str] = set()
    with evaluating(model), torch.inference_mode(), listening(model, _listeners(streams, waiting, stop_early)):
        for done, batch in enumerate(replay, start=1):
            waiting.update(streams)
            for stream in streams.values():
                stream.begin(len(batch))
            with suppress(_AllSeen):
                model(batch.to(device))
            report("activations", done, total)
    return {name: stats for tap, stream in streams.items() for name, stats in stream.results(tap).items()}


class _AllSeen(Exception):
    """Nothing that follows in this forward pass is listened to."""


def _stream(model: nn.Module, tap: str, comoment: bool) -> _Stream | PatchStream:
    name, _, side = tap.rpartition(".")
    module = model.get_submodule(name)
    if side != "patches":
        return _Stream(channel_axis(module), comoment)
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    return PatchStream(module)


def _listeners(
    streams: Mapping[str, _Stream | PatchStream], waiting: set[str], stop_early: bool
) -> dict[str, Listener]:
    def listener(tap: str, stream: _Stream | PatchStream) -> Listener:
        def listen(x: Tensor) -> None:
            stream.add(x)
            waiting.discard(tap)
            if stop_early and not waiting:
                raise _AllSeen

        return listen

    return {tap: listener(tap, stream) for tap, stream in streams.items()}


def moments(rows: Tensor, comoment: bool = False) -> LayerStats:
    """Moments of one batch [groups, rows, channels]; sums are float32 within a group and float64 beyond,
    products float32 within the batch: rounding that grows with neither the images nor the batches."""
    count, channels = rows.shape[0] * rows.shape[1], rows.shape[2]
    sample = rows[:, ::SAMPLED].float()
    shift = sample.sum(0).sum(0) / (sample.shape[0] * sample.shape[1])
    products = rows.new_zeros(channels, channels, dtype=torch.float32) if comoment else None
    sums, squares = (rows.new_zeros(channels, dtype=torch.float64) for _ in range(2))
    for some in torch.split(rows, TOGETHER):
        centred = some.float() - shift
        if products is not None:
            _add_products(products, centred.reshape(-1, channels))
        sums += centred.sum(1).double().sum(0)
        squares += centred.square_().sum(1).double().sum(0)
    m2 = (squares - sums.square() / count).clamp_(min=0)
    if products is not None:
        products = (products.triu() + products.triu(1).T).double() - torch.outer(sums, sums) / count
    return LayerStats(count, shift.double() + sums / count, m2, products)


def _add_products(total: Tensor, rows: Tensor) -> None:
    """total [c, c] += rows.T @ rows for rows [r, c], on and above the diagonal: the rest is the same again."""
    for first in range(0, len(total), BLOCK):
        block = rows[:, first : first + BLOCK]
        total[first : first + BLOCK, first:].addmm_(block.T, rows[:, first:])


class _Stream:
    """Merges the moments of the batches that pass one tap."""

    def __init__(self, channel_axis: int, comoment: bool) -> None:
        self.channel_axis, self.comoment = channel_axis, comoment
        self.total: LayerStats | None = None
        self.images = 0

    def begin(self, images: int) -> None:
        """A forward pass of so many images begins."""
        self.images += images

    def add(self, x: Tensor) -> None:
        x = x.movedim(self.channel_axis, -1)
        batch = moments(x.reshape(x.shape[0], -1, x.shape[-1]), self.comoment)
        self.total = batch if self.total is None else merge(self.total, batch)

    def results(self, tap: str) -> dict[str, LayerStats]:
        if self.total is None:
            raise ArchitectureError(
                f"statistics: nothing passed {tap}; the network reads its weight without calling it, or never does: "
                "choose methods that need no statistics of it"
            )
        on_cpu = {"mean": self.total.mean.cpu(), "m2": self.total.m2.cpu()}
        comoment = None if self.total.comoment is None else self.total.comoment.cpu()
        return {tap: LayerStats(count=self.total.count, comoment=comoment, images=self.images, **on_cpu)}
