"""Vision transformers: ViT, DeiT (distilled or not), DeiT III, and what else timm builds from VisionTransformer."""

from __future__ import annotations

from torch import nn

from heal.families.discovery import attentions, classifier, first_norm, matrices, mlp_pairs, norms, present
from heal.families.family import Family
from heal.families.skips import droppable


def vit(model: nn.Module) -> Family:
    """Layers: the attention and MLP matrices of every block. A block's output is [n, tokens, width]."""
    blocks = present(model, "blocks")
    return Family(
        name="vit",
        layers=matrices(model, blocks),
        blocks=blocks,
        pairs=mlp_pairs(model, blocks),
        groups=attentions(model, blocks),
        norms=norms(model),
        classifier=classifier(model),
        states="tokens",
        droppable=droppable(model, blocks),
        last_norm=first_norm(model, "norm", "fc_norm"),
    )
