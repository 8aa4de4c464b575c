"""Stage: the trained model to compress, from wherever it is, as a bundle."""

from __future__ import annotations

import hashlib
import json
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
from heal.compat import timm
from heal.errors import ArchitectureError, InputError, WeightsError
from heal.evaluation import predict
from heal.families.lookup import describe
from heal.naming import nearest
from heal.pruned import refuse_broken
from heal.timm_config import preprocessing
from tasks import artifacts, code, demo, mlflow_store, weights
from tasks.preprocessing import Preprocessing, parse

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.params_schema import Dense
    from tasks.progress import Progress

TRAINED = hashlib.sha256(b"the digits model that tasks/demo.py trains").hexdigest()
"""What a missing registry version points to when it is to be trained: the code and the seed say the rest."""


@dataclass(frozen=True)
class _Opened:
    """A network with what is known of it. `folder`: the bundle it was read from, if it was."""

    model: nn.Module
    architecture: Architecture
    known: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def resolve(params: Params) -> str:
    """The digest of what dense.source points to now. Raises InputError when it is not there."""
    section = params.dense
    kind, name = _split(section.source)
    if kind == "models":
        from tasks import registry  # MLflow takes seconds to import

        # On other images a digits model would be nonsense: then the registry says what it lacks.
        is_digits = params.calibration.source == "digits"
        if is_digits and _is_to_train(section):
            return TRAINED
        version = registry.version_of(section.source)
        return _with_code(version.digest, version.tags.get(registry.ADAPTER), section)
    if kind == "bundle":
        return _with_code(bundle.digest(name), bundle.adapter(Path(name)), section)
    if kind == "timm":
        return _sha256(f"timm:{_tagged(name)}")
    if kind == "file":
        adapter = (section.architecture or "").removeprefix("adapter:")
        return _with_code(weights.digest(Path(name)), adapter if ":" in adapter else None, section)
    return _with_code(weights.digest_of(_built(_architecture(section.source, section), section)), name, section)


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
    described = {"source": _public(section.source), "digest": digest, "family": family, "classes": classes}
    if opened.architecture.source == "adapter":  # what comes after depends on this code as well
        described["code"] = _code_digest(opened.architecture.name)
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
    kind, name = _split(section.source)
    if kind == "models":
        return _from_bundle(_registered(section, progress), section)
    if kind == "bundle":
        return _from_bundle(Path(name), section)
    if kind == "timm":
        return _from_timm(name, section.architecture_args)
    architecture = _architecture(section.architecture or "" if kind == "file" else section.source, section)
    model = _built(architecture, section)
    if kind == "file":
        weights.fill(model, weights.read(Path(name)), Path(name).name)
    return _Opened(model, architecture)


def _registered(section: Dense, progress: Progress) -> Path:
    """The bundle of a registered version, or the digits model trained in its place."""
    from tasks import registry

    if not _is_to_train(section):
        return registry.fetch_bundle(section.source)
    progress.fallback(
        f"{section.source} is not in the registry: trains a small ViT on digits instead (dense.if_missing: train)"
    )
    folder = progress.checkpoints / "trained"
    demo.train_digits(folder, section.seed, progress)
    return folder


def _is_to_train(section: Dense) -> bool:
    """Whether the alias is not there and a digits model may stand in. A registry that is down is not a missing one."""
    name, _, alias = section.source.removeprefix("models:/").partition("@")
    if section.if_missing == "refuse" or not alias:
        return False
    if not mlflow_store.exists(mlflow_store.tracking_uri()):
        return True
    from tasks import registry

    try:
        return alias not in registry.aliases(name)
    except mlflow_store.UnreachableError:
        raise
    except registry.RegistryError:
        return True


def _from_bundle(folder: Path, section: Dense) -> _Opened:
    described = bundle.read(folder)
    known = {key: described.get(key) for key in METADATA}
    model = bundle.load(folder, allow_adapters=section.adapter_allow)
    return _Opened(model, Architecture(**described["architecture"]), known, folder)


def _from_timm(name: str, kwargs: Mapping[str, Any]) -> _Opened:
    tagged = _tagged(name)
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


def _tagged(name: str) -> str:
    """The model's name with the tag of its weights, its default tag if none is given. Raises ArchitectureError."""
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise ArchitectureError(f"timm has no model {base!r} (dense.source); {nearest(base, timm.list_models())}")
    tagged = timm.list_pretrained(f"{base}.*") + timm.list_pretrained(base)
    if tag and name not in tagged:
        raise ArchitectureError(f"timm has no weights {name!r} (dense.source); {nearest(name, tagged)}")
    default = timm.get_pretrained_cfg(base)
    if not tagged or default is None:
        raise WeightsError(f"timm has no trained weights of {base!r}; use file:PATH with dense.architecture: {base}")
    return name if tag or not default.tag else f"{base}.{default.tag}"


def _architecture(named: str, section: Dense) -> Architecture:
    source = "adapter" if named.startswith("adapter:") else "timm"
    return Architecture(source, named.removeprefix("adapter:"), dict(section.architecture_args))


def _built(architecture: Architecture, section: Dense) -> nn.Module:
    """Seeded, so that what an adapter leaves to chance is at least the same chance every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        return architecture.build(section.adapter_allow)


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
    return predict(model, torch.zeros(1, 3, *preprocessing.size)).shape[1]


def _copied(folder: Path, target: Path) -> str:
    """The bundle's own files, byte for byte, so that the same model is the same artifact from every source."""
    target.mkdir(parents=True)
    for name in (DESCRIPTION, *bundle.read(folder)["files"]):
        shutil.copyfile(folder / name, target / name)
    return bundle.digest(target)


def _with_code(digest: str, adapter: str | None, section: Dense) -> str:
    """A network that an adapter builds is its weights and its code. Raises InputError unless params allow the code."""
    if adapter is None:
        return digest
    if adapter not in section.adapter_allow:
        raise InputError(
            f"{section.source} is built by {adapter}, which is code to import; if you trust it, set "
            f"dense.adapter_allow: ['{adapter}']"
        )
    return _sha256(digest + _code_digest(adapter))


def _code_digest(adapter: str) -> str:
    """SHA-256 over the file that holds an adapter and, where that is in a package, all it imports there."""
    module = adapter.partition(":")[0]
    file = code.locate(module)
    return _sha256(json.dumps(code.hashes(module), sort_keys=True)) if "." in module else code.hash_file(file)


def _split(source: str) -> tuple[str, str]:
    kind, _, name = source.partition(":")
    return kind, name


def _public(source: str) -> str:
    """The source without a path of this machine."""
    kind, name = _split(source)
    return f"{kind}:{Path(name).resolve().name}" if kind in ("file", "bundle") else source


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
