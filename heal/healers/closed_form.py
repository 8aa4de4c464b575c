"""The consumer of cut channels, solved anew for those that stay: bias-augmented ridge.

Given the dense moments (mu, C) of the consumer's input and the kept channels S, the weights that
best reproduce the dense output W x + b, pulled towards the old ones by the damping:

    W' = (W C[:, S] + damping W[:, S]) (C[S, S] + damping I)^-1,    b' = W mu + b - W' mu[S]

It equals CORP's affine compensation (arXiv 2602.05243) and OB2C (arXiv 2608.17657) at the same
damping, and mean folding when the damping grows without bound.

Ours: consumer after consumer on the inputs that the cut network gives by then, with dense outputs for targets
("pruned"); and a solution stays only where, fitted without them, it answers held-out images no worse than mean
folding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from heal.channels import columns, consumed, second_moment
from heal.denoising import denoised
from heal.errors import MethodError
from heal.families.lookup import cuttable_or_raise
from heal.healers.held_out import is_kept, refuse_shuffled, split
from heal.healers.joint_moments import Joint, of_dense, of_pair
from heal.healers.layer_batches import Site
from heal.healers.matching import BATCH
from heal.healers.reporting import reported
from heal.healers.ridge import Fit, chosen, refuse_damping, ridge, stable
from heal.images import Images, Replay, first
from heal.masking import write
from heal.merging import without
from heal.method import HealContext, HealingReport
from heal.modes import evaluating
from heal.naming import refuse_unknown
from heal.pruned import kept
from heal.values import ChannelCut, LayerStats
from heal.wiring import trace

ALL = 1 << 62
"""More images than there are: all of them."""

ROUNDING = 1e-7
"""Of float32: what a moment that was summed in it may be off by, as a share."""


@dataclass(frozen=True)
class ClosedForm:
    """Ridge regression of every consumer of cut channels onto the dense outputs; no training.

    damping: share of the mean diagonal of C[S, S] added to it, > 0; 1e-3 (SparseGPT uses 1e-2); "oas", the shrinkage
        that OAS estimates (CORP), 1e-4 at least; "held_out", the one of 1e-4, 1e-3, 1e-2, 1e-1 that answers best
        every tenth image when fitted on the others, consumer by consumer.
    inputs: of the dense network ("dense", as published), or of the student with all consumers before solved ("pruned").
    moment: "sample", or "denoised", what of C is not noise (OB2C; with inputs "dense" only).
    """

    unit: ClassVar[str] = "neurons"
    damping: float | Literal["oas", "held_out"] = 1e-3
    inputs: Literal["dense", "pruned"] = "dense"
    moment: Literal["sample", "denoised"] = "sample"

    def __post_init__(self) -> None:
        refuse_damping("closed_form.damping", self.damping)
        refuse_unknown("closed_form.inputs", self.inputs, ("dense", "pruned"))
        refuse_unknown("closed_form.moment", self.moment, ("sample", "denoised"))
        if self.moment == "denoised" and self.inputs == "pruned":
            raise MethodError("closed_form.moment = denoised is for the dense network's inputs; set inputs: dense")

    @property
    def needs(self) -> frozenset[str]:
        """Which statistics it reads."""
        return frozenset({"second_moment"})

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Write the solved weights and biases into the student's consumers; the notes name those that stay."""
        repair = partial(self._repair, student, teacher, images, context)
        return reported(self, student, teacher, images, repair, context.pruned)

    def _repair(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> tuple[str, ...]:
        if not isinstance(context.pruned, ChannelCut):
            raise MethodError("closed_form repairs what a cut left; the pruner gave a mask: heal it by least_squares")
        sites = cut_sites(teacher, context.pruned, first(images, 1, 1)[0])
        notes: list[str] = []
        with evaluating(student), evaluating(teacher):
            for done, (site, fit) in enumerate(self._fits(student, teacher, sites, images, context), start=1):
                solution, said = self._solved(fit)
                notes += [f"{site.consumer} {note}" for note in said]
                _write(student, site.consumer, *solution)
                context.report("closed_form", done, len(sites))
        for note in notes:
            context.log(f"closed_form: {note}")
        return tuple(notes)

    def _solved(self, fit: Fit) -> tuple[tuple[Tensor, Tensor], list[str]]:
        """(weight, bias) of a consumer, and what is to be said of it."""
        asked, notes = chosen(self.damping, fit), list[str]()
        damping = stable(asked, fit.everything, fit.fitted)
        if damping != asked:
            notes.append(f"is solved at damping {damping:g}: at {asked:g} its second moment is not positive definite")
        before, after = (
            float(fit.judging.errors(*answer).sum()) for answer in (fit.folded, ridge(fit.fitted, fit.anchor, damping))
        )
        if is_kept(before, after):
            return ridge(fit.everything, fit.anchor, damping), notes
        scale = float(fit.judging.yy.sum()) / fit.judging.count or 1.0
        if before < ROUNDING * scale:  # nothing was lost, and what is left is rounding
            return fit.folded, []
        notes.append(
            f"has its mean folded only: on held-out images the solution's error is {after / scale:.3g} of the "
            f"variance, without it {before / scale:.3g}"
        )
        return fit.folded, notes

    def _fits(
        self, student: nn.Module, teacher: nn.Module, sites: list[CutSite], images: Images, context: HealContext
    ) -> Iterator[tuple[CutSite, Fit]]:
        parts = split(images, ALL, BATCH)
        if self.inputs == "pruned":
            refuse_shuffled(images)
            for site in sites:
                yield site, _sequential(student, teacher, site, parts)
            return
        judging = of_dense(teacher, tuple(site.consumer for site in sites), parts[1])
        for site in sites:
            stats = second_moment(context.statistics, teacher, site.consumer)
            yield site, self._dense(teacher, site, stats, judging.pop(site.consumer))

    def _dense(self, teacher: nn.Module, site: CutSite, stats: LayerStats, judging: Joint) -> Fit:
        """Of the statistics of all images, those of the held-out ones are taken off again to fit without them."""
        module = teacher.get_submodule(site.consumer)
        held = LayerStats(judging.count, judging.x[0].cpu(), judging.xx[0].diagonal().cpu(), judging.xx[0].cpu())
        rest = _blurred(without(stats, held))
        if self.moment == "denoised":
            share = rest.count / stats.count
            stats, rest = _signal(stats), _signal(replace(rest, images=round(stats.images * share)))
        weight = module.get_parameter("weight").detach().double().cpu().flatten(1)
        bias = torch.zeros(len(weight), dtype=torch.float64)
        if module.bias is not None:
            bias = module.get_parameter("bias").detach().double().cpu()
        everything, fitted, judged = (answered(weight, bias, moments, site) for moments in (stats, rest, held))
        return Fit(everything, fitted, judged, weight[site.rows][:, site.columns].unsqueeze(0))


@dataclass(frozen=True)
class CutSite:
    """A consumer, the columns of its flattened weight that stay, and its rows that stay."""

    consumer: str
    columns: Tensor
    rows: Tensor


def cut_sites(teacher: nn.Module, pruned: ChannelCut, image: Tensor) -> list[CutSite]:
    """Every consumer of a cut group, in the order of the forward pass of one image [1, c, h, w]."""
    groups, own = cuttable_or_raise(teacher).cuttable, kept(teacher, pruned, "producers")
    readers = {
        consumer: consumed(teacher, groups[name], keep)
        for name, keep in pruned.keep.items()
        for consumer in groups[name].consumers
    }
    if not readers:
        raise MethodError(
            f"closed_form solves what reads the cut channels, but of {', '.join(pruned.keep)} only scores are made; "
            "heal queries and keys by qk_compensation"
        )
    sites = []
    for consumer in trace(teacher, readers, image).order:
        module = teacher.get_submodule(consumer)
        rows = own.get(consumer, torch.arange(len(module.get_parameter("weight"))))
        sites.append(CutSite(consumer, columns(module, readers[consumer]), rows))
    return sites


def answered(weight: Tensor, bias: Tensor, stats: LayerStats, site: CutSite) -> Joint:
    """Moments of the kept inputs and of what the dense layer answers to all of them."""
    assert stats.comoment is not None
    rows, xx, at = weight[site.rows], stats.comoment, site.columns
    xy = xx @ rows.T
    return Joint(
        stats.count,
        stats.mean[at].unsqueeze(0),
        (rows @ stats.mean + bias[site.rows]).unsqueeze(0),
        xx[at][:, at].unsqueeze(0),
        xy[at].unsqueeze(0),
        (rows * xy.T).sum(1).unsqueeze(0),
    )


def _blurred(stats: LayerStats) -> LayerStats:
    """With what float32 may have rounded off on the diagonal: the difference of two populations has lost as much."""
    assert stats.comoment is not None
    lost = ROUNDING * (stats.count * stats.mean.square() + stats.m2)
    return replace(stats, m2=stats.m2 + lost, comoment=stats.comoment + torch.diag(lost))


def _signal(stats: LayerStats) -> LayerStats:
    signal = denoised(stats) * stats.count
    return replace(stats, m2=signal.diagonal().clamp_min(0), comoment=signal)


def _sequential(student: nn.Module, teacher: nn.Module, site: CutSite, parts: tuple[Replay, Replay]) -> Fit:
    found = [of_pair(Site(site.consumer, student, teacher, "pruned"), part).of_rows(site.rows) for part in parts]
    fitted, judging = (joint.cpu() for joint in found)
    weight = teacher.get_submodule(site.consumer).get_parameter("weight").detach().double().cpu().flatten(1)
    return Fit(fitted.merged(judging), fitted, judging, weight[site.rows][:, site.columns].unsqueeze(0))


def _write(student: nn.Module, consumer: str, weight: Tensor, bias: Tensor) -> None:
    shape = student.get_parameter(f"{consumer}.weight").shape
    write(student, {f"{consumer}.weight": weight.reshape(shape), f"{consumer}.bias": bias.flatten()})
