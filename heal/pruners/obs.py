"""Optimal brain surgery, column by column: what a weight did is taken over by the columns that are still to come.

Source: SparseGPT (arXiv 2301.00774) and the copy of its code in github.com/locuslab/wanda. Of every block of columns
the weights go whose removal costs the layer's output least, w^2 / U_jj^2 with U the upper Cholesky factor of the
inverse of the inputs' second moment; the rest of the row is moved to make up for it. Deviations: moments are centred,
and the bias takes the change of the mean, which is the optimal bias; counts are exact; float64 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heal.errors import ArchitectureError, MethodError, NumericalError
from heal.masking import keep_best
from heal.merging import merge
from heal.values import NM, Allocation, LayerStats, Mask, Statistics


@dataclass(frozen=True)
class Obs:
    """damping: share of the mean diagonal added to it, > 0; 0.01. block: columns chosen at once, >= 1; 128 (both as
    the source).

    A convolution without bias gets none: the BatchNorm behind it must take the change of its mean, by any healer that
    measures its statistics anew. A Linear without one is given one.
    """

    unit: ClassVar[str] = "weights"
    writes_weights: ClassVar[bool] = True
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise MethodError(f"obs.damping = {self.damping:g} must be greater than 0, for example 0.01")
        if self.block < 1:
            raise MethodError(f"obs.block = {self.block} must be at least 1")

    @property
    def needs(self) -> frozenset[str]:
        """Second moments of what every layer's weight multiplies."""
        return frozenset({"layers patches", "stem patches", "depthwise patches", "classifier patches"})

    def prune(self, model: nn.Module, allocation: Allocation, statistics: Statistics) -> Mask:
        """The mask, and the new values of what stays."""
        keep, updates = {}, {}
        for layer, kept in allocation.kept.items():
            module = model.get_submodule(layer)
            if f"{layer}.patches/0" not in statistics:
                raise ArchitectureError(
                    f"obs: nothing passed {layer}; the network reads its weight without calling it: choose magnitude"
                )
            stats = merge(statistics[f"{layer}.patches/0"], statistics[f"{layer}.patches/1"])
            weight, bias = module.get_parameter("weight").detach(), getattr(module, "bias", None)
            try:
                solved, chosen, offset = pruned(weight.double().cpu(), stats, kept, allocation.pattern, self)
            except NumericalError as error:
                raise NumericalError(f"{layer}: {error}") from error
            keep[layer] = chosen
            updates[f"{layer}.weight"] = solved.to(weight.dtype)
            if bias is not None or isinstance(module, nn.Linear):
                updates[f"{layer}.bias"] = (offset if bias is None else bias.detach().double().cpu() + offset).to(
                    weight.dtype
                )
        return Mask(keep, updates, allocation.pattern)


def pruned(
    weight: Tensor, stats: LayerStats, kept: int, pattern: NM | None, method: Obs
) -> tuple[Tensor, Tensor, Tensor]:
    """(new weight, what stays of it, change of the bias [out]) of a weight [out, in, ...] in float64.

    Raises NumericalError when the second moment has no inverse.
    """
    covariance = stats.covariance
    groups, width = len(covariance) if covariance.ndim == 3 else 1, covariance.shape[-1]
    order = _columns(weight, pattern)
    rows = weight.flatten(1)[:, order].view(groups, -1, width)
    shares = [kept * (at + 1) // groups - kept * at // groups for at in range(groups)]
    parts = [
        _swept(part, moment[order][:, order], share, pattern, method)
        for part, moment, share in zip(rows, covariance.view(groups, width, width), shares, strict=True)
    ]
    back = torch.argsort(order)
    solved = torch.cat([part for part, _ in parts])[:, back]
    chosen = torch.cat([keep for _, keep in parts])[:, back]
    change = (weight.flatten(1) - solved).view(groups, -1, width)
    offset = torch.einsum("gow,gw->go", change, stats.mean.view(groups, width)).flatten()
    return solved.view_as(weight), chosen.view_as(weight), offset


def _columns(weight: Tensor, pattern: NM | None) -> Tensor:
    """The order of the flattened columns: for a pattern the input channels of one place of the kernel side by side."""
    columns = torch.arange(weight[0].numel()).view(weight.shape[1:])
    return (columns.movedim(0, -1) if pattern else columns).flatten()


def _swept(weight: Tensor, moment: Tensor, kept: int, pattern: NM | None, method: Obs) -> tuple[Tensor, Tensor]:
    """(new weight, what stays) of one group's rows [out, in]."""
    weight, factor = weight.clone(), _factor(moment, method.damping)
    keep = torch.ones_like(weight, dtype=torch.bool)
    weight[:, moment.diagonal() == 0] = 0
    for start, end, share in _blocks(weight, kept, pattern, method.block):
        block, upper = weight[:, start:end], factor[start:end, start:end]
        errors = torch.zeros_like(block)
        if pattern is None:
            keep[:, start:end] = keep_best((block / upper.diagonal()).abs(), share, None)
        for at in range(end - start):
            if pattern is not None and at % pattern.m == 0:
                ahead = slice(at, at + pattern.m)
                scores = (block[:, ahead] / upper.diagonal()[ahead]).abs()
                keep[:, start + at : start + at + pattern.m] = keep_best(scores, 0, pattern)
            column = block[:, at]
            error = column.masked_fill(keep[:, start + at], 0) / upper[at, at]
            block[:, at:] -= torch.outer(error, upper[at, at:])
            errors[:, at] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight * keep, keep


def _blocks(weight: Tensor, kept: int, pattern: NM | None, size: int) -> Iterator[tuple[int, int, int]]:
    """(first column, end, how many stay) of every block; a block of a pattern holds whole groups."""
    width = weight.shape[1]
    step = size if pattern is None else max(size // pattern.m, 1) * pattern.m
    for start in range(0, width, step):
        end = min(start + step, width)
        yield start, end, kept * end // width - kept * start // width


def _factor(moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped second moment. Raises NumericalError."""
    diagonal = moment.diagonal()
    damped = (moment + moment.T) / 2 + torch.diag((diagonal == 0).double() + damping * diagonal.mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    inverse = torch.cholesky_inverse(lower)
    upper: Tensor
    upper, failed_again = torch.linalg.cholesky_ex((inverse + inverse.T) / 2, upper=True)
    if int(failed) or int(failed_again):
        raise NumericalError(f"the second moment has no inverse at damping {damping:g}; raise it")
    return upper
