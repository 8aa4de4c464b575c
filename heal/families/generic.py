"""Any other network: its layers and, where blocks repeat, its blocks. Nothing says which channels belong together."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from torch import nn

from heal.families.discovery import norms
from heal.families.family import Family
from heal.families.parts import called

CONTAINERS = (nn.Sequential, nn.ModuleList)


def generic(model: nn.Module) -> Family:
    """Layers: every Linear and Conv2d but the last Linear, which is taken for the classifier.

    Of layers that share one weight the first stands for all, so that no weight counts twice.
    """
    layers = [name for name, _ in called(model)]
    linear = [name for name in layers if isinstance(model.get_submodule(name), nn.Linear)]
    last = tuple(linear[-1:])
    blocks = _repeated(model)
    return Family(
        name="generic",
        layers=tuple(name for name in layers if name not in last),
        blocks=blocks,
        norms=norms(model),
        classifier=last,
        states=_layout(model, blocks),
    )


def _repeated(model: nn.Module) -> tuple[str, ...]:
    """Children of Sequentials and ModuleLists whose class occurs twice or more there; the outermost only.

    Bare containers count only where nothing else repeats.
    """
    candidates = _candidates(model)
    bare = {name for name, kind in candidates.items() if kind in CONTAINERS}
    for chosen in (candidates.keys() - bare, bare):
        counts = Counter(candidates[name] for name in chosen)
        repeated = [name for name in candidates if name in chosen and counts[candidates[name]] > 1]
        if repeated:
            return _outermost(repeated)
    return ()


def _candidates(model: nn.Module) -> dict[str, type[nn.Module]]:
    found = {}
    for name, container in model.named_modules():
        if isinstance(container, CONTAINERS):
            for child, module in container.named_children():
                is_leaf = not any(True for _ in module.children())
                if not is_leaf and any(True for _ in module.parameters()):
                    found[f"{name}.{child}" if name else child] = type(module)
    return found


def _outermost(names: list[str]) -> tuple[str, ...]:
    return tuple(name for name in names if not any(name.startswith(f"{other}.") for other in names))


def _layout(model: nn.Module, blocks: tuple[str, ...]) -> Literal["tokens", "maps"]:
    """A block of Linear layers alone has its channels last."""
    inside = [module for block in blocks for module in model.get_submodule(block).modules()]
    has_linear = any(isinstance(module, nn.Linear) for module in inside)
    return "tokens" if has_linear and not any(isinstance(module, nn.Conv2d) for module in inside) else "maps"
