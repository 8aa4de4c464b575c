"""regrow's library: prune trained vision networks and heal them without labels.

import heal
result = heal.recompress(model, images, budget=heal.Budget(neurons=0.5))
heal.save(result.model, "bundle/")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heal.architecture import Architecture
    from heal.bundle import load, save
    from heal.errors import HealError, InputError
    from heal.recompression import RecompressionReport, Result, recompress
    from heal.values import NM, Allocation, Budget, ChannelCut, LayerStats, Mask

# Imported on first use: timm costs seconds, and a command that only reads a bundle needs no method.
_HOMES = {
    "NM": "heal.values",
    "Allocation": "heal.values",
    "Architecture": "heal.architecture",
    "Budget": "heal.values",
    "ChannelCut": "heal.values",
    "HealError": "heal.errors",
    "InputError": "heal.errors",
    "LayerStats": "heal.values",
    "Mask": "heal.values",
    "RecompressionReport": "heal.recompression",
    "Result": "heal.recompression",
    "load": "heal.bundle",
    "recompress": "heal.recompression",
    "save": "heal.bundle",
}

__all__ = [
    "NM",
    "Allocation",
    "Architecture",
    "Budget",
    "ChannelCut",
    "HealError",
    "InputError",
    "LayerStats",
    "Mask",
    "RecompressionReport",
    "Result",
    "load",
    "recompress",
    "save",
]


def __getattr__(name: str) -> Any:
    """The public name, from the module that defines it. Raises AttributeError."""
    if name not in _HOMES:
        raise AttributeError(f"module 'heal' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
