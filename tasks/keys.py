"""What identifies a stage's computation: the hash of all that goes into it.

Nothing in a key depends on paths, host names, time, worker count or the order of a dict.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Protocol

from heal.errors import InputError
from tasks import code
from tasks.table import MOVING, Stage

Json = Any
Ingredients = dict[str, Json]
"""stage, params {dotted: value}, inputs {stage: digest}, resolved {dotted: digest}, code {path: hash}, packages
{name: version}; and names {dotted: name}, what the resolved ones were called, which is no part of the key."""

Resolved = Mapping[str, str]
"""Dotted params key of a moving name (an alias, a branch, a path) -> digest of what it points to now.

Such as {"dense.source": "<digest>"}. Where the key is a param itself, the digest stands in for the
name; where it is a whole section, it stands beside it.
"""

PACKAGES = ("torch", "timm")


class StageParams(Protocol):
    """What keys and the runner ask of the params; tasks.params has the real ones."""

    def slice(self, keys: tuple[str, ...]) -> dict[str, Json]: ...

    def restrict(self, keys: tuple[str, ...]) -> Any: ...

    def method_modules(self, keys: tuple[str, ...]) -> tuple[str, ...]: ...


def stage_key(
    stage: Stage, params: StageParams, inputs: Mapping[str, str], resolved: Resolved | None = None
) -> tuple[str, Ingredients]:
    """The key of a computation and what went into it. `inputs` are digests by upstream stage."""
    ingredients = {
        "stage": stage.name,
        **settings(stage, params, resolved),
        "inputs": {name: inputs[name] for name in stage.upstream},
        "code": code.hashes(stage.module, params.method_modules(stage.params), stage.files),
        "packages": packages(),
    }
    return key_of(ingredients), ingredients


def settings(stage: Stage, params: StageParams, resolved: Resolved | None = None) -> Ingredients:
    """The params that the stage declares, flat; the moving names among them apart, with what they point to."""
    pointed = {name: digest for name, digest in (resolved or {}).items() if _concerns(name, stage.params)}
    flat = flatten(params.slice(stage.params))
    return {
        "params": {name: value for name, value in flat.items() if name not in pointed},
        "resolved": pointed,
        "names": {name: value for name, value in flat.items() if name in pointed},
    }


def key_of(ingredients: Ingredients) -> str:
    """SHA-256 of the ingredients, the code as one digest; what moving names are called does not count."""
    counted = {name: value for name, value in ingredients.items() if name != "names"}
    return sha256(canonical({**counted, "code": sha256(canonical(ingredients["code"]))}))


def packages() -> dict[str, str]:
    """Public versions (no local part such as +cpu) of what computes, without importing it."""
    return {name: version(name).partition("+")[0] for name in PACKAGES}


def flatten(tree: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    """{"a": {"b": 1}} -> {"a.b": 1}. Lists and empty mappings are values."""
    flat: dict[str, Json] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = _checked(value, f"{prefix}{name}")
    return flat


def canonical(value: Json) -> str:
    """JSON with one spelling for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256(text: str) -> str:
    """SHA-256 of a text, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_moving(stage: Stage) -> bool:
    """Whether the stage reads params that name something which may change meanwhile."""
    return any(_concerns(name, stage.params) for name in MOVING)


def _concerns(name: str, keys: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.") for key in keys)


def _checked(value: Json, name: str) -> Json:
    try:
        canonical(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"params {name} = {value!r} cannot be part of a key ({error}); use numbers, texts, lists and mappings"
        ) from error
    return value
