"""What `dense.source` names, and what that points to now. Imports torch and MLflow only for what needs them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from heal.errors import ArchitectureError, InputError, WeightsError
from heal.naming import nearest
from tasks import adapter_code, mlflow_store

if TYPE_CHECKING:
    from torch import nn

    from heal.architecture import Architecture
    from tasks.params_schema import Dense

TRAINED = hashlib.sha256(b"the digits model that tasks/demo.py trains").hexdigest()
"""What a missing registry version points to when it is to be trained: the code and the seed say the rest."""


def resolve(section: Dense, is_digits: bool) -> str:
    """The digest of what dense.source points to now. Raises InputError when it is not there.

    is_digits: whether the images are, so that a digits model may be trained where the registry has none.
    """
    kind, name = split(section.source)
    if kind == "models":
        return _of_registered(section, is_digits)
    if kind == "timm":
        return _sha256(f"timm:{tagged(name)}")
    if kind == "bundle":
        from heal import bundle

        return _with_code(bundle.digest(name), bundle.adapter(Path(name)), section)
    from tasks import weights

    if kind == "file":
        adapter = (section.architecture or "").removeprefix("adapter:")
        return _with_code(weights.digest(Path(name)), adapter if ":" in adapter else None, section)
    return _with_code(weights.digest_of(built(architecture(section.source, section), section)), name, section)


def split(source: str) -> tuple[str, str]:
    """("timm", "deit_tiny") of "timm:deit_tiny"."""
    kind, _, name = source.partition(":")
    return kind, name


def is_to_train(section: Dense) -> bool:
    """Whether the alias is not there and a digits model may stand in. A registry that is down is not a missing one."""
    name, _, alias = section.source.removeprefix("models:/").partition("@")
    if section.if_missing == "refuse" or alias not in ("dense", "champion"):  # which the trained one gets
        return False
    if not mlflow_store.exists(mlflow_store.tracking_uri()):
        return True
    from tasks import registry

    try:
        return alias not in registry.aliases(name)
    except mlflow_store.UnreachableError:
        raise
    except mlflow_store.RegistryError:
        return True


def tagged(name: str) -> str:
    """The timm model's name with the tag of its weights, its default tag if none is given. Raises ArchitectureError."""
    from heal.compat import timm

    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise ArchitectureError(f"timm has no model {base!r} (dense.source); {nearest(base, timm.list_models())}")
    known = timm.list_pretrained(f"{base}.*") + timm.list_pretrained(base)
    if tag and name not in known:
        raise ArchitectureError(f"timm has no weights {name!r} (dense.source); {nearest(name, known)}")
    default = timm.get_pretrained_cfg(base)
    if not known or default is None:
        raise WeightsError(f"timm has no trained weights of {base!r}; use file:PATH with dense.architecture: {base}")
    return name if tag or not default.tag else f"{base}.{default.tag}"


def architecture(named: str, section: Dense) -> Architecture:
    """The recipe of a timm name, or of "adapter:package.module:function"."""
    from heal.architecture import Architecture

    source = "adapter" if named.startswith("adapter:") else "timm"
    return Architecture(source, named.removeprefix("adapter:"), dict(section.architecture_args))


def built(recipe: Architecture, section: Dense) -> nn.Module:
    """Seeded, so that what an adapter leaves to chance is at least the same chance every time."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        return recipe.build(section.adapter_allow)


def skeleton(section: Dense, is_digits: bool) -> nn.Module:
    """The network that dense.source names, without its weights where that works; is_digits, errors: as of `resolve`."""
    from heal.architecture import Architecture

    kind, name = split(section.source)
    if kind == "timm":
        return Architecture("timm", tagged(name).partition(".")[0], dict(section.architecture_args)).skeleton()
    if kind in ("file", "adapter"):
        named = section.architecture or "" if kind == "file" else section.source
        return architecture(named, section).skeleton(section.adapter_allow)
    if kind == "models" and is_digits and is_to_train(section):
        from tasks import demo

        return demo.ARCHITECTURE.skeleton()
    from heal import bundle

    folder = _folder(section)
    _refuse_code(bundle.adapter(folder), section)
    return Architecture(**bundle.read(folder)["architecture"]).skeleton(section.adapter_allow)


def _folder(section: Dense) -> Path:
    """Of a bundle, or of a registered version's."""
    kind, name = split(section.source)
    if kind == "bundle":
        return Path(name)
    mlflow_store.require(mlflow_store.tracking_uri())
    from tasks import registry

    return registry.fetch_bundle(section.source)


def _of_registered(section: Dense, is_digits: bool) -> str:
    # On other images a digits model would be nonsense: then the registry says what it lacks.
    if is_digits and is_to_train(section):
        return TRAINED
    mlflow_store.require(mlflow_store.tracking_uri())
    from tasks import registry

    version = registry.version_of(section.source)
    return _with_code(version.digest, version.tags.get(registry.ADAPTER), section)


def _with_code(digest: str, adapter: str | None, section: Dense) -> str:
    """A network that an adapter builds is its weights and its code. Raises InputError unless params allow the code."""
    _refuse_code(adapter, section)
    return digest if adapter is None else _sha256(digest + adapter_code.digest(adapter))


def _refuse_code(adapter: str | None, section: Dense) -> None:
    if adapter is not None and adapter not in section.adapter_allow:
        raise InputError(
            f"{section.source} is built by {adapter}, which is code to import; if you trust it, set "
            f"dense.adapter_allow: ['{adapter}']"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
