"""What modules inside a block do to channels: carry one value for each, leave them alone, or gate them all."""

from __future__ import annotations

from torch import nn

from heal.families.discovery import is_batch_norm, is_depthwise, is_plain

MIXING = ("GLU", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax")
"""What torch keeps among the activations, and what looks at all channels at once."""

ALONE = (
    "torch.nn.modules.activation",
    "torch.nn.modules.dropout",
    "torch.nn.modules.pooling",
    "timm.layers.activations",
)

SQUEEZES = {"SqueezeExcite": ("conv_reduce", "conv_expand"), "SEModule": ("fc1", "fc2")}
"""timm's two: what reads all channels, and what writes a gate for each."""


def kind_of(module: nn.Module | None) -> str:
    """timm's file and class, as in "resnet.BasicBlock": two files have a Bottleneck. Empty for what is not timm's."""
    file, name = type(module).__module__, type(module).__name__
    return f"{file.rpartition('.')[2]}.{name}" if file.startswith("timm.") else ""


def part(module: nn.Module | None, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None."""
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def carries_channels(module: nn.Module | None) -> bool:
    """It holds values of every channel, and treats every channel alone."""
    return is_batch_norm(module) or is_depthwise(module)


def leaves_channels(module: nn.Module | None) -> bool:
    """It is absent, or treats every channel alone and all alike."""
    empty = isinstance(module, nn.Sequential) and len(module) == 0
    return module is None or empty or isinstance(module, (nn.Identity, nn.AvgPool2d))


def acts_alone(module: nn.Module | None) -> bool:
    """It leaves channels, or is an activation, a pooling or a dropout without parameters."""
    known = type(module).__module__ in ALONE and type(module).__name__ not in MIXING
    return leaves_channels(module) or (known and module is not None and not list(module.parameters()))


def squeeze(block: nn.Module, path: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Squeeze-and-excitation reads all channels and writes a gate for each: (consumers, producers), both empty where
    there is none. None for a module that is not known to do so."""
    module = part(block, path) if path else None
    if leaves_channels(module):
        return (), ()
    reads, writes = SQUEEZES.get(type(module).__name__, ("", ""))
    known = bool(kind_of(module)) and reads != "" and is_plain(part(module, reads)) and is_plain(part(module, writes))
    return ((f"{path}.{reads}",), (f"{path}.{writes}",)) if known else None
