"""Which part of a network a layer with weights belongs to: the table's layers, or what stands beside them."""

from __future__ import annotations

from typing import Literal

from torch import nn

from heal.families.discovery import is_depthwise, uses_its_weight
from heal.families.family import Family

Part = Literal["layers", "stem", "depthwise", "classifier"]


def parts(model: nn.Module, family: Family) -> dict[str, Part]:
    """Every Linear and Conv2d that is called, by name, in the order of the modules.

    `layers` are the table's, `classifier` is the table's, `depthwise` has one filter a channel, and
    `stem` is what is left: the first convolution, an embedding, a final projection.
    """
    return {name: _part(name, module, family) for name, module in called(model)}


def called(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    """Every Linear and Conv2d that is called as a layer; of those that share one weight the first.

    MultiheadAttention reads its projection's weight without calling the layer, so it is not one. Nor is one that
    may not compute with the weight it stores: see `standardised`.
    """
    found: dict[int, tuple[str, nn.Linear | nn.Conv2d]] = {}
    for name, module in model.named_modules():
        inside_attention = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and uses_its_weight(module) and not inside_attention:
            found.setdefault(id(module.weight), (name, module))
    return list(found.values())


def standardised(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every Linear and Conv2d that may compute with another weight than it stores: zeros there mean nothing."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return {name: layer for name, layer in layers.items() if not uses_its_weight(layer)}


def _part(name: str, module: nn.Module, family: Family) -> Part:
    if name in family.layers:
        return "layers"
    if name in family.classifier:
        return "classifier"
    return "depthwise" if is_depthwise(module) else "stem"
