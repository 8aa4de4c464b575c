"""How to build a network without its weights: a timm name or a function of the user's, and kwargs."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from heal.errors import ArchitectureError
from heal.families.lookup import OWN_TABLE, describe
from heal.naming import nearest
from heal.sameness import first_difference, plain
from heal.surgery import drop, shrink, widths

SOURCES = ("timm", "adapter")

_REMEMBERED = "_regrow_architecture"
_ADAPTER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

# kwargs of timm that download, read files, or change what is built in ways that a bundle does not hold
_REFUSED = frozenset(
    {"checkpoint_path", "cache_dir", "features_only", "scriptable", "exportable", "no_jit", "device", "dtype"}
)
_BUILD_ERRORS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError, ArithmeticError)


@dataclass(frozen=True)
class Architecture:
    """A recipe: `source` "timm" or "adapter", its `name`, and JSON `kwargs`.

    name: a timm model name, or `package.module:function` that returns an nn.Module. Raises
    ArchitectureError when it could not be written to JSON, or would read or fetch anything.
    """

    source: str
    name: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ArchitectureError(f"architecture source {self.source!r} is unknown; choose timm or adapter")
        if self.source == "adapter" and not _ADAPTER.fullmatch(self.name):
            raise ArchitectureError(f"adapter {self.name!r} is not of the form package.module:function")
        object.__setattr__(self, "kwargs", _plain(self.kwargs))
        refused = [key for key in self.kwargs if key in _REFUSED or key.startswith("pretrained")]
        if self.source == "timm" and refused:
            raise ArchitectureError(f"kwarg {refused[0]!r} is not part of an architecture; leave it out")

    def build(self, allow_adapters: Collection[str] = ()) -> nn.Module:
        """The network in eval mode with arbitrary weights; nothing is downloaded, no random state is moved.

        An adapter is imported only when `allow_adapters` lists its name, for that runs its code.
        Raises ArchitectureError.
        """
        with torch.random.fork_rng(devices=[]):
            model = self._timm() if self.source == "timm" else self._adapter(allow_adapters)
        setattr(model, _REMEMBERED, self)
        return model.eval()

    def skeleton(self, allow_adapters: Collection[str] = ()) -> nn.Module:
        """The network on the meta device where that works: shapes and settings without weights. Raises as `build`."""
        if self.source == "adapter":
            return self.build(allow_adapters)
        try:
            with torch.device("meta"):
                return self.build()
        except ArchitectureError:
            return self.build()  # some constructors compute with values

    def description(self) -> dict[str, Any]:
        """As JSON: source, name, kwargs."""
        return asdict(self)

    def _timm(self) -> nn.Module:
        from heal.compat import timm  # seconds, which reading a bundle need not wait for

        if not timm.is_model(self.name):
            raise ArchitectureError(f"timm has no model {self.name!r}; {nearest(self.name, timm.list_models())}")
        try:
            model: nn.Module = timm.create_model(self.name, pretrained=False, **_with_tuples(self.kwargs))
        except _BUILD_ERRORS as error:
            raise ArchitectureError(f"timm cannot build {self.name!r} with {dict(self.kwargs)}: {error}") from error
        return model

    def _adapter(self, allowed: Collection[str]) -> nn.Module:
        if self.name not in ([allowed] if isinstance(allowed, str) else allowed):
            raise ArchitectureError(
                f"the model is built by {self.name!r}, which is code to import; "
                f"if you trust it, pass allow_adapters=[{self.name!r}]"
            )
        module, _, function = self.name.partition(":")
        try:
            build = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise ArchitectureError(
                f"adapter {self.name!r} cannot be imported: {error}; install its package"
            ) from error
        model = build(**self.kwargs)
        if not isinstance(model, nn.Module):
            raise ArchitectureError(f"adapter {self.name!r} returned a {type(model).__name__}, not an nn.Module")
        return model


@dataclass(frozen=True)
class Changes:
    """What pruning did to an architecture.

    dropped: the blocks that went. channels: the present width of every group that was cut. biases: layers without a
    bias that were given one (methods that fold what is lost into the next layer do that).
    """

    channels: Mapping[str, int] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> None:
        """Do it to a freshly built network. Raises ArchitectureError where it does not fit."""
        drop(model, self.dropped)
        shrink(model, self.channels)
        modules = dict(model.named_modules())
        for name in self.biases:
            layer = modules.get(name)
            if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.bias is not None:
                raise ArchitectureError(f"{name!r} is not a Linear or Conv2d without bias, so it cannot be given one")
            layer.bias = nn.Parameter(torch.zeros(len(layer.weight), device=layer.weight.device))


def of(model: nn.Module) -> Architecture:
    """The architecture of a timm model, or of one that Architecture.build made; pruning does not count.

    Verified by building it (on the meta device): see `changes`. Raises ArchitectureError.
    """
    return recognise(model)[0]


def recognise(model: nn.Module, given: Architecture | None = None) -> tuple[Architecture, Changes]:
    """The architecture of a model, the given one or its own, and what pruning changed. Raises ArchitectureError."""
    remembered: Architecture | None = getattr(model, _REMEMBERED, None)
    is_adapter = remembered is not None and remembered.source == "adapter"
    recipe = given or (remembered if is_adapter else None) or _from_timm(model, remembered)
    return recipe, changes(recipe, model)


def changes(architecture: Architecture, model: nn.Module) -> Changes:
    """What tells `model` from what the architecture builds.

    Raises ArchitectureError when more than pruning does: a module, a setting or a shape.
    """
    skeleton = architecture.skeleton((architecture.name,))  # the caller holds the model that this function built
    dropped = _dropped(model, skeleton)
    drop(skeleton, dropped)
    present, built = widths(model), widths(skeleton)
    cut = {name: width for name, width in present.items() if width < built.get(name, 0)}
    narrow = Changes(cut, _added_biases(model, skeleton))
    narrow.apply(skeleton)
    difference = first_difference(model, skeleton)
    if difference and hasattr(model, OWN_TABLE) and not hasattr(skeleton, OWN_TABLE):
        raise ArchitectureError(
            f"the table of this {type(model).__name__} (its {OWN_TABLE}) is not part of {architecture.source}:"
            f"{architecture.name}, so its cuts cannot be built again; let a function of yours build the network and "
            "set the table, and pass architecture=heal.Architecture('adapter', 'package.module:function')"
        )
    if difference:
        raise ArchitectureError(
            f"{architecture.source}:{architecture.name} with {dict(architecture.kwargs)} does not build this "
            f"{type(model).__name__}: {difference}; pass architecture=heal.Architecture(source, name, kwargs)"
        )
    return replace(narrow, dropped=dropped)


def _dropped(model: nn.Module, skeleton: nn.Module) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    return tuple(name for name in describe(skeleton).droppable if isinstance(modules.get(name), nn.Identity))


def _added_biases(model: nn.Module, skeleton: nn.Module) -> tuple[str, ...]:
    layers = {name: layer for name, layer in skeleton.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    bare = {name for name, layer in layers.items() if layer.bias is None}
    return tuple(
        name for name, layer in model.named_modules() if name in bare and getattr(layer, "bias", None) is not None
    )


def _plain(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from JSON, so that equal recipes are equal."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(kwargs), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArchitectureError(f"architecture kwargs {dict(kwargs)} are not plain JSON: {error}") from error
    return plain


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_with_tuples(item) for item in value)
    return {key: _with_tuples(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _from_timm(model: nn.Module, remembered: Architecture | None) -> Architecture:
    """From the name and the kwargs that the model was made with, and the settings that it shows now."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if not name:
        raise ArchitectureError(
            f"{type(model).__name__} does not say how it was built (it is not a timm model); "
            "pass architecture=heal.Architecture('adapter', 'package.module:function', kwargs)"
        )
    given = remembered.kwargs if remembered else getattr(model, "_model_args", {})
    recorded = {key: value for key, value in given.items() if _is_recipe(key, value)}
    present = {key: value for key, value in _settings(model).items() if value is not None}
    kwargs = recorded | {key: value for key, value in present.items() if key == "num_classes"}
    built = _settings(Architecture("timm", name, kwargs).skeleton())
    return Architecture("timm", name, kwargs | {key: value for key, value in present.items() if value != built[key]})


def _is_recipe(key: str, value: object) -> bool:
    if key in _REFUSED or key.startswith("pretrained"):
        return False
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _settings(model: nn.Module) -> dict[str, Any]:
    """The kwargs that timm models show as attributes, and that its name alone does not tell."""
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    sized = next((module.img_size for module in model.modules() if getattr(module, "img_size", None)), None)
    pool = getattr(model, "global_pool", None)
    return {
        "num_classes": getattr(model, "num_classes", None),
        "in_chans": stem.in_channels if stem is not None else None,
        "img_size": plain(sized),
        "global_pool": pool if isinstance(pool, str) else None,
    }
