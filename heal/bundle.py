"""A model that stands alone: a folder that loads with torch and timm, without pickle and without its own code."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from heal import bundle_format, masking
from heal.architecture import Architecture, Changes, recognise
from heal.atomic import write_folder
from heal.bundle_format import CARD, CONFIG, DESCRIPTION, FILES, FORMAT, SHALLOW, VERSION, WEIGHTS, read_file, sha256
from heal.errors import BundleError
from heal.families.lookup import describe
from heal.model_card import card, why_not_timm
from heal.timm_config import adopt_preprocessing, config, preprocessing
from heal.values import Mask
from heal.weights_file import FLOATING, PACK_FROM, Entries, decode, decode_masks, encode

EXPORTED = "model.safetensors"

Folder = str | PathLike[str]


def save(
    model: nn.Module,
    folder: Folder,
    *,
    architecture: Architecture | None = None,
    mask: Mask | None = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> str:
    """Write the model to `folder`, whole or not at all, and give the bundle's digest.

    architecture: needed only for a network that neither timm nor Architecture.build made. mask: which
    weights stay (packed where 35 % or more go); without one, the weights that are not zero. metadata:
    any of bundle_format.METADATA. dtype: float32, or float16 / bfloat16 for smaller matrices whose
    values change. Equal models give equal bytes. Replaces a bundle, and nothing else, that is there.
    Raises WeightsError, ArchitectureError or BundleError; nothing is written then.
    """
    recipe, found = recognise(model, architecture)
    weights, tensors = encode(model.state_dict(), _kept(model, mask), dtype)
    description = _described(model, recipe, found, metadata or {})
    description |= {"tensors": tensors, "dtype": dtype}
    files = {WEIGHTS: weights, CARD: card(description, len(weights)).encode()}
    if why_not_timm(description) is None:
        files[CONFIG] = bundle_format.dumps(config(model, description), CONFIG)
    digests = {name: sha256(data) for name, data in files.items()}
    files[DESCRIPTION] = bundle_format.dumps(description | {"files": digests})
    write_folder(Path(folder), files, DESCRIPTION, {DESCRIPTION, *FILES})
    return bundle_format.combined(digests | {DESCRIPTION: sha256(files[DESCRIPTION])})


def load(folder: Folder, allow_adapters: Collection[str] = ()) -> nn.Module:
    """The model in eval mode on the CPU, its weights bit for bit those that were stored.

    Nothing outside the folder is read and no code in it is run; an adapter (`package.module:function`)
    is imported only when `allow_adapters` lists it. Raises BundleError when anything does not fit,
    ArchitectureError when the network cannot be built here.
    """
    description, files = _verified(Path(folder))
    model = Architecture(**description["architecture"]).build(allow_adapters)
    adopt_preprocessing(model, description["preprocessing"] or {})
    with _naming(Path(folder)):
        _changes(description).apply(model)
        _check_fits(model.state_dict(), description["tensors"])
        _fill(model, decode(files[WEIGHTS], description["tensors"]))
    return model.eval()


def read(folder: Folder) -> dict[str, Any]:
    """The validated content of bundle.json; the other files are not looked at. Raises BundleError."""
    return bundle_format.parse(read_file(Path(folder), DESCRIPTION), Path(folder) / DESCRIPTION)


def digest(folder: Folder) -> str:
    """SHA-256 over the digests of the bundle's files, each checked. Raises BundleError."""
    _, files = _verified(Path(folder))
    return bundle_format.combined({name: sha256(data) for name, data in files.items()})


def adapter(folder: Folder) -> str | None:
    """The adapter that builds the network, as package.module:function; None for timm's. Raises BundleError."""
    built = read(folder)["architecture"]
    return str(built["name"]) if built["source"] == "adapter" else None


def masks(folder: Folder) -> Mask:
    """Which weights stay, of the layers that are stored packed: kept zeros count as kept. Raises BundleError."""
    description, files = _verified(Path(folder))
    with _naming(Path(folder)):
        keep = decode_masks(files[WEIGHTS], description["tensors"])
    return Mask({name.removesuffix(".weight"): mask for name, mask in keep.items()})


