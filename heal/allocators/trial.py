"""How good an allocation is: mask the network by it and ask it what the dense one was asked.

A candidate is the dense network with the weights of least magnitude zeroed, layer by layer as the allocation
says, and its BatchNorm statistics estimated anew (a masked network answers near chance with the dense ones).
Its fitness is how well its answers to the calibration images fit the dense network's, or the labels of those
images where a method was given them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from heal.batchnorm import reestimate
from heal.errors import ImagesError, MethodError
from heal.evaluation import agreement, predict, top1
from heal.families.discovery import batch_norms
from heal.images import ImageArray, Images, Replay, is_array
from heal.method import AllocationContext
from heal.naming import refuse_unknown

Fitness = tuple[float, float]
"""Higher is better; the second number breaks ties of the first, so that small sets of images rank too."""

Judge = Literal["agreement", "kl"]
"""Which number comes first: "agreement", the share of images of the same class; "kl", minus the divergence."""

Norms = Literal["cumulative", "ema_reset"]
"""How BatchNorm statistics are estimated; the words of `heal.batchnorm.reestimate`."""

ROWS = 1024
"""Images whose divergence is computed at once: it takes several times the memory of their logits."""


class Trial:
    """Judges candidates on one working copy of the dense network, which is refilled for each.

    layers: those whose weights a candidate masks. images: calibration images, as `at_most` gives them; they
    are walked twice for a candidate, once where there is no BatchNorm. judge: what comes first, or the labels
    [n] of the images, as `labels_of` gives them: then it is top-1. The dense network, in eval mode, is only
    read, and answers once. Memory beside the copy: one int32 for each weight of the layers. Raises ImagesError.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        images: Images,
        batch_size: int,
        judge: Judge | Tensor,
        norms: Norms,
    ) -> None:
        self._images, self._batch_size, self._judge, self._norms = images, batch_size, judge, norms
        self._dense = {layer: _weight(model, layer) for layer in layers}
        self._ranks = {layer: _ranks(weight) for layer, weight in self._dense.items()}
        self._answers = predict(model, images, batch_size)
        if isinstance(judge, Tensor):
            _refuse_labels(judge, self._answers)
        self._known: dict[tuple[int, ...], Fitness] = {}
        self.network = copy.deepcopy(model).eval()

    def fitness(self, kept: Mapping[str, int]) -> Fitness:
        """What the network is worth that keeps so many weights of every layer. Raises NumericalError.

        Agreement and top-1 are in [0, 1]; the divergence is KL(dense || masked) in nats, the mean over images.
        A candidate that was tried is not tried again: it would answer the same.
        """
        counts = tuple(kept[layer] for layer in self._ranks)
        if counts not in self._known:
            self._known[counts] = self._tried(kept)
        return self._known[counts]

    def _tried(self, kept: Mapping[str, int]) -> Fitness:
        self.refill(kept)
        answers = predict(self.network, self._images, self._batch_size)
        near = -divergence(self._answers, answers)
        if isinstance(self._judge, Tensor):
            return top1(answers, self._judge), near
        same = agreement(self._answers, answers)
        return (same, near) if self._judge == "agreement" else (near, same)

    def refill(self, kept: Mapping[str, int]) -> None:
        """Make the working copy the network that keeps so many weights of every layer, its BatchNorms estimated."""
        with torch.no_grad():
            for layer, ranks in self._ranks.items():
                _weight(self.network, layer).copy_(self._dense[layer]).masked_fill_(ranks >= kept[layer], 0)
        if batch_norms(self.network):
            reestimate(self.network, self._images, self._norms, self._batch_size)


def divergence(dense: Tensor, other: Tensor) -> float:
    """KL(dense || other) in nats of what two sets of logits [n, classes] say, the mean over images; float64."""
    total = 0.0
    for p, q in zip(torch.split(dense, ROWS), torch.split(other, ROWS), strict=True):
        log_p, log_q = p.double().log_softmax(1), q.double().log_softmax(1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(dense)


def at_most(context: AllocationContext, count: int, method: str) -> Images:
    """The first `count` calibration images, or all; fetched when they are walked. Raises ImagesError."""
    images = context.images
    if images is None:
        raise ImagesError(f"{method} tries its candidates on calibration images and was given none; pass images")
    if is_array(images):
        return images[:count] if isinstance(images, Tensor) else _Head(images, min(count, images.shape[0]))
    return _Batches(images, count)


def labels_of(context: AllocationContext, count: int, method: str) -> Tensor:
    """The labels [n] of the images that `at_most` gives. Raises ImagesError."""
    images, labels = context.images, context.labels
    if labels is None:
        raise ImagesError(
            f"{method}.fitness = 'labels' reads the labels of the calibration images and was given none; give its "
            "context labels, or choose 'agreement' or 'kl'"
        )
    if images is not None and is_array(images) and labels.shape != images.shape[:1]:
        raise ImagesError(f"labels {list(labels.shape)} do not fit images {list(images.shape)}: one label an image")
    return labels[:count]


def refuse_trial(
    method: str, images: int, judge: str, norms: str = "cumulative", known: Iterable[str] = ("agreement", "kl")
) -> None:
    """Raise MethodError unless a searching method's params mean something; `known`: what may judge."""
    refuse_unknown(f"{method}.fitness", judge, known)
    refuse_unknown(f"{method}.bn", norms, ("cumulative", "ema_reset"))
    if images < 1:
        raise MethodError(f"{method}.images = {images} must be at least 1")


def _refuse_labels(labels: Tensor, logits: Tensor) -> None:
    """Raise ImagesError unless every image has a label, and the network a class for it."""
    top1(logits, labels)  # it refuses another number of labels
    classes = logits.shape[1]
    strange = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if strange:
        raise ImagesError(
            f"labels: that of image {strange[0]} is {int(labels[strange[0]])}, but the network has {classes} classes, "
            f"0 to {classes - 1}; leave out images of unknown class"
        )


def _weight(model: nn.Module, layer: str) -> Tensor:
    return model.get_submodule(layer).get_parameter("weight").detach()


def _ranks(weight: Tensor) -> Tensor:
    """The place of every weight, largest magnitude first and of equal ones the earlier, as `magnitude` keeps them."""
    order = torch.sort(weight.abs().flatten(), descending=True, stable=True).indices
    places = torch.arange(len(order), dtype=torch.int32, device=weight.device)
    return torch.empty_like(places).scatter_(0, order, places).view(weight.shape)


@dataclass(frozen=True)
class _Head:
    """The first images of an array."""

    images: ImageArray
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.images.shape[1:])

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        return self.images[indices]


@dataclass(frozen=True)
class _Batches:
    """The first images of ready batches, which stay as they are but for the last."""

    images: Images
    count: int

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        return sum(1 for _ in self)  # counted once: whoever walks them asks first

    def __iter__(self) -> Iterator[Tensor]:
        left = self.count
        for batch in Replay(self.images, 1):
            yield batch[:left]
            left -= len(batch)
            if left <= 0:
                return
