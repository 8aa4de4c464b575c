"""Whether two networks compute the same thing but for their weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch import nn

_TRAINING_ONLY = ("training", "grad_checkpointing", "fused_attn")


def first_difference(model: nn.Module, wanted: nn.Module) -> str | None:
    """In words, where a tensor's shape, a module's class or a setting differs; None when nothing does.

    Settings are the plain attributes of modules (strides, heads, pooling). Dropout and other things
    that act while training do not count, nor does what the model has beside them.
    """
    return next(_differences(model, wanted), None)


def plain(value: Any) -> Any:
    """A setting as it comes back from JSON: tuples become lists."""
    return json.loads(json.dumps(value)) if isinstance(value, (list, tuple)) else value


def _differences(model: nn.Module, wanted: nn.Module) -> Iterator[str]:
    yield from _shapes_that_differ(model, wanted)
    found, expected = _modules(model), _modules(wanted)
    for name in sorted(found.keys() ^ expected.keys()):
        yield f"module {name} is only in the {'model' if name in found else 'architecture'}"
    for name, module in expected.items():
        yield from _settings_that_differ(f"module {name or '(top)'}", found[name], module)


def _shapes_that_differ(model: nn.Module, wanted: nn.Module) -> Iterator[str]:
    found, expected = _shapes(model), _shapes(wanted)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            yield f"tensor {name} is {found.get(name, 'absent')}, not {expected.get(name, 'absent')}"


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """Of every parameter and buffer, those that are not saved included."""
    parameters = {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return parameters | {name: list(b.shape) for name, b in model.named_buffers(remove_duplicate=False)}


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """By name, without what does nothing in eval mode: Dropout and DropPath stand where others have Identity."""
    return {name: module for name, module in model.named_modules() if not _does_nothing(module)}


def _does_nothing(module: nn.Module) -> bool:
    return isinstance(module, nn.Identity) or "Drop" in type(module).__name__


def _settings_that_differ(where: str, found: nn.Module, wanted: nn.Module) -> Iterator[str]:
    if type(found).__qualname__ != type(wanted).__qualname__:
        yield f"{where} is a {type(found).__qualname__}, not a {type(wanted).__qualname__}"
    for key, value in vars(wanted).items():
        present = vars(found).get(key)
        if _is_setting(key, value) and plain(present) != plain(value):
            yield f"{where} has {key} = {present!r}, not {value!r}"


def _is_setting(key: str, value: object) -> bool:
    acts_while_training = key.startswith("_") or key in _TRAINING_ONLY or "drop" in key
    return not acts_while_training and isinstance(value, (bool, int, float, str, tuple))
