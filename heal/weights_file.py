"""A state dict as the bytes of one safetensors file, and back.

Each tensor has an entry: {"shape", "dtype" (of the model), "stored" (in the file), "layout"}. Stored
narrower than the model's dtype when that loses nothing (every value exact in float16), or when a
narrower dtype was asked for by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from heal.errors import BundleError, WeightsError
from heal.packing import LAYOUT, LAYOUT_VERSION, PARTS, pack, unpack, unpack_mask

PACK_FROM = 0.35
"""The share of zeros from which a tensor is packed."""

DENSE = "dense"
CHOICES = ("float32", "float16", "bfloat16")

# One key only: safetensors writes several in random order, and equal models must give equal bytes.
_HEADER_KEY = "layout"
_HEADER = f"{LAYOUT}/{LAYOUT_VERSION}"

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
DTYPES = frozenset(_DTYPES)
FLOATING = frozenset(name for name, dtype in _DTYPES.items() if dtype.is_floating_point)

Entries = dict[str, dict[str, Any]]


def encode(state: Mapping[str, Tensor], keep: Mapping[str, Tensor], dtype: str) -> tuple[bytes, Entries]:
    """The file's bytes and the entries; the same tensors give the same bytes.

    `keep` maps tensor names to bool masks of their shape: these are packed from 35 % zeros on. `dtype`
    is one of CHOICES: float16 and bfloat16 narrow every floating tensor of two or more dimensions
    (biases, norms and running statistics stay: they are small and sensitive). Raises WeightsError
    naming the tensor: not finite, too large for the dtype, or not zero outside its mask.
    """
    if dtype not in CHOICES:
        raise WeightsError(f"dtype {dtype!r} is not a way to store weights; choose one of {', '.join(CHOICES)}")
    entries: Entries = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = _finite(name, tensor)
        narrow = _narrowed(name, tensor, _DTYPES[dtype])
        mask = _mask_worth_packing(name, tensor, keep)
        entries[name] = _entry(tensor, narrow, DENSE if mask is None else LAYOUT)
        stored.update(_dense(name, narrow) if mask is None else _packed(name, narrow, mask))
    return safetensors.torch.save(stored, metadata={_HEADER_KEY: _HEADER}), entries


def decode(data: bytes, entries: Entries) -> dict[str, Tensor]:
    """The state dict, in the model's dtypes. Raises BundleError where file and entries disagree."""
    stored = _read(data, entries)
    return {name: _restored(name, entry, stored) for name, entry in entries.items()}


def decode_masks(data: bytes, entries: Entries) -> dict[str, Tensor]:
    """The bool masks of the packed tensors, in the tensors' shapes."""
    stored = _read(data, entries)
    packed = [name for name, entry in entries.items() if entry["layout"] == LAYOUT]
    return {name: unpack_mask(_parts(name, stored)).view(entries[name]["shape"]) for name in packed}


def _entry(tensor: Tensor, stored: Tensor, layout: str) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": _name(tensor.dtype), "stored": _name(stored.dtype), "layout": layout}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise WeightsError(f"the model's state {name} is a {type(tensor).__name__}; a bundle holds tensors only")
    tensor = tensor.detach().cpu()
    if _name(tensor.dtype) not in DTYPES:
        raise WeightsError(f"tensor {name} is {tensor.dtype}, which a bundle does not hold; convert it first")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise WeightsError(f"tensor {name} holds NaN or infinity; a bundle holds finite weights only")
    return tensor


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor):
        return tensor.half()
    if dtype == torch.float32 or tensor.ndim < 2 or not tensor.is_floating_point() or tensor.itemsize <= dtype.itemsize:
        return tensor
    narrow = tensor.to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        largest = float(tensor.abs().max())
        raise WeightsError(f"tensor {name} holds {largest:g}, too large for {_name(dtype)}; choose bfloat16 or float32")
    return narrow


def _mask_worth_packing(name: str, tensor: Tensor, keep: Mapping[str, Tensor]) -> Tensor | None:
    if name not in keep:
        return None
    mask = keep[name].cpu()
    if mask.shape != tensor.shape:
        raise WeightsError(
            f"the mask of {name} is {list(mask.shape)}, the tensor {list(tensor.shape)}; mask it as it is"
        )
    outside = int(tensor[~mask].count_nonzero())
    if outside:
        raise WeightsError(f"tensor {name}: {outside} weights outside its mask are not zero; apply the mask first")
    removed = mask.numel() - int(mask.count_nonzero())
    return mask if mask.ndim >= 2 and removed >= PACK_FROM * max(mask.numel(), 1) else None


def _dense(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor.clone(memory_format=torch.contiguous_format)}  # tied tensors share storage: one copy each


def _packed(name: str, tensor: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {f"{name}.{part}": value for part, value in pack(tensor.flatten(1), mask.flatten(1)).items()}


def _read(data: bytes, entries: Entries) -> dict[str, Tensor]:
    """The file's own tensors, which must be those that the entries say."""
    try:
        stored = safetensors.torch.load(data)
    except SafetensorError as error:
        raise BundleError(f"weights.safetensors is not a safetensors file ({error}); fetch the bundle again") from error
    layout = _header(data).get(_HEADER_KEY)
    if layout != _HEADER:
        raise BundleError(f"weights.safetensors is of layout {layout!r}, this reads {_HEADER!r}; upgrade regrow")
    expected = set(_stored_names(entries))
    for what, names in (("lacks", expected - stored.keys()), ("holds unknown", stored.keys() - expected)):
        if names:
            some = ", ".join(sorted(names)[:5])
            raise BundleError(f"weights.safetensors {what} {some} (by bundle.json); fetch or save the bundle again")
    return stored


def _header(data: bytes) -> dict[str, str]:
    """The metadata of a file that safetensors has accepted."""
    length = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    return found


def _stored_names(entries: Entries) -> Iterator[str]:
    for name, entry in entries.items():
        yield from (f"{name}.{part}" for part in PARTS) if entry["layout"] == LAYOUT else [name]


def _parts(name: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {part: stored[f"{name}.{part}"] for part in PARTS}


def _restored(name: str, entry: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    tensor = stored[name] if entry["layout"] == DENSE else _unpacked(name, entry["shape"], stored)
    if list(tensor.shape) != entry["shape"] or _name(tensor.dtype) != entry["stored"]:
        raise BundleError(
            f"tensor {name} is {_name(tensor.dtype)} {list(tensor.shape)} in weights.safetensors, "
            f"{entry['stored']} {entry['shape']} in bundle.json; fetch or save the bundle again"
        )
    return tensor.to(_DTYPES[entry["dtype"]])


def _unpacked(name: str, shape: list[int], stored: Mapping[str, Tensor]) -> Tensor:
    parts = _parts(name, stored)
    flat = [shape[0], torch.Size(shape[1:]).numel()] if len(shape) > 1 else shape
    if parts["shape"].tolist() != flat:
        raise BundleError(f"tensor {name} is packed as {parts['shape'].tolist()}, not the 2-D view of {shape}")
    try:
        return unpack(parts).view(shape)
    except BundleError as error:
        raise BundleError(f"tensor {name} in weights.safetensors: {error}") from error
