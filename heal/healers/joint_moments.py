"""Joint moments of what a layer multiplies and of what it should answer, streamed over images.

With them the squared error of any weight and bias is a quadratic form: neither fitting nor judging needs the images
again. Batches are merged in float64 by Chan's rule, a few images at a time in float32 around their own mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from heal.healers.layer_batches import Site
from heal.images import Replay
from heal.modes import Listener, listening
from heal.patch_moments import Columns
from heal.patches import patches
from heal.values import LayerStats

Layer = nn.Linear | nn.Conv2d

ROOM = 1 << 24
"""Numbers of patches that are laid out at once, one image at least."""


@dataclass(frozen=True)
class Joint:
    """Moments of patches x [groups, d] and answers y [groups, out], out rows of each group; float64.

    xx [groups, d, d], xy [groups, d, out] and yy [groups, out]: sums of products of deviations over `count` rows.
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    def errors(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean squared error [groups, out] of y against weight [groups, out, d] x + bias [groups, out]."""
        explained = (weight * (2 * self.xy.mT - weight @ self.xx)).sum(-1)
        apart = self.y - torch.einsum("god,gd->go", weight, self.x) - bias
        return ((self.yy - explained) / self.count + apart.square()).clamp_min(0)

    def merged(self, other: Joint) -> Joint:
        """The moments of both populations together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        weight, share = self.count * other.count / count, other.count / count
        x, y = other.x - self.x, other.y - self.y
        return Joint(
            count,
            self.x + share * x,
            self.y + share * y,
            self.xx + other.xx + weight * x.unsqueeze(-1) * x.unsqueeze(-2),
            self.xy + other.xy + weight * x.unsqueeze(-1) * y.unsqueeze(-2),
            self.yy + other.yy + weight * y.square(),
        )

    def of_rows(self, rows: Tensor) -> Joint:
        """Of these answers only; rows [k]."""
        at = rows.to(self.y.device)
        return replace(self, y=self.y[:, at], xy=self.xy[..., at], yy=self.yy[:, at])

    def cpu(self) -> Joint:
        """On the CPU."""
        return Joint(self.count, *(moment.cpu() for moment in (self.x, self.y, self.xx, self.xy, self.yy)))


def of_dense(teacher: nn.Module, layers: tuple[str, ...], images: Replay) -> dict[str, Joint]:
    """Of the teacher's own inputs and answers, of all layers in one pass; calls of a layer are pooled.

    Columns, not correlations: a row of a convolution may keep corners of the kernel alone, and of their small moments
    the latter know nothing.
    """
    streams: dict[str, Columns] = {}

    def listener(layer: str) -> Listener:
        def add(x: Tensor) -> None:
            if layer not in streams:
                streams[layer] = Columns(_layer(teacher, layer), x.float())
            streams[layer].add(x.float())

        return add

    device = next(teacher.parameters()).device
    with torch.no_grad(), listening(teacher, {f"{layer}.input": listener(layer) for layer in layers}):
        for batch in images:
            teacher(batch.to(device))
    return {layer: _answered(_layer(teacher, layer), stream.moments()) for layer, stream in streams.items()}


def of_pair(site: Site, images: Replay) -> Joint:
    """Of what enters the student's layer and what the teacher's gives, at its first call. Raises ArchitectureError."""
    layer, total = _layer(site.student, site.layer), None
    for batch in images:
        entered, wanted = site.pair(batch)
        together = max(1, ROOM // (layer.weight[0].numel() * max(wanted[0].numel() // len(layer.weight), 1)))
        for x, y in zip(torch.split(entered, together), torch.split(wanted, together), strict=True):
            joint = _batch(layer, x, y)
            total = joint if total is None else total.merged(joint)
    assert total is not None
    return total


def _layer(model: nn.Module, name: str) -> Layer:
    module = model.get_submodule(name)
    assert isinstance(module, (nn.Linear, nn.Conv2d))
    return module


def _answered(layer: Layer, stats: LayerStats) -> Joint:
    """With the layer's own answers to its patches."""
    weight = layer.weight.detach().double()
    assert stats.comoment is not None
    xx = stats.comoment.to(weight.device)
    groups, width = xx.shape[0], xx.shape[-1]
    rows = weight.reshape(groups, -1, width)
    x = stats.mean.to(weight.device).view(groups, width)
    bias = 0 if layer.bias is None else layer.bias.detach().double().view(groups, -1)
    xy = xx @ rows.mT
    return Joint(stats.count, x, torch.einsum("god,gd->go", rows, x) + bias, xx, xy, (rows * xy.mT).sum(-1))


def _batch(layer: Layer, x: Tensor, y: Tensor) -> Joint:
    columns = patches(layer, x.float())
    groups, width = columns.shape[1:3]
    answers = y.reshape(len(y), -1, y.shape[-1]).mT if isinstance(layer, nn.Linear) else y.flatten(2)
    columns = columns.permute(1, 2, 0, 3).reshape(groups, width, -1)
    answers = answers.float().reshape(len(y), groups, -1, answers.shape[-1]).permute(1, 2, 0, 3).flatten(2)
    x_mean, y_mean = (rows.mean(-1, dtype=torch.float64) for rows in (columns, answers))
    columns, answers = columns - x_mean.float().unsqueeze(-1), answers - y_mean.float().unsqueeze(-1)
    xx, xy = (torch.bmm(columns, other.mT).double() for other in (columns, answers))
    return Joint(columns.shape[-1], x_mean, y_mean, xx, xy, answers.square().sum(-1, dtype=torch.float64))


def bytes_of(layer: nn.Module) -> int:
    """Of the second moment of its patches."""
    weight, groups = layer.get_parameter("weight"), getattr(layer, "groups", 1)
    return 8 * int(groups) * weight[0].numel() ** 2
