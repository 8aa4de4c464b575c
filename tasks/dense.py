"""Stage: the trained model to compress, from wherever it is, as a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from heal import bundle, cost
from heal.architecture import Architecture, of
from heal.bundle_format import DESCRIPTION, METADATA
from heal.errors import ArchitectureError, WeightsError
from heal.evaluation import predict
from heal.families.lookup import describe
from heal.pruned import refuse_broken
from heal.timm_config import preprocessing
from tasks import adapter_code, artifacts, demo, dense_source, source_name, weights
from tasks.preprocessing import Preprocessing, parse

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.params_schema import Dense
    from tasks.progress import Progress


@dataclass(frozen=True)
class _Opened:
    """A network with what is known of it. `folder`: the bundle it was read from, if it was."""

    model: nn.Module
    architecture: Architecture
    known: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Write the bundle and dense.json. Raises InputError."""
    section = params.dense
    opened = _open(section, progress)
    is_changed = _in_float32(opened.model, progress)
    refuse_broken(opened.model)
    metadata = _metadata(section, opened)
    if opened.folder is not None and metadata == opened.known and not is_changed:
        digest = _copied(opened.folder, output / "bundle")
    else:
        mask = bundle.masks(opened.folder) if opened.folder is not None else None
        digest = bundle.save(
            opened.model, output / "bundle", architecture=opened.architecture, mask=mask, metadata=metadata
        )
    family, parameters = describe(opened.model).name, cost.parameters(opened.model)
    classes = _classes(opened.model, parse(bundle.read(output / "bundle")["preprocessing"]))
    described = {"source": source_name.public(section.source), "digest": digest, "family": family, "classes": classes}
    if opened.architecture.source == "adapter":  # what comes after depends on this code as well
        described["code"] = adapter_code.digest(opened.architecture.name)
    artifacts.write_json(output / "dense.json", described)
    progress.log(f"{opened.architecture.name} of family {family}, {parameters:,} parameters")
    return {"parameters": float(parameters)}


def _in_float32(model: nn.Module, progress: Progress) -> bool:
    """Bring every weight to float32, in which everything is computed; whether there was another."""
    others = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype != torch.float32}
    if others:
        progress.fallback(
            f"weights are {', '.join(sorted(others))}: brought to float32, in which everything is computed"
        )
        model.float()
    return bool(others)


def _open(section: Dense, progress: Progress) -> _Opened:
    kind, name = dense_source.split(section.source)
    if kind == "models":
        return _from_bundle(_registered(section, progress), section)
    if kind == "bundle":
        return _from_bundle(Path(name), section)
    if kind == "timm":
        return _from_timm(name, section.architecture_args)
    architecture = dense_source.architecture(section.architecture or "" if kind == "file" else section.source, section)
    model = dense_source.built(architecture, section)
    if kind == "file":
        weights.fill(model, weights.read(Path(name)), Path(name).name)
    return _Opened(model, architecture)


def _registered(section: Dense, progress: Progress) -> Path:
    """The bundle of a registered version, or the digits model trained in its place."""
    from tasks import registry

    if not dense_source.is_to_train(section):
        return registry.fetch_bundle(section.source)
    progress.fallback(
        f"{section.source} is not in the registry: trains a small ViT on digits instead (dense.if_missing: train)"
    )
    folder = progress.checkpoints / "trained"
    demo.train_digits(folder, section.seed, progress)
    return folder


def _from_bundle(folder: Path, section: Dense) -> _Opened:
    described = bundle.read(folder)
    known = {key: described.get(key) for key in METADATA}
    model = bundle.load(folder, allow_adapters=section.adapter_allow)
    return _Opened(model, Architecture(**described["architecture"]), known, folder)


def _from_timm(name: str, kwargs: Mapping[str, Any]) -> _Opened:
    from heal.compat import timm

    tagged = dense_source.tagged(name)
    own = timm.get_pretrained_cfg(tagged)
    asked = Architecture("timm", tagged.partition(".")[0], dict(kwargs)).kwargs.get("num_classes")
    if own is not None and asked not in (None, own.num_classes):
        raise ArchitectureError(
            f"timm:{tagged} was trained for {own.num_classes} classes; with num_classes: {asked} its head would be "
            "noise. Train it first, and name the result with file:PATH or bundle:PATH"
        )
    try:
        model: nn.Module = timm.create_model(tagged, pretrained=True, **kwargs).eval()
    except (OSError, RuntimeError, ValueError, TypeError, HfHubHTTPError) as error:
        first = str(error).partition("\n")[0]
        raise WeightsError(
            f"timm:{name}: the weights {tagged} are not in the local cache and cannot be fetched, or do not fit "
            f"({type(error).__name__}: {first}); fetch them with a connection, or use file:PATH"
        ) from error
    return _Opened(model, of(model))


def _metadata(section: Dense, opened: _Opened) -> dict[str, Any]:
    """What is known of the model, under what params say. Raises InputError when preprocessing stays unknown."""
    metadata = dict(opened.known)
    if section.class_names is not None:
        metadata["class_names"] = list(section.class_names)
    asked = section.preprocessing.model_dump(mode="json", exclude_none=True)
    if asked or metadata.get("preprocessing") is None:
        metadata["preprocessing"] = _preprocessing(asked, metadata.get("preprocessing"), opened)
    return metadata


def _preprocessing(asked: Mapping[str, Any], known: Mapping[str, Any] | None, opened: _Opened) -> dict[str, Any]:
    own = known or preprocessing(opened.model, opened.architecture.kwargs) or {}
    if "size" in asked and asked["size"] != own.get("size"):
        own = {key: value for key, value in own.items() if key != "resize"}  # it was chosen for another size
    return parse({**own, **asked}).described()


def _classes(model: nn.Module, preprocessing: Preprocessing) -> int:
    """How many logits the network gives; an image of zeros is enough to see. Raises ArchitectureError."""
    try:
        return predict(model, torch.zeros(1, 3, *preprocessing.size)).shape[1]
    except (RuntimeError, AssertionError, ValueError) as error:  # as networks refuse a shape
        height, width = preprocessing.size
        raise ArchitectureError(
            f"{type(model).__name__} does not take an image of 3 x {height} x {width}: {error}; check "
            "dense.preprocessing.size, and that dense.architecture_args leave three channels"
        ) from error


def _copied(folder: Path, target: Path) -> str:
    """The bundle's own files, byte for byte, so that the same model is the same artifact from every source."""
    target.mkdir(parents=True)
    for name in (DESCRIPTION, *bundle.read(folder)["files"]):
        shutil.copyfile(folder / name, target / name)
    return bundle.digest(target)
