"""The published `sparse-bitmask` layout: one bit a weight, and the values of the bits that are set.

Of a weight [rows, cols] and its mask, four tensors:

    compressed   [kept]                 the kept values in row-major order, in the weight's dtype
    bitmask      [rows, ceil(cols/8)]   uint8, bit j % 8 of byte j // 8 is column j (little bit order)
    shape        [2]                    int64, (rows, cols)
    row_offsets  [rows]                 int64, where each row starts in `compressed` (exclusive running sum)

Layout and names are those of compressed-tensors (up to 0.14). Two choices are ours: always the 2-D
view (along a kernel's width the bits and offsets outweigh the values), and bits from the mask
(`value != 0` would lose a weight that is kept and happens to be zero).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from heal.errors import BundleError

LAYOUT = "sparse-bitmask"
LAYOUT_VERSION = 1
PARTS = ("compressed", "bitmask", "shape", "row_offsets")

_BITS = range(8)


def pack(weight: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The four tensors of a weight [rows, cols] and its bool mask of the same shape."""
    assert weight.ndim == 2 and weight.shape == mask.shape and mask.dtype == torch.bool
    kept = mask.count_nonzero(dim=1)
    return {
        "compressed": weight[mask],
        "bitmask": _to_bits(mask),
        "shape": torch.tensor(weight.shape, dtype=torch.int64),
        "row_offsets": kept.cumsum(0) - kept,
    }


def unpack(packed: Mapping[str, Tensor]) -> Tensor:
    """The weight [rows, cols], zero where no bit is set. Raises BundleError when the parts disagree."""
    mask = unpack_mask(packed)
    weight = torch.zeros(mask.shape, dtype=packed["compressed"].dtype)
    weight[mask] = packed["compressed"]
    return weight


def unpack_mask(packed: Mapping[str, Tensor]) -> Tensor:
    """The bool mask [rows, cols]. Raises BundleError when the parts disagree."""
    rows, cols = _shape(packed["shape"])
    bits = packed["bitmask"]
    _require(bits.dtype == torch.uint8, f"its bitmask is {bits.dtype}, not uint8")
    _require(
        bits.shape == (rows, -(-cols // 8)), f"a bitmask of {list(bits.shape)} does not cover a weight of {rows}x{cols}"
    )
    every = _from_bits(bits)
    mask = every[:, :cols].contiguous()
    _require(not bool(every[:, cols:].any()), "bits are set beyond its last column")
    _check_values(mask, packed["compressed"], packed["row_offsets"])
    return mask


def _shape(shape: Tensor) -> tuple[int, int]:
    _require(shape.dtype == torch.int64 and shape.shape == (2,), "its shape is not two int64 numbers")
    rows, cols = shape.tolist()
    _require(rows >= 0 and cols >= 0, f"its shape is {rows}x{cols}")
    return rows, cols


def _check_values(mask: Tensor, values: Tensor, row_offsets: Tensor) -> None:
    kept = mask.count_nonzero(dim=1)
    total = int(kept.sum())
    _require(values.shape == (total,), f"{total} bits are set but there are {values.numel()} values")
    _require(
        row_offsets.dtype == torch.int64 and torch.equal(row_offsets, kept.cumsum(0) - kept),
        "its row offsets are not the running sum of its bits",
    )


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise BundleError(f"a packed tensor is damaged: {what}; fetch or save the bundle again")


def _to_bits(mask: Tensor) -> Tensor:
    rows, cols = mask.shape
    octets = torch.nn.functional.pad(mask.to(torch.uint8), (0, -cols % 8)).view(rows, -(-cols // 8), 8)
    bits = torch.zeros(octets.shape[:2], dtype=torch.uint8)
    for place in _BITS:
        bits |= octets[:, :, place] << place
    return bits


def _from_bits(bits: Tensor) -> Tensor:
    return torch.stack([(bits >> place) & 1 for place in _BITS], dim=2).flatten(1).bool()
