"""ConvNeXt: depthwise convolutions and MLPs. Version 2 normalises its hidden layer (GRN), so it has no pairs."""

from __future__ import annotations

from torch import nn

from heal.families.discovery import children, classifier, first_norm, matrices, mlp_pairs, norms, present
from heal.families.family import Family
from heal.families.skips import droppable


def convnext(model: nn.Module) -> Family:
    """Layers: the MLP matrices and the downsampling convolutions. A block's output is [n, c, h, w]."""
    stages = children(model, "stages")
    blocks = tuple(block for stage in stages for block in present(model, f"{stage}.blocks"))
    return Family(
        name="convnext",
        layers=matrices(model, stages),
        blocks=blocks,
        pairs=mlp_pairs(model, blocks),
        norms=norms(model),
        classifier=classifier(model),
        droppable=droppable(model, blocks),
        last_norm=first_norm(model, "head.norm"),
    )
