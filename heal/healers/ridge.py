"""Ridge regression on joint moments, pulled towards given weights, and how strong the pull should be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from heal.errors import MethodError, NumericalError
from heal.healers.joint_moments import Joint
from heal.naming import refuse_unknown

Rule = Literal["oas", "held_out"]
Damping = float | Rule

GRID = (1e-4, 1e-3, 1e-2, 1e-1)
LEAST = 1e-4
"""Of the shrinkage by OAS, which is nearly nothing for rows by the hundred thousand; CORP's floor has a scale."""


@dataclass(frozen=True)
class Fit:
    """Moments of all images, of those to fit on, of those held out; anchor [1, out, d]: the weights to stay near."""

    everything: Joint
    fitted: Joint
    judging: Joint
    anchor: Tensor

    @property
    def folded(self) -> tuple[Tensor, Tensor]:
        """The anchor with the bias that keeps the mean output: what damping without bound gives."""
        joint = self.everything
        return self.anchor, joint.y - torch.einsum("god,gd->go", self.anchor, joint.x)


def refuse_damping(param: str, damping: Damping) -> None:
    """Raise MethodError unless it is positive or the name of a rule."""
    if isinstance(damping, str):
        refuse_unknown(param, damping, get_args(Rule))
    elif not damping > 0:
        raise MethodError(f"{param} = {damping:g} must be greater than 0, for example 0.001")


def chosen(damping: Damping, fit: Fit) -> float:
    """The share of the mean diagonal, by the rule if it is one."""
    if damping == "oas":
        return max(oas(fit.everything.xx[0] / fit.everything.count, fit.everything.count), LEAST)
    if damping == "held_out":
        return min(GRID, key=lambda share: (_error(fit, share), -share))
    assert isinstance(damping, float | int)
    return float(damping)


def oas(covariance: Tensor, rows: int) -> float:
    """The shrinkage in [0, 1] of the oracle approximating estimator (Chen et al. 2010) for [d, d] of so many rows."""
    width = len(covariance)
    squared, trace = float(covariance.square().sum()), float(covariance.trace())
    excess = (rows + 1 - 2 / width) * (squared - trace**2 / width)
    return min(1.0, ((1 - 2 / width) * squared + trace**2) / excess) if excess > 0 else 1.0


def stable(damping: float, *joints: Joint) -> float:
    """The damping, or the first of ten and a hundred times it at which all moments are positive definite.

    Raises NumericalError.
    """
    for factor in (1, 10, 100):
        if not any(int(torch.linalg.cholesky_ex(_damped(joint, factor * damping)[0]).info) for joint in joints):
            return factor * damping
    raise NumericalError(
        f"closed form: the second moment is not positive definite at damping {damping:g}, nor at {100 * damping:g}; "
        "raise it"
    )


def _error(fit: Fit, share: float) -> float:
    """On held-out images, of the solution without them; infinite where there is none."""
    try:
        return float(fit.judging.errors(*ridge(fit.fitted, fit.anchor, share)).sum())
    except NumericalError:
        return math.inf


def ridge(joint: Joint, anchor: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(weight [1, out, d], bias [1, out]) of least error, `damping` times the mean diagonal pulling to the anchor.

    Raises NumericalError.
    """
    damped, pull = _damped(joint, damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise NumericalError(
            f"closed form: the second moment is not positive definite at damping {damping:g}; raise it"
        )
    weight = torch.cholesky_solve(joint.xy[0] / joint.count + pull * anchor[0].T, factor).T.unsqueeze(0)
    return weight, joint.y - torch.einsum("god,gd->go", weight, joint.x)


def _damped(joint: Joint, damping: float) -> tuple[Tensor, float]:
    """The second moment with the pull on its diagonal, and the pull."""
    moment = joint.xx[0] / joint.count
    mean = float(moment.diagonal().mean())
    pull = damping * mean if mean > 0 else damping
    return (moment + moment.T) / 2 + pull * torch.eye(len(moment), dtype=moment.dtype), pull
