"""What follows what in a network, seen by running one image through it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heal.families.discovery import batch_norms
from heal.modes import evaluating


@dataclass(frozen=True)
class Wiring:
    """order: the layers in the order in which they ran. norm_after: the BatchNorm that takes a layer's very
    output, if one does. input_size: (height, width) that a convolution saw."""

    order: tuple[str, ...]
    norm_after: dict[str, str]
    input_size: dict[str, tuple[int, int]]


def trace(model: nn.Module, layers: Iterable[str], image: Tensor) -> Wiring:
    """Run one image [1, c, h, w] and note where the layers' outputs go."""
    order: list[str] = []
    norm_after: dict[str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    outputs: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, so that no id is used twice

    def ran(layer: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            order.append(layer)
            outputs[id(output)] = (layer, output)
            if isinstance(module, nn.Conv2d):
                sizes[layer] = (args[0].shape[-2], args[0].shape[-1])

        return note

    def entered(norm: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            if id(args[0]) in outputs:
                norm_after[outputs[id(args[0])][0]] = norm

        return note

    handles = [model.get_submodule(layer).register_forward_hook(ran(layer)) for layer in layers]
    handles += [norm.register_forward_pre_hook(entered(name)) for name, norm in batch_norms(model).items()]
    try:
        with evaluating(model), torch.no_grad():
            model(image.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return Wiring(tuple(dict.fromkeys(order)), norm_after, sizes)
