"""BatchNorm statistics re-estimated on unlabeled images, in the three ways that the literature uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from heal.errors import ImagesError
from heal.families.discovery import batch_norms
from heal.images import Images, Replay, is_array
from heal.merging import merge
from heal.modes import evaluating, listening
from heal.progress import Report, quiet
from heal.statistics import moments
from heal.values import LayerStats

Mode = Literal["cumulative", "ema_reset", "exact"]


def reestimate(
    model: nn.Module,
    images: Images,
    mode: Mode = "cumulative",
    batch_size: int = 128,
    batches: int | None = None,
    momentum: float = 0.1,
    report: Report = quiet,
) -> int:
    """Forget the running statistics and estimate them anew; gives how many images were used.

    cumulative: the mean of the batches' means and unbiased variances (torch, momentum None). exact:
    mean and variance (divisor N) of all rows together, which knows the variance between batches too;
    float64; on a single batch the network then answers as it does in train mode.
    ema_reset: torch's moving average from mean 0 and variance 1, of which (1 - momentum) ** batches
    stays. All three normalise by the batch while they run, so that every layer sees repaired inputs.
    Only BatchNorms are in train mode: no dropout, no stochastic depth. An incomplete last batch would
    weigh as much as a whole one and is left out, unless it is the only one. `batches`: at most so many
    (all; ema_reset goes around again until it has them). Raises ImagesError where a batch gives a norm
    one value per channel, as a single image does on a map of one pixel.
    """
    norms = batch_norms(model)
    seen = 0
    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        for norm in norms.values():
            norm.reset_running_stats()
            stack.enter_context(_training(norm, momentum if mode == "ema_reset" else None))
        stack.enter_context(listening(model, {f"{name}.input": partial(_refuse_single, name) for name in norms}))
        exact = {name: _Rows() for name in norms} if mode == "exact" else {}
        stack.enter_context(listening(model, {f"{name}.input": rows.add for name, rows in exact.items()}))
        device = next(model.parameters()).device
        chosen = list(_numbers(Replay(images, batch_size), batches, again=mode == "ema_reset"))
        for done, batch in enumerate(_walk(Replay(images, batch_size), chosen), start=1):
            model(batch.to(device))
            seen += len(batch)
            report("batch norms", done, len(chosen))
        for name, rows in exact.items():
            rows.write(norms[name])
    return seen


def _refuse_single(norm: str, x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise ImagesError(
            f"images: BatchNorm {norm} sees {list(x.shape)}, a single value per channel, which has no variance; "
            "pass batches of 2 images or more"
        )


def _walk(replay: Replay, chosen: list[int]) -> Iterator[Tensor]:
    """The batches of these numbers; after the last number of a round it begins again."""
    at = 0
    while at < len(chosen):
        for number, batch in enumerate(replay):
            if at == len(chosen) or chosen[at] != number:
                break
            yield batch
            at += 1


def _numbers(replay: Replay, batches: int | None, again: bool) -> Iterator[int]:
    """Numbers of the batches to use: whole ones, from the first on."""
    whole = _whole(replay)
    if not whole:
        raise ImagesError("images: none to estimate BatchNorm statistics from; pass at least one batch")
    wanted = whole if batches is None else batches if again else min(batches, whole)
    yield from (number % whole for number in range(wanted))


def _whole(replay: Replay) -> int:
    """How many batches are not cut short at the end."""
    if is_array(replay.images):
        return max(int(replay.images.shape[0]) // replay.batch_size, 1)
    sizes = [len(batch) for batch in replay]
    return len(sizes) - 1 if len(sizes) > 1 and sizes[-1] < sizes[0] else len(sizes)


@contextmanager
def _training(norm: _BatchNorm, momentum: float | None) -> Iterator[None]:
    before = norm.momentum
    norm.train()
    norm.momentum = momentum
    try:
        yield
    finally:
        norm.momentum = before


class _Rows:
    """Moments of what enters a BatchNorm, over all rows of all batches."""

    def __init__(self) -> None:
        self.total: LayerStats | None = None

    def add(self, x: Tensor) -> None:
        rows = x.movedim(1, -1)
        batch = moments(rows.reshape(rows.shape[0], -1, rows.shape[-1]))
        self.total = batch if self.total is None else merge(self.total, batch)

    def write(self, norm: _BatchNorm) -> None:
        if self.total is None:
            return  # never called, as a branch that the network does not take
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(self.total.mean)
        norm.running_var.copy_(self.total.m2 / self.total.count)
