"""Held-out images: every tenth is never fitted, and judges whether a repair may stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from heal.errors import ImagesError
from heal.images import Images, Replay, is_array

EVERY = 10
"""The first of every so many images is held out, so that there is always one."""


def is_held_out(numbers: Tensor) -> Tensor:
    """Of the images' numbers [n], counted from 0, which are held out: bool [n]."""
    return numbers % EVERY == 0


def split(images: Images, most: int, batch_size: int) -> tuple[Replay, Replay]:
    """The first `most` images in two parts, those to fit on and those that are held out, each in batches in order.

    Nothing is held in memory. Raises ImagesError unless there are two images at least.
    """
    if is_array(images):
        numbers = torch.arange(min(int(images.shape[0]), most))
        held = is_held_out(numbers)
        parts = tuple(Replay(images, batch_size, numbers[held == wanted]) for wanted in (False, True))
    else:
        streams = (_Part(Replay(images, batch_size), most, is_held=wanted) for wanted in (False, True))
        parts = tuple(Replay(stream, batch_size) for stream in streams)
    fitted, judging = parts
    if next(iter(fitted), None) is None:
        raise ImagesError("images: every tenth is held out to judge the repair, and none is left to fit; pass more")
    return fitted, judging


def refuse_shuffled(images: Images) -> None:
    """Raise ImagesError where the first batch is another one each time: what one pass holds out the next would fit."""
    once, again = (next(iter(Replay(images, 1))) for _ in range(2))
    if once.shape != again.shape or not torch.allclose(once, again, 0, 0, equal_nan=True):
        raise ImagesError(
            "images: the first batch is another one each time, so that no image can be held out; pass shuffle=False "
            "and no augmentation, or one tensor"
        )


def is_kept(before: float, after: float) -> bool:
    """Whether a repair stays: its error on held-out images is finite, and not larger than the one before it."""
    return after <= before


@dataclass(frozen=True)
class _Part:
    """One part of a stream of batches; a batch without such images is passed over."""

    batches: Replay
    most: int
    is_held: bool

    def __iter__(self) -> Iterator[Tensor]:
        seen = 0
        for batch in self.batches:
            numbers = torch.arange(seen, min(seen + len(batch), self.most))
            chosen = batch[: len(numbers)][is_held_out(numbers).to(batch.device) == self.is_held]
            seen += len(batch)
            if len(chosen):
                yield chosen
            if seen >= self.most:
                return