def export_dense(folder: Folder, out: Folder) -> None:
    """Write a model folder that plain timm opens: `timm.create_model("local-dir:OUT", pretrained=True)`.

    Zeros are stored as zeros. Raises BundleError for a bundle that differs from timm's own shapes.
    """
    description, files = _verified(Path(folder))
    if CONFIG not in files:
        why = why_not_timm(description) or f"it carries no {CONFIG}"
        raise BundleError(f"{folder}: plain timm cannot open this model: {why}; use heal.load")
    tensors = {name: tensor.clone() for name, tensor in load(folder).state_dict().items()}
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_folder(Path(out), {EXPORTED: weights, CONFIG: files[CONFIG]}, EXPORTED, {EXPORTED, CONFIG})


def _described(model: nn.Module, recipe: Architecture, found: Changes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bundle.json but for what depends on the weights file."""
    known = bundle_format.checked_metadata(metadata)
    names, classes = known["class_names"], getattr(model, "num_classes", None)
    if names is not None and classes is not None and len(names) != classes:
        raise BundleError(f"metadata: {len(names)} class_names for a model of {classes} classes; name each class once")
    if known["preprocessing"] is None:
        known["preprocessing"] = preprocessing(model, recipe.kwargs)
    shapes: dict[str, Any] = {"channels": dict(found.channels), "biases": list(found.biases)}
    if found.dropped:
        shapes["dropped"] = list(found.dropped)
    version = SHALLOW if found.dropped else VERSION
    return {"format": FORMAT, "version": version, "architecture": recipe.description(), **shapes, **known}


def _changes(description: Mapping[str, Any]) -> Changes:
    return Changes(description["channels"], tuple(description["biases"]), tuple(description["dropped"]))


def _kept(model: nn.Module, mask: Mask | None) -> dict[str, Tensor]:
    """Bool masks by the tensors' names."""
    if mask is not None:
        for layer, keep in mask.keep.items():
            masking.masked_weight(model, layer, keep)
        return {f"{layer}.weight": keep for layer, keep in mask.keep.items()}
    weights = {
        f"{layer}.weight": model.get_submodule(layer).get_parameter("weight") for layer in describe(model).layers
    }
    nonzero = {name: weight.detach() != 0 for name, weight in weights.items()}
    return {name: keep for name, keep in nonzero.items() if int((~keep).sum()) >= PACK_FROM * keep.numel()}


def _verified(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """bundle.json, and the bytes of every file, which are those that it lists. Raises BundleError."""
    data = read_file(folder, DESCRIPTION)
    description = bundle_format.parse(data, folder / DESCRIPTION)
    files = {name: read_file(folder, name) for name in description["files"]}
    for name, expected in description["files"].items():
        if sha256(files[name]) != expected:
            raise BundleError(f"{folder / name} is not the file that {DESCRIPTION} lists; fetch the bundle again")
    return description, {**files, DESCRIPTION: data}


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Say which bundle an error is about."""
    try:
        yield
    except BundleError as error:
        raise BundleError(f"{folder}: {error}") from error


def _check_fits(built: Mapping[str, Tensor], entries: Entries) -> None:
    """Before anything of a claimed size is allocated. Raises BundleError."""
    for what, names in (("lacks", built.keys() - entries.keys()), ("holds unknown", entries.keys() - built.keys())):
        if names:
            raise BundleError(f"it {what} {', '.join(sorted(names)[:5])} (by its architecture); save the bundle again")
    for name, entry in entries.items():
        expected = built[name]
        dtype = str(expected.dtype).removeprefix("torch.")
        is_of_kind = entry["dtype"] == dtype or {entry["dtype"], dtype} <= FLOATING
        if entry["shape"] != list(expected.shape) or not is_of_kind:
            raise BundleError(
                f"tensor {name} is {entry['dtype']} {entry['shape']}, but its architecture and channels "
                f"make it {dtype} {list(expected.shape)}; save the bundle again"
            )


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the weights in, first giving every tensor the dtype it was saved from; tied ones stay tied."""
    floating = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(floating) == 1:
        model.to(floating.pop())
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(state[name].dtype)
    model.load_state_dict(dict(state))
