"""Moments of two populations together."""

from __future__ import annotations

import torch

from heal.values import LayerStats


def merge(a: LayerStats, b: LayerStats) -> LayerStats:
    """The moments of both populations together (Chan, Golub and LeVeque 1979)."""
    count = a.count + b.count
    delta = b.mean - a.mean
    weight = a.count * b.count / count
    comoment = None
    if a.comoment is not None and b.comoment is not None:
        apart = delta.reshape(a.comoment.shape[:-1])
        comoment = a.comoment + b.comoment + weight * apart.unsqueeze(-1) * apart.unsqueeze(-2)
    return LayerStats(
        count=count,
        mean=a.mean + delta * (b.count / count),
        m2=a.m2 + b.m2 + weight * delta.square(),
        comoment=comoment,
        images=a.images + b.images,
    )


def without(whole: LayerStats, part: LayerStats) -> LayerStats:
    """The moments of the whole population less a part of it: `merge` undone."""
    count = whole.count - part.count
    mean = whole.mean + (whole.mean - part.mean) * (part.count / count)
    delta, weight = part.mean - mean, count * part.count / whole.count
    comoment = None
    if whole.comoment is not None and part.comoment is not None:
        comoment = whole.comoment - part.comoment - weight * torch.outer(delta, delta)
    m2 = (whole.m2 - part.m2 - weight * delta.square()).clamp_min(0)
    return LayerStats(count, mean, m2, comoment)
