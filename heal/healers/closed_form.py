"""The consumer of a cut layer, solved anew for the channels that stay: bias-augmented ridge.

Given the dense moments (mu, C) of the consumer's input and the kept channels S, the weights that
best reproduce the dense output W x + b, pulled towards the old ones by the damping:

    W' = (W C[:, S] + damping W[:, S]) (C[S, S] + damping I)^-1,    b' = W mu + b - W' mu[S]

It equals CORP's affine compensation (arXiv 2602.05243) and OB2C (arXiv 2608.17657) at the same
damping, and mean folding when the damping grows without bound.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heal.channels import columns, consumed, second_moment
from heal.errors import MethodError, NumericalError
from heal.families.lookup import cuttable_or_raise
from heal.images import Images
from heal.method import HealContext, HealingReport
from heal.states import alignment
from heal.values import ChannelCut, LayerStats


@dataclass(frozen=True)
class ClosedForm:
    """Ridge regression of every consumer of cut channels onto the dense outputs; no training.

    damping: share of the mean diagonal of C[S, S] added to it, > 0; 1e-3 (SparseGPT uses 1e-2).
    """

    unit: ClassVar[str] = "neurons"
    damping: float = 1e-3

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise MethodError(f"closed_form.damping = {self.damping:g} must be greater than 0, for example 0.001")

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics it reads."""
        return frozenset({"second_moment"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Write the solved weights and biases into the student's consumers."""
        if not isinstance(context.pruned, ChannelCut):
            raise MethodError("closed_form repairs what a cut left; the pruner gave a mask: heal it by starfish")
        began = time.perf_counter()
        before = alignment(student, teacher, images)
        groups, keep = cuttable_or_raise(teacher).cuttable, context.pruned.keep
        rows = {producer: keep[name] for name in keep for producer in groups[name].producers}
        consumers = [
            (consumer, consumed(teacher, groups[name], kept))
            for name, kept in keep.items()
            for consumer in groups[name].consumers
        ]
        if not consumers:
            raise MethodError(
                f"closed_form solves what reads the cut channels, but of {', '.join(keep)} only scores are made; "
                "heal queries and keys by qk_compensation"
            )
        for done, (consumer, kept) in enumerate(consumers, start=1):
            dense = teacher.get_submodule(consumer)
            weight, bias = solve(
                dense.get_parameter("weight").detach().flatten(1),
                dense.get_parameter("bias").detach() if dense.bias is not None else None,
                second_moment(context.statistics, teacher, consumer),
                columns(dense, kept),
                self.damping,
            )
            own = rows.get(consumer, torch.arange(len(weight)))
            _write(student.get_submodule(consumer), weight[own], bias[own])
            context.report("closed_form", done, len(consumers))
        after = alignment(student, teacher, images)
        return HealingReport("closed_form", asdict(self), (), before, after, time.perf_counter() - began)


def solve(
    weight: Tensor, bias: Tensor | None, stats: LayerStats, keep: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """The repaired (weight [out, kept], bias [out]) in float64; weight is [out, in]. Raises NumericalError."""
    w, c, mu = weight.double().cpu(), stats.covariance, stats.mean
    diagonal = c.diagonal()[keep].mean()
    ridge = float(damping * diagonal) if diagonal > 0 else damping
    c_ss = c[keep][:, keep]
    c_ss = c_ss + ridge * torch.eye(len(keep), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(c_ss)
    if int(failed):
        raise NumericalError(
            f"closed form: the second moment is not positive definite at damping {damping:g}; raise it"
        )
    target = w @ c[:, keep] + ridge * w[:, keep]
    solved = torch.cholesky_solve(target.T, factor).T
    offset = w @ mu - solved @ mu[keep]
    return solved, offset if bias is None else offset + bias.double().cpu()


def _write(consumer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    parameter = consumer.get_parameter("weight")
    with torch.no_grad():
        parameter.copy_(weight.reshape(parameter.shape))
        if consumer.bias is None:
            consumer.bias = nn.Parameter(bias.to(parameter))
        else:
            consumer.get_parameter("bias").copy_(bias)
