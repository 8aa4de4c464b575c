"""Least squares row by row, each on the weights that its mask keeps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from heal.errors import NumericalError

ROOM = 1 << 28
"""Bytes of the systems of rows that are solved together, one row at least."""


def operations(keep: Tensor) -> float:
    """Multiplications that a solve takes: a third of the cube of what each row of the mask [out, ...] keeps."""
    return float(keep.flatten(1).sum(1).double().pow(3).sum() / 3)


def solved(moment: Tensor, cross: Tensor, start: Tensor, keep: Tensor, damping: float) -> Tensor:
    """The rows [out, d] that minimise w M w - 2 w c + ridge |w - start|^2 on what each keeps, and are 0 elsewhere.

    moment M [d, d], cross [d, out], start and keep [out, d]. ridge: of every row, `damping` times the mean of M's
    diagonal over what the row keeps; where that is 0, nothing enters and the row stays. Raises NumericalError.
    """
    found, kept = torch.zeros_like(start), keep.sum(1)
    for rows, width in _together(kept):
        index = torch.argsort(keep[rows].byte(), dim=1, descending=True, stable=True)[:, :width]
        there = torch.arange(width, device=keep.device) < kept[rows].unsqueeze(1)
        system = moment[index.unsqueeze(2), index.unsqueeze(1)]
        system.mul_(there.unsqueeze(2)).mul_(there.unsqueeze(1))
        diagonal = system.diagonal(dim1=1, dim2=2)
        mean = diagonal.sum(1, keepdim=True) / kept[rows].unsqueeze(1)
        ridge = torch.where(mean > 0, damping * mean, damping)
        diagonal.add_(torch.where(there, ridge, 1.0))  # what only fills up a row has a system of its own, and is 0
        wanted = (cross.T[rows].gather(1, index) + ridge * start[rows].gather(1, index)) * there
        factor, failed = torch.linalg.cholesky_ex(system)
        if bool(failed.any()):
            raise NumericalError(f"the second moment is not positive definite at damping {damping:g}; raise it")
        found[rows.unsqueeze(1), index] = torch.cholesky_solve(wanted.unsqueeze(2), factor).squeeze(2)
    return found


def _together(kept: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows that are solved together, of about as many weights, and how many the largest of them keeps."""
    order = torch.argsort(kept, descending=True, stable=True)
    order, at = order[: int((kept > 0).sum())], 0
    while at < len(order):
        width = int(kept[order[at]])
        count = max(1, ROOM // (8 * width**2))
        yield order[at : at + count], width
        at += count
