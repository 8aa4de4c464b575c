"""How heads lie in timm's attention: in the rows of its `qkv` and in the columns of its `proj`.

The rows are all queries, all keys, all values, each of them head after head; the columns are those of the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARTS: Mapping[str, str] = {"qk": "qk", "v": "v", "heads": "qkv"}
"""Which parts of the rows lose channels, by the kind of channels."""


@dataclass(frozen=True)
class Heads:
    """number: of heads. qk: dimensions of a head's queries, and of its keys. v: of its values."""

    number: int
    qk: int
    v: int

    @classmethod
    def of(cls, attention: Any) -> Heads:
        """As the sizes of its layers tell."""
        number, rows, columns = attention.num_heads, attention.qkv.out_features, attention.proj.in_features
        return cls(number, (rows - columns) // 2 // number, columns // number)

    def width(self, kind: str) -> int:
        """How many channels of a kind there are: dimensions of one head, or heads."""
        return {"qk": self.qk, "v": self.v, "heads": self.number}[kind]

    def rows(self, kind: str, keep: Tensor) -> Tensor:
        """The rows of qkv that stay, ascending, where the channels `keep` ([kept], or [heads, kept]) do."""
        chosen, start = [], 0
        for part in "qkv":
            own = self._within(part, kind, keep) if part in PARTS[kind] else torch.arange(self._size(part))
            chosen.append(start + own)
            start += self._size(part)
        return torch.cat(chosen)

    def columns(self, kind: str, keep: Tensor) -> Tensor:
        """The columns of proj that stay, ascending."""
        return self._within("v", kind, keep)

    def totals(self, kind: str, values: Tensor) -> Tensor:
        """What values [rows of qkv] add up to for every channel: [heads], of dimensions [heads, dimensions]."""
        parts = torch.split(values, [self._size(part) for part in "qkv"])
        own = [x.view(self.number, -1) for part, x in zip("qkv", parts, strict=True) if part in PARTS[kind]]
        return torch.cat(own, dim=1).sum(1) if kind == "heads" else torch.stack(own).sum(0)

    def _within(self, part: str, kind: str, keep: Tensor) -> Tensor:
        width = self._size(part) // self.number
        if kind == "heads":
            return (keep.unsqueeze(1) * width + torch.arange(width)).flatten()
        return (torch.arange(self.number).unsqueeze(1) * width + keep).flatten()

    def _size(self, part: str) -> int:
        return self.number * (self.v if part == "v" else self.qk)
