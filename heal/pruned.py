"""Putting a mask or a cut into a model, and saying what it did."""

from __future__ import annotations

import torch
from torch import nn

from heal import masking, surgery
from heal.errors import WeightsError
from heal.families.family import ChannelGroup
from heal.families.lookup import describe
from heal.values import ChannelCut, Mask


def apply(model: nn.Module, pruned: Mask | ChannelCut) -> None:
    """Mask or cut the model in place."""
    if isinstance(pruned, Mask):
        masking.apply(model, pruned)
    else:
        surgery.cut(model, pruned)


def describe_cuts(model: nn.Module, pruned: Mask | ChannelCut) -> tuple[str, ...]:
    """One line a layer: "producer -> consumer: kept of all"."""
    if isinstance(pruned, Mask):
        return tuple(f"{layer}: {int(k.count_nonzero())} of {k.numel()} weights" for layer, k in pruned.keep.items())
    groups = describe(model).cuttable
    return tuple(f"{_ends(groups[name])}: {kept} of {pruned.total[name]}" for name, kept in pruned.kept.items())


def _ends(group: ChannelGroup) -> str:
    return " -> ".join(" + ".join(ends) for ends in (group.producers, group.consumers) if ends)


def refuse_broken(model: nn.Module) -> None:
    """Raise WeightsError naming the first tensor that holds NaN or infinity, or the first weight not in float32."""
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32:
            raise WeightsError(f"weights: {name} is {weight.dtype}; statistics and healing take float32: model.float()")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"weights: {name} holds NaN or infinity; the model cannot be compressed as it is")
