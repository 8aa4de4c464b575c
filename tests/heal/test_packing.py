"""The sparse-bitmask layout, against a decoder that anyone could write from its description."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heal.errors import BundleError
from heal.packing import PARTS, pack, unpack, unpack_mask

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


def reference_decoder(packed: dict[str, Array]) -> Array:
    """The published layout, read by numpy alone: bit j % 8 of byte j // 8 is column j."""
    rows, cols = (int(length) for length in packed["shape"])
    bits = np.unpackbits(packed["bitmask"].astype(np.uint8), axis=1, bitorder="little")
    weight = np.zeros((rows, cols), dtype=packed["compressed"].dtype)
    for row in range(rows):
        start = int(packed["row_offsets"][row])
        columns = np.flatnonzero(bits[row, :cols])
        weight[row, columns] = packed["compressed"][start : start + len(columns)]
    return weight


def as_arrays(packed: dict[str, Tensor]) -> dict[str, Array]:
    return {part: tensor.numpy() for part, tensor in packed.items()}


@st.composite
def weights_and_masks(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Any small shape, any density, with zeros among the kept values."""
    rows, cols = draw(st.integers(0, 7)), draw(st.integers(0, 19))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(rows, cols, generator=generator) < draw(st.floats(0, 1))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.float64]))
    weight = torch.randint(-2, 3, (rows, cols), generator=generator).to(dtype)
    return weight * mask, mask


@given(weights_and_masks())
@settings(deadline=None, max_examples=150)
def test_numpy_and_unpack_read_the_packed_weight(case: tuple[Tensor, Tensor]) -> None:
    weight, mask = case
    packed = pack(weight, mask)
    assert np.array_equal(reference_decoder(as_arrays(packed)), weight.numpy())
    assert torch.equal(unpack(packed), weight) and unpack(packed).dtype == weight.dtype
    assert torch.equal(unpack_mask(packed), mask)


def test_the_layout_is_the_published_one() -> None:
    weight = torch.tensor([[0, 5, 0, 0, 0, 0, 0, 0, 0, 7], [0.0] * 10, [1, 0, 0, 0, 0, 0, 0, 2, 3, 0]])
    packed = pack(weight, weight != 0)
    assert list(packed) == list(PARTS)
    assert packed["compressed"].tolist() == [5, 7, 1, 2, 3]
    assert packed["bitmask"].tolist() == [[0b10, 0b10], [0, 0], [0b1000_0001, 0b1]]
    assert packed["shape"].tolist() == [3, 10] and packed["row_offsets"].tolist() == [0, 2, 2]
    dtypes = [packed[part].dtype for part in PARTS]
    assert dtypes == [torch.float32, torch.uint8, torch.int64, torch.int64]


def test_a_kept_zero_has_its_bit_and_its_value() -> None:
    packed = pack(torch.zeros(2, 3), torch.tensor([[True, False, False], [False, True, True]]))
    assert packed["compressed"].tolist() == [0, 0, 0]
    assert unpack_mask(packed).tolist() == [[True, False, False], [False, True, True]]


DAMAGES = {
    "bits are set": {"compressed": torch.ones(2)},
    "not uint8": {"bitmask": torch.ones(2, 2, dtype=torch.int64)},
    "does not cover": {"bitmask": torch.ones(2, 1, dtype=torch.uint8)},
    "last column": {"bitmask": torch.tensor([[1, 0], [0, 0b1000_0010]], dtype=torch.uint8)},
    "running sum": {"row_offsets": torch.tensor([0, 0])},
    "two int64": {"shape": torch.tensor([2, 9, 1])},
    "its shape is": {"shape": torch.tensor([2, -9])},
}


@pytest.mark.parametrize("message", DAMAGES)
def test_parts_that_disagree_are_refused(message: str) -> None:
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 0] = mask[1, 2] = mask[1, 8] = True
    packed = pack(mask.float(), mask) | DAMAGES[message]
    with pytest.raises(BundleError, match=message):
        unpack(packed)
