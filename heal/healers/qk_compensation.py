"""The queries and keys that stay, mixed so that their products make up for those that went; no training.

Of one head, with Q and K the dense queries and keys of all tokens of all images, S the dimensions that stay and P those
that went, the scores lose Q_P K_P^T. The M that best makes up for it,

    minimise ||Q_P K_P^T - Q_S M K_S^T||^2 + lam ||M||^2,    so G_Q M G_K + lam M = C_Q C_K

(G = second moments of S, C_Q = those of q_S with q_P, C_K = those of k_P with k_S), is split by I + M = U V^T from
its singular values into the two layers: W_Q' = U^T W_Q,S, W_K' = V^T W_K,S, the biases alike.

Source: CORP (arXiv 2602.05243) and its code. Ours: the eigen-decompositions G_Q = A a A^T, G_K = B b B^T, which
solve it at d^3; M is not made symmetric; lam is damping * mean(a) * mean(b); the scale of the scores stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heal.errors import MethodError
from heal.families.family import ChannelGroup
from heal.families.heads import Heads
from heal.families.lookup import cuttable_or_raise
from heal.healers.reporting import reported
from heal.images import Images
from heal.method import HealContext, HealingReport
from heal.values import ChannelCut, LayerStats


@dataclass(frozen=True)
class QkCompensation:
    """damping: share of the mean eigenvalues' product, > 0; 1e-3."""

    unit: ClassVar[str] = "neurons"
    damping: float = 1e-3

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise MethodError(f"qk_compensation.damping = {self.damping:g} must be greater than 0, for example 0.001")

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics it reads."""
        return frozenset({"qk_second_moment"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Write the mixed queries and keys into the student's attention."""
        cut = _cut_queries(teacher, context)
        return reported(self, student, teacher, images, lambda: self._repair(student, teacher, cut, context))

    def _repair(
        self, student: nn.Module, teacher: nn.Module, cut: dict[str, tuple[ChannelGroup, Tensor]], context: HealContext
    ) -> None:
        for done, (group, keep) in enumerate(cut.values(), start=1):
            name, heads = group.modules[0], Heads.of(teacher.get_submodule(group.attention))
            square = mean_square(context.statistics[f"{name}.output"])
            _write(student.get_submodule(name), *mixed(teacher.get_submodule(name), heads, square, keep, self.damping))
            context.report("qk_compensation", done, len(cut))


def _cut_queries(teacher: nn.Module, context: HealContext) -> dict[str, tuple[ChannelGroup, Tensor]]:
    if not isinstance(context.pruned, ChannelCut):
        raise MethodError("qk_compensation repairs what a cut left; the pruner gave a mask: heal it by starfish")
    groups, keep = cuttable_or_raise(teacher).cuttable, context.pruned.keep
    cut = {name: (groups[name], keep[name]) for name in keep if groups[name].kind == "qk"}
    if not cut:
        raise MethodError(
            f"qk_compensation makes up for cut queries and keys, but {', '.join(keep) or 'nothing'} was cut; "
            "add qk to the allocator's kinds"
        )
    return cut


def mean_square(stats: LayerStats) -> Tensor:
    """Mean of x x^T [d, d], float64: the mean is part of the scores, so it is not taken off."""
    return stats.covariance + torch.outer(stats.mean, stats.mean)


def mixed(dense: nn.Module, heads: Heads, square: Tensor, keep: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of the queries and keys that stay of a dense layer, mixed, head after head, float64.

    square: the second moment of the layer's output. keep: dimensions [kept], or [heads, kept].
    """
    weight = dense.get_parameter("weight").detach()
    bias = weight.new_zeros(len(weight)) if dense.bias is None else dense.get_parameter("bias").detach()
    layer = torch.cat([weight, bias.unsqueeze(1)], dim=1).double().cpu()
    places = torch.arange(2 * heads.number * heads.qk).view(2, heads.number, heads.qk)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for own, kept in zip(places.unbind(1), keep.expand(heads.number, -1), strict=True):
        queries, keys = (square[place][:, place] for place in own)
        for side, place, mix in zip(sides, own, compensation(queries, keys, kept, damping), strict=True):
            side.append(mix.T @ layer[place[kept]])
    rows = torch.cat([*sides[0], *sides[1]])
    return rows[:, :-1], rows[:, -1]


def compensation(queries: Tensor, keys: Tensor, keep: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(U, V), each [kept, kept], of one head from its second moments [d, d] of queries and of keys."""
    gone = torch.ones(len(queries), dtype=torch.bool)
    gone[keep] = False
    a, left = torch.linalg.eigh(queries[keep][:, keep])
    b, right = torch.linalg.eigh(keys[keep][:, keep])
    lost = queries[keep][:, gone] @ keys[gone][:, keep]
    ridge = float(damping * a.mean() * b.mean()) or damping
    inner = (left.T @ lost @ right) / (torch.outer(a.clamp_min(0), b.clamp_min(0)) + ridge)
    u, sizes, vh = torch.linalg.svd(torch.eye(len(keep), dtype=torch.float64) + left @ inner @ right.T)
    return u * sizes.sqrt(), vh.T * sizes.sqrt()


def _write(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        layer.get_parameter("weight")[: len(weight)] = weight.to(layer.get_parameter("weight"))
        if layer.bias is not None:
            layer.get_parameter("bias")[: len(bias)] = bias.to(layer.get_parameter("bias"))
