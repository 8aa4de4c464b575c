"""What enters a layer and what should leave it: batch after batch, nothing behind the layer being run.

A layer that is called several times in one pass is seen at its first call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from heal.images import Images, Replay
from heal.modes import Listener, listening
from heal.states import Layout, chosen

Pair = tuple[Tensor, Tensor]
"""A layer's input and the output that is wanted of it, as the layer takes and gives them."""


@dataclass(frozen=True)
class Site:
    """One layer in both networks, which are in eval mode. inputs: whose input the layer is tuned on.

    stay: the channels of its output that the student still has, all for None; layout: where the output has them.
    goal: the teacher's layer whose output is wanted, "" for the same.
    """

    layer: str
    student: nn.Module
    teacher: nn.Module
    inputs: Literal["dense", "pruned"]
    stay: Tensor | None = None
    layout: Layout = "maps"
    goal: str = ""

    def pair(self, images: Tensor) -> Pair:
        """What enters the layer, of the teacher or of the student as it is now, and what the teacher's layer gives."""
        images = images.to(next(self.student.parameters()).device)
        entered, left = _seen(self.teacher, images, f"{self.layer}.input", f"{self.goal or self.layer}.output")
        if self.inputs == "pruned":
            (entered,) = _seen(self.student, images, f"{self.layer}.input")
        return entered, chosen(left, self.layout, self.stay)

    def follows(self, before: Site, images: Tensor) -> bool:
        """Whether in both networks what leaves the layer before enters this one just as it is, by these images."""
        images = images.to(next(self.student.parameters()).device)
        return (
            self.inputs == before.inputs == "pruned"
            and before.stay is None
            and _is_passed_on(self.student, before.layer, self.layer, images)
            and _is_passed_on(self.teacher, before.goal or before.layer, self.goal or self.layer, images)
        )

    def onwards(self, before: Site, pair: Pair) -> Pair:
        """This layer's pair, from that of the layer before for the same images: the student's input is led through
        the layer as it is now, the teacher's output through the teacher's next."""
        device = next(self.student.parameters()).device
        entered, left = (x.to(device) for x in pair)
        with torch.no_grad():
            entered = self.student.get_submodule(before.layer)(entered)
            left = self.teacher.get_submodule(self.goal or self.layer)(left)
        return entered, chosen(left, self.layout, self.stay)


@dataclass(frozen=True)
class Repeated:
    """The same images [b, c, h, w] in `steps` steps; the networks run once."""

    site: Site
    images: Tensor
    steps: int

    def __len__(self) -> int:
        return self.steps

    def starting_at(self, first: int) -> Iterator[Pair]:
        """The pair, as often as steps are left."""
        pair = self.site.pair(self.images)
        for _ in range(first, self.steps):
            yield pair


@dataclass(frozen=True)
class Drawn:
    """A batch for every step, by its number. The networks run once a batch as long as pairs fit in `cache_bytes`
    of memory, and once a step for the batches that do not; the values are the same.

    before: the site that this one follows on, and its pairs by number, which are led on and let go.
    """

    site: Site
    batches: Sequence[Tensor]
    numbers: Sequence[int]
    cache_bytes: int
    before: tuple[Site, dict[int, Pair]] | None = None
    kept: dict[int, Pair] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.numbers)

    def starting_at(self, first: int) -> Iterator[Pair]:
        """The pairs of the steps that are left."""
        for number in self.numbers[first:]:
            yield self._pair(number)

    def _pair(self, number: int) -> Pair:
        if number in self.kept:
            entered, left = self.kept[number]
            device = next(self.site.student.parameters()).device
            return entered.to(device), left.to(device)
        pair = self._made(number)
        if self._held() + pair[0].nbytes + pair[1].nbytes <= self.cache_bytes:
            self.kept[number] = (pair[0].cpu(), pair[1].cpu())
        return pair

    def _made(self, number: int) -> Pair:
        before, pairs = self.before or (self.site, {})
        if number in pairs:
            return self.site.onwards(before, pairs.pop(number))
        return self.site.pair(self.batches[number])

    def _held(self) -> int:
        pairs = [*self.kept.values(), *(self.before[1].values() if self.before else ())]
        return sum(entered.nbytes + left.nbytes for entered, left in pairs)

    def for_next(self, site: Site, numbers: Sequence[int]) -> Drawn:
        """The same batches for another site, after this one has been tuned."""
        batches = self.batches
        if not self.kept or not site.follows(self.site, batches[0][:1]):
            return Drawn(site, batches, numbers, self.cache_bytes)
        wanted = set(numbers)
        pairs = {number: pair for number, pair in self.kept.items() if number in wanted}
        return Drawn(site, batches, numbers, self.cache_bytes, (self.site, pairs))


