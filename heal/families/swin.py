"""Swin transformers, both versions: windows, and four stages of growing width."""

from __future__ import annotations

from torch import nn

from heal.families.discovery import children, classifier, first_norm, matrices, mlp_pairs, norms, present
from heal.families.family import Family
from heal.families.skips import droppable


def swin(model: nn.Module) -> Family:
    """Layers: the attention, MLP and patch-merging matrices. A block's output is [n, h, w, width]."""
    stages = children(model, "layers")
    blocks = tuple(block for stage in stages for block in present(model, f"{stage}.blocks"))
    return Family(
        name="swin",
        layers=tuple(layer for layer in matrices(model, stages) if _is_prunable(model, layer)),
        blocks=blocks,
        pairs=mlp_pairs(model, blocks),
        norms=norms(model),
        classifier=classifier(model),
        states="tokens",
        droppable=droppable(model, blocks),
        last_norm=first_norm(model, "norm"),
    )


def _is_prunable(model: nn.Module, layer: str) -> bool:
    """Version 2 computes position biases by a small MLP, and reads qkv's weight without calling the layer."""
    owner, _, name = layer.rpartition(".")
    if ".cpb_mlp." in layer:
        return False
    attention = model.get_submodule(owner)
    bypassed = getattr(attention, "q_bias", None) is not None and not getattr(attention, "qkv_bias_separate", False)
    return not (name == "qkv" and bypassed)
