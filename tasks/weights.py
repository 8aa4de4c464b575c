"""Weight files of any origin put into a network: read without pickle, refused unless every tensor fits."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from heal.errors import WeightsError

WRAPPERS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")

_SHOWN = 3
_UNREADABLE = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, ValueError, LookupError, OSError)


def digest(path: Path) -> str:
    """SHA-256 of the file. Raises WeightsError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"file:{path} cannot be read: {error.strerror}; check dense.source") from error


def digest_of(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a network's state."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()}\n".encode())
    return total.hexdigest()


def read(path: Path) -> dict[str, Tensor]:
    """The state dict of a `.safetensors` file, or of a torch checkpoint, unwrapped. Raises WeightsError."""
    found: object
    if path.suffix == ".safetensors":
        try:
            found = load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} cannot be read as safetensors: {error}") from error
    else:
        found = _checkpoint(path)
    while isinstance(found, Mapping) and (wrapper := next((key for key in WRAPPERS if _wraps(found, key)), None)):
        found = found[wrapper]
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        raise WeightsError(
            f"{path} holds no state dict (name -> tensor, alone or under {' or '.join(WRAPPERS)}); "
            "save model.state_dict() instead"
        )
    return _without_prefix({str(name): tensor for name, tensor in found.items()})


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy a state dict into the network, in the network's dtypes (fp16 widens to fp32).

    Raises WeightsError naming the first tensors that are missing, unknown, of another shape or kind,
    or not finite; the network is untouched then.
    """
    wanted = model.state_dict()
    problems = list(_misfits(wanted, state))
    if problems:
        raise WeightsError(f"{where} does not fit the architecture: {'; '.join(problems)}; {_advice(wanted, state)}")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{where}: tensor {name} holds NaN or infinity; use weights from before it diverged")
    model.load_state_dict({name: state[name].to(wanted[name].dtype) for name in state}, strict=False)


def _checkpoint(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        first = str(error).partition("\n")[0]
        raise WeightsError(
            f"{path} cannot be read as weights only ({first}); nothing else is unpickled: "
            "save model.state_dict() with torch.save or safetensors"
        ) from error


def _wraps(found: Mapping[object, object], key: str) -> bool:
    return isinstance(found.get(key), Mapping)


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what DataParallel and torch.compile put before every name."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _without_prefix({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return state


def _misfits(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    # Old checkpoints lack the counters, which no network in eval mode reads.
    missing = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in wanted]
    both = [name for name in state if name in wanted]
    shapes = [f"{n} {_shape(state[n])}, not {_shape(wanted[n])}" for n in both if state[n].shape != wanted[n].shape]
    kinds = [f"{n} {state[n].dtype}" for n in both if state[n].is_floating_point() != wanted[n].is_floating_point()]
    named = (("lacks", missing), ("has unknown", unknown), ("has other shapes", shapes), ("has other types", kinds))
    for what, names in named:
        if names:
            yield f"{what} {_some(names)}"


def _advice(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """A classifier of another width is the usual reason."""
    last = list(wanted)[-1]
    given = state.get(last)
    if given is not None and given.ndim == 1 and given.shape != wanted[last].shape:
        return f"try dense.architecture_args: {{num_classes: {len(given)}}}"
    return "check dense.architecture and dense.architecture_args"


def _some(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:_SHOWN])
    return first if len(names) <= _SHOWN else f"{first} and {len(names) - _SHOWN} more"


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