@dataclass(frozen=True)
class Sampled:
    """For every step some of the same images [n, c, h, w], by their numbers. The networks run once, a few images at a
    time, if all pairs fit in `cache_bytes` of memory, else once a step; the values are the same.

    The images are the outermost part of a layer's first axis, which may hold several rows of each; what is no multiple
    of them depends on no single image, and is given whole.
    """

    site: Site
    images: Tensor
    numbers: Sequence[Tensor]
    cache_bytes: int
    together: int = 64

    def __len__(self) -> int:
        return len(self.numbers)

    def starting_at(self, first: int) -> Iterator[Pair]:
        """The pairs of the steps that are left."""
        pool, device = self._pool(), next(self.site.student.parameters()).device
        for numbers in self.numbers[first:]:
            if pool is None:
                yield self.site.pair(self.images[numbers])
            else:
                entered, left = (self._of(x, numbers).to(device) for x in pool)
                yield entered, left

    def _pool(self) -> Pair | None:
        pairs: list[Pair] = []
        for some in torch.split(self.images, self.together):
            entered, left = self.site.pair(some)
            if (entered.nbytes + left.nbytes) * len(self.images) > self.cache_bytes * len(some):
                return None
            if len(entered) % len(some) or len(left) % len(some):
                return entered.cpu(), left.cpu()
            pairs.append((entered.cpu(), left.cpu()))
        entered, left = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
        return entered, left

    def _of(self, x: Tensor, numbers: Tensor) -> Tensor:
        rows, rest = divmod(len(x), len(self.images))
        return x if rest else x.view(len(self.images), rows, *x.shape[1:])[numbers].flatten(0, 1)


@dataclass(frozen=True)
class _Dealt(Sequence[Tensor]):
    """Batches by number, fetched when they are asked for: of a stream by walking up to it, so that none is held."""

    replay: Replay

    def __len__(self) -> int:
        return len(self.replay)

    def __getitem__(self, number: int) -> Tensor:  # type: ignore[override]
        return next(self.replay.starting_at(number))


def numbered(images: Images, batch_size: int) -> Sequence[Tensor]:
    """The batches by number."""
    return _Dealt(Replay(images, batch_size))


def _seen(model: nn.Module, images: Tensor, *taps: str) -> list[Tensor]:
    """What passes the taps, in their order; the pass ends at the last."""
    seen: list[Tensor] = []

    def listener(is_last: bool) -> Listener:
        def listen(x: Tensor) -> None:
            seen.append(x)
            if is_last:
                raise _AllSeen

        return listen

    listeners = {tap: listener(tap == taps[-1]) for tap in taps}
    with torch.no_grad(), listening(model, listeners), suppress(_AllSeen):
        model(images)
    return seen


def _is_passed_on(model: nn.Module, giver: str, taker: str, images: Tensor) -> bool:
    """Whether a layer's output is, when it enters another, what it was when it left."""
    left: list[Tensor] = []
    entered: list[Tensor] = []
    taps = {
        f"{giver}.output": lambda x: left.append(x.clone()),  # something between them may write in place
        f"{taker}.input": lambda x: entered.append(x.clone()),
    }
    with torch.no_grad(), listening(model, taps):
        model(images)
    return torch.equal(left[0], entered[0])


class _AllSeen(Exception):
    """Nothing that follows in this forward pass is listened to."""
