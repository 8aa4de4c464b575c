"""What the library takes as images, and how it walks them in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeGuard, cast, runtime_checkable

import torch
from torch import Tensor

from heal.errors import ImagesError


@runtime_checkable
class ImageArray(Protocol):
    """Images that are fetched by index: `array[LongTensor [k]]` gives float32 [k, c, h, w]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor: ...


Images = Tensor | ImageArray | Iterable[Tensor]


@dataclass(frozen=True)
class Replay:
    """Batches [b, c, h, w] in one fixed order, the same every epoch (STARFISH replays its batches).

    An image array is dealt in the order of `order` (indices, of all images or some); batches that the
    caller made stay as they are.
    """

    images: Images
    batch_size: int
    order: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.images, Iterator):
            raise ImagesError("images: got a one-shot iterator; pass a tensor, a list of batches or a DataLoader")
        if self.batch_size < 1:
            raise ImagesError(f"images: batch_size {self.batch_size} must be at least 1")
        if is_array(self.images) and (len(self.images.shape) != 4 or self.images.shape[0] == 0):
            raise ImagesError(f"images: expected a non-empty [n, channels, height, width], got {self.images.shape}")

    def __len__(self) -> int:
        if is_array(self.images):
            return -(-(self.images.shape[0] if self.order is None else len(self.order)) // self.batch_size)
        if isinstance(self.images, Sized):
            with suppress(TypeError):  # a DataLoader of a stream has the method and no length
                return len(self.images)
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[Tensor]:
        return self.starting_at(0)

    def starting_at(self, first: int) -> Iterator[Tensor]:
        """The batches from number `first` on."""
        if is_array(self.images):
            yield from self._dealt(self.images, first)
            return
        for index, batch in enumerate(cast("Iterable[Tensor]", self.images)):
            if index >= first:
                yield checked(batch)

    def _dealt(self, images: ImageArray, first: int) -> Iterator[Tensor]:
        order = torch.arange(images.shape[0]) if self.order is None else self.order
        for start in range(first * self.batch_size, len(order), self.batch_size):
            yield checked(images[order[start : start + self.batch_size]])


def is_array(images: Images) -> TypeGuard[Tensor | ImageArray]:
    """Whether images are fetched by index (rather than handed over in ready batches)."""
    return hasattr(images, "shape") and not isinstance(images, (list, tuple))


def first(images: Images, count: int, batch_size: int) -> list[Tensor]:
    """The first `count` images (fewer if there are no more) as batches held in memory."""
    taken: list[Tensor] = []
    for batch in Replay(images, batch_size):
        taken.append(batch[: count - sum(len(other) for other in taken)])
        if sum(len(other) for other in taken) >= count:
            break
    return taken


def shuffled(count: int, seed: int, purpose: str) -> Tensor:
    """A permutation [count] drawn from a generator of its own, named by (seed, purpose)."""
    return torch.randperm(count, generator=generator(seed, purpose))


def generator(seed: int, purpose: str) -> torch.Generator:
    """A generator that depends on nothing but (seed, purpose)."""
    mixed = seed
    for letter in purpose.encode():
        mixed = (mixed * 1_000_003 + letter) % (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


def checked(batch: Tensor) -> Tensor:
    """The batch, if it is one: float [b, channels, height, width]."""
    if not isinstance(batch, Tensor) or batch.ndim != 4 or not batch.is_floating_point():
        found = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise ImagesError(f"images: a batch must be a float tensor [n, channels, height, width], got {found}")
    return batch
