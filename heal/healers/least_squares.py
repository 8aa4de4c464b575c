"""Least squares on a mask: every row of every masked layer is solved for the weights that it keeps.

Per output row with kept weights S, inputs x and the dense layer's answer y, moments centred so that the bias follows:

    w = (C_xx[S, S] + ridge I)^-1 (C_xy[S] + ridge w_0[S])    b = mean y - w mean x

This is the optimum that OBC (Frantar and Alistarh 2022) reaches weight by weight and SparseGPT (arXiv 2301.00774)
approximates column by column. "dense": x is the dense network's, as in OBC's code; the layers are independent.
"pruned": x is the student's with all layers before already solved, so that a layer also undoes what drifted before.

w_0 is what the student has, for either input: there the ridge costs nothing, so the solution never fits worse than the
start, and a ridge without bound leaves the weights as they are. Where the pruner only masked (magnitude, Wanda), that
is the dense weight; where it moved weights (OBS), the dense ones as w_0 would give up both that start and the promise.

Ours: centred moments with the bias that belongs to them; and a solution stays only where its error on images that it
was not fitted to is no larger than before. A layer without a bias is shifted in the BatchNorm that takes its output, or
gets a bias where none does, so nothing needs to be measured anew behind it. Padding counts as inputs of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from heal.errors import MethodError, NumericalError
from heal.healers.held_out import is_kept, refuse_shuffled, split
from heal.healers.joint_moments import Joint, bytes_of, of_dense, of_pair
from heal.healers.layer_batches import Site
from heal.healers.masked_rows import operations, solved
from heal.healers.matching import BATCH, shift, shifted
from heal.healers.reporting import reported
from heal.images import Images, Replay, first
from heal.method import HealContext, HealingReport, name_of
from heal.modes import evaluating
from heal.naming import refuse_unknown
from heal.values import Mask
from heal.wiring import Wiring, trace

ROOM = 1 << 30
"""Bytes of second moments that are taken in one pass of the dense network, one layer at least."""


@dataclass(frozen=True)
class LeastSquares:
    """inputs: the student's, layer after layer ("pruned"), or the dense network's ("dense").

    damping: share of the mean diagonal of a row's own moment that is the ridge, > 0; 0.01 (SparseGPT). images: how many
    of the calibration images are read, every tenth of them to judge, >= 2; 1024 (OBC). most: multiplications that one
    layer's solve may take, a third of the cube of what a row keeps, over its rows, > 0; 1e12 (ours), by estimate ten
    minutes of one core. A layer that needs more is left as it is; log and report name it.
    """

    unit: ClassVar[str] = "weights"
    inputs: Literal["pruned", "dense"] = "pruned"
    damping: float = 0.01
    images: int = 1024
    most: float = 1e12

    def __post_init__(self) -> None:
        refuse_unknown("least_squares.inputs", self.inputs, ("pruned", "dense"))
        if not self.damping > 0:
            raise MethodError(f"least_squares.damping = {self.damping:g} must be greater than 0, for example 0.01")
        if self.images < 2:
            raise MethodError(f"least_squares.images = {self.images} must be at least 2: one of them judges")
        if not self.most > 0:
            raise MethodError(f"least_squares.most = {self.most:g} must be greater than 0, for example 1e12")

    @property
    def needs(self) -> frozenset[str]:
        """It reads no statistics; it measures both networks itself, as some images must not be in them."""
        return frozenset()

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport:
        """Write the solved weights and biases into the student's masked layers; the notes name those that stay."""
        return reported(self, student, teacher, images, lambda: self._repair(student, teacher, images, context))

    def _repair(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> tuple[str, ...]:
        assert isinstance(context.pruned, Mask)
        keep, parts = context.pruned.keep, split(images, self.images, BATCH)
        refuse_shuffled(images)
        wiring = trace(teacher, keep, first(images, 1, 1)[0])
        notes = self._left(keep, wiring)
        layers = [layer for layer in wiring.order if layer not in notes]
        with evaluating(student), evaluating(teacher):
            for done, (layer, fitted, judging) in enumerate(self._moments(student, teacher, layers, parts), start=1):
                note = _refit(Place(layer, student, teacher, wiring), keep[layer], fitted, judging, self.damping)
                notes |= {layer: note} if note else {}
                context.report(name_of(self), done, len(layers))
        for layer, note in notes.items():
            context.log(f"least_squares: {layer} stays as it was: {note}")
        return tuple(f"{layer} stays as it was: {note}" for layer, note in notes.items())

    def _left(self, keep: Mapping[str, Tensor], wiring: Wiring) -> dict[str, str]:
        """The layers that are not tried, and why."""
        called = set(wiring.order)
        notes = {layer: "its weight is read without calling it" for layer in keep if layer not in called}
        if self.inputs == "pruned":
            several = [layer for layer in wiring.order if layer in wiring.repeated]
            notes |= dict.fromkeys(several, "it runs several times, and this would see the first")
        for layer in wiring.order:
            needed = operations(keep[layer])
            if needed > self.most:
                notes[layer] = (
                    f"its rows need {needed:.1e} multiplications, more than least_squares.most = {self.most:g}"
                )
        return notes

    def _moments(
        self, student: nn.Module, teacher: nn.Module, layers: Sequence[str], parts: tuple[Replay, Replay]
    ) -> Iterator[tuple[str, Joint, Joint]]:
        """Of every layer those of the images to fit on and of the held-out ones; of "pruned" only when it is asked for,
        so that all layers before are solved by then."""
        if self.inputs == "pruned":
            for layer in layers:
                fitted, judging = (of_pair(Site(layer, student, teacher, "pruned"), part) for part in parts)
                yield layer, fitted, judging
            return
        for together in _together(teacher, layers):
            both = [of_dense(teacher, together, part) for part in parts]
            for layer in together:
                fitted, judging = (moments.pop(layer) for moments in both)
                yield layer, fitted, judging


def _together(teacher: nn.Module, layers: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The layers in their order, in runs whose moments fit in ROOM."""
    run: list[str] = []
    held = 0
    for layer in layers:
        needed = bytes_of(teacher.get_submodule(layer))
        if run and held + needed > ROOM:
            yield tuple(run)
            run, held = [], 0
        run.append(layer)
        held += needed
    if run:
        yield tuple(run)


@dataclass(frozen=True)
class Place:
    """A layer of the student, the teacher that it is compared with, and where its output goes."""

    layer: str
    student: nn.Module
    teacher: nn.Module
    wiring: Wiring

    def present(self, groups: int) -> tuple[Tensor, Tensor]:
        """(weight [groups, out, d], bias [groups, out]) in float64; what a BatchNorm was shifted counts as bias."""
        module = self.student.get_submodule(self.layer)
        weight = module.get_parameter("weight").detach().double()
        bias = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        if module.bias is not None:
            bias = module.get_parameter("bias").detach().double()
        elif self.layer in self.wiring.norm_after:
            bias = shifted(self.student, self.teacher, self.wiring.norm_after[self.layer]).double()
        return weight.reshape(groups, len(weight) // groups, -1), bias.view(groups, -1)

    def write(self, weight: Tensor, change: Tensor) -> None:
        """A new weight, and what its bias changes by [out]."""
        parameter = self.student.get_parameter(f"{self.layer}.weight")
        with torch.no_grad():
            parameter.copy_(weight.view_as(parameter))
        shift(self.student, self.layer, change.flatten(), self.wiring)


def _refit(place: Place, keep: Tensor, fitted: Joint, judging: Joint, damping: float) -> str | None:
    """Solve the layer and write it, or say why not. Raises NumericalError."""
    weight, bias = place.present(len(fitted.x))
    kept = keep.to(weight.device).reshape(weight.shape)
    try:
        groups = zip(fitted.xx / fitted.count, fitted.xy / fitted.count, weight, kept, strict=True)
        found = torch.stack([solved(*group, damping) for group in groups])
    except NumericalError as error:
        raise NumericalError(f"least_squares: {place.layer}: {error}") from error
    offset = fitted.y - torch.einsum("god,gd->go", found, fitted.x)
    before, after = (float(judging.errors(*answer).sum()) for answer in ((weight, bias), (found, offset)))
    if not is_kept(before, after):
        scale = float(judging.yy.sum()) / judging.count or 1.0
        return f"on held-out images its error would go from {before / scale:.3g} to {after / scale:.3g} of the variance"
    place.write(found, offset - bias)
    return None
