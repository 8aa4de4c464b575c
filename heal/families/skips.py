"""Blocks that add what they compute to their input: without one, its input passes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from heal.families.channelwise import kind_of, part

ALWAYS = (
    "vision_transformer.Block",
    "vision_transformer.ResPostBlock",
    "vision_transformer.ParallelScalingBlock",
    "vision_transformer.DiffParallelScalingBlock",
    "vision_transformer.ParallelThingsBlock",
    "swin_transformer.SwinTransformerBlock",
    "swin_transformer_v2.SwinTransformerV2Block",
)

LAST: dict[str, str] = {"resnet.BasicBlock": "act2", "resnet.Bottleneck": "act3", "regnet.Bottleneck": "act3"}
"""The activation behind the sum. RegNet's PreBottleneck is not here: it adds to its input's norm, not to its input."""


class Dropped(nn.Identity):
    """What stands where a block was: its input, whatever else the block was called with (timm's ViTs hand masks on)."""

    def forward(self, input: Tensor, *_: object, **__: object) -> Tensor:
        """The same tensor."""
        return input


def droppable(model: nn.Module, blocks: Iterable[str]) -> tuple[str, ...]:
    """Those of the blocks that can be left out."""
    return tuple(name for name in blocks if _adds_to_its_input(model.get_submodule(name)))


def _adds_to_its_input(block: Any) -> bool:
    kind = kind_of(block)
    if kind in ALWAYS:
        return True
    if kind == "convnext.ConvNeXtBlock":
        return isinstance(block.shortcut, nn.Identity)
    if kind.startswith("_efficientnet_blocks."):
        return bool(getattr(block, "has_skip", False))
    return kind in LAST and _skips(kind, block) and _leaves_sums(block, LAST[kind])


def _skips(kind: str, block: Any) -> bool:
    if kind.startswith("resnet."):
        return bool(block.downsample is None and block.stride == 1)
    return isinstance(block.downsample, nn.Identity)  # None: RegNet adds nothing


def _leaves_sums(block: nn.Module, last: str) -> bool:
    """Whether it leaves the input alone when the block adds zero: what comes out of such blocks, and out of the stem
    before them, is at least 0 then."""
    return type(part(block, last)) in (nn.ReLU, nn.Identity)
