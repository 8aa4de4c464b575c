"""Vision transformers: ViT, DeiT (distilled or not), DeiT III, and what else timm builds from VisionTransformer."""

from __future__ import annotations

from torch import nn

from heal.families.discovery import attentions, children, classifier, matrices, mlp_pairs, norms
from heal.families.family import Family


def vit(model: nn.Module) -> Family:
    """Layers: the attention and MLP matrices of every block. A block's output is [n, tokens, width]."""
    blocks = children(model, "blocks")
    return Family(
        name="vit",
        layers=matrices(model, blocks),
        blocks=blocks,
        pairs=mlp_pairs(model, blocks),
        groups=attentions(model, blocks),
        norms=norms(model),
        classifier=classifier(model),
        states="tokens",
    )
