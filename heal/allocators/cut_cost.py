"""What a network would cost after a cut, counted on a copy without weights."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from heal.cost import macs
from heal.errors import ImagesError
from heal.images import first
from heal.method import AllocationContext
from heal.surgery import drop, shrink


@dataclass(frozen=True)
class CutCost:
    """skeleton: the network on the meta device. size: (channels, height, width) of an image."""

    skeleton: nn.Module
    size: tuple[int, ...]
    dense: int

    @classmethod
    def of(cls, model: nn.Module, context: AllocationContext) -> CutCost:
        """Raises ImagesError where no image tells the size."""
        if context.images is None:
            raise ImagesError("images: a budget in macs needs one to know their size; pass images")
        size = tuple(first(context.images, 1, 1)[0].shape[1:])
        skeleton = copy.deepcopy(model).to("meta")
        return cls(skeleton, size, macs(skeleton, size))

    def macs(self, widths: Mapping[str, int], dropped: Collection[str] = ()) -> int:
        """Multiply-accumulates of one image once the groups have these widths and these blocks are gone."""
        smaller = copy.deepcopy(self.skeleton)
        drop(smaller, dropped)
        shrink(smaller, widths)
        return macs(smaller, self.size)
