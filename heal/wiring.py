"""What follows what in a network, seen by running one image through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heal.families.discovery import batch_norms
from heal.modes import evaluating


@dataclass(frozen=True)
class Wiring:
    """order: the layers in the order in which they ran first. repeated: those that ran more than once. norm_after: the
    BatchNorm that takes a layer's very output, if one does: unchanged, which nothing else takes, and no other output.
    What TorchScript does inside is not seen, nor an output that the network also returns.
    input_size: (height, width) that a convolution saw."""

    order: tuple[str, ...]
    repeated: frozenset[str]
    norm_after: dict[str, str]
    input_size: dict[str, tuple[int, int]]


def trace(model: nn.Module, layers: Iterable[str], image: Tensor) -> Wiring:
    """Run one image [1, c, h, w] and note where the layers' outputs go."""
    runs: Counter[str] = Counter()
    sizes: dict[str, tuple[int, int]] = {}
    readers = _Readers()

    def ran(layer: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            runs[layer] += 1
            readers.outputs[id(output)] = (layer, output)
            if isinstance(module, nn.Conv2d):
                sizes[layer] = (args[0].shape[-2], args[0].shape[-1])

        return note

    handles = [model.get_submodule(layer).register_forward_hook(ran(layer)) for layer in layers]
    for name, norm in batch_norms(model).items():
        handles += [norm.register_forward_pre_hook(readers.entered(name)), norm.register_forward_hook(readers.left)]
    try:
        with evaluating(model), torch.no_grad(), readers:
            model(image.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    repeated = frozenset(layer for layer, times in runs.items() if times > 1)
    return Wiring(tuple(runs), repeated, readers.pairs(), sizes)


class _Readers(TorchFunctionMode):
    """Who takes the layers' outputs. outputs: by id; held, so that no id is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[str, Tensor]] = {}
        self._taken: list[tuple[str, str]] = []  # what entered a norm: the layer that gave it ("" for none), the norm
        self._read: set[str] = set()  # layers whose outputs something beside a norm computed with, or wrote into
        self._is_in_norm = False

    def entered(self, norm: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        """A hook for the norm of that name."""

        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._taken.append((self._giver(args[0]), norm))
            self._is_in_norm = True

        return note

    def left(self, *_: Any) -> None:
        """A hook for every norm."""
        self._is_in_norm = False

    def pairs(self) -> dict[str, str]:
        """By layer the norm, where each takes part in nothing else."""
        return {
            layer: norm
            for layer, norm in self._taken
            if layer and layer not in self._read
            if all((giver == layer) == (taker == norm) for giver, taker in self._taken)
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Every function of torch passes here, also those that read no more than a shape."""
        result = func(*args, **(kwargs or {}))
        if not self._is_in_norm and (result is None or next(_tensors(result), None) is not None):
            self._read |= {self._giver(x) for x in _tensors((args, kwargs))}
        return result

    def _giver(self, x: Tensor) -> str:
        return self.outputs.get(id(x), ("", x))[0]


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
