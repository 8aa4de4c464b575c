"""Moments of two populations together."""

from __future__ import annotations

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
