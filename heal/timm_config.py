"""Between a bundle's facts and timm's: preprocessing, and the config.json that plain timm opens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

_KEPT = ("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "pool_size")
_NAMED = ("first_conv", "classifier")


def preprocessing(model: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a timm model's pretrained_cfg asks of its images; None when it has none.

    size [height, width] is what the network sees; the shorter side is resized to `resize` pixels and
    the `crop` ("center") taken; mean and std are per channel, for pixels in [0, 1].
    """
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or "input_size" not in config:
        return None
    size = kwargs.get("img_size") or list(config["input_size"][1:])
    size = [size, size] if isinstance(size, int) else list(size)
    return {
        "size": size,
        "resize": math.floor(min(size) / config.get("crop_pct", 1.0)),
        "crop": config.get("crop_mode", "center"),
        "interpolation": config.get("interpolation", "bicubic"),
        "mean": list(config["mean"]),
        "std": list(config["std"]),
    }


def adopt_preprocessing(model: nn.Module, wanted: Mapping[str, Any]) -> None:
    """Say in a timm model's pretrained_cfg what its bundle says, so that timm's transforms fit it."""
    known = getattr(model, "pretrained_cfg", None)
    if isinstance(known, dict):
        found = _from_preprocessing(wanted, known)
        known.update({key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})


def config(model: nn.Module, description: Mapping[str, Any]) -> dict[str, Any]:
    """timm's config.json for an architecture of timm that is not cut: what `local-dir:` reads."""
    built = description["architecture"]
    known = dict(getattr(model, "pretrained_cfg", None) or {})
    pretrained = {key: known[key] for key in (*_KEPT, *_NAMED) if key in known}
    pretrained |= _from_preprocessing(description["preprocessing"] or {}, known)
    if description["licence"]:
        pretrained["license"] = description["licence"]
    facts = {"architecture": built["name"], "model_args": built["kwargs"], "pretrained_cfg": pretrained}
    if getattr(model, "num_classes", None) is not None:
        facts["num_classes"] = pretrained["num_classes"] = model.num_classes
    if description["class_names"]:
        facts["label_names"] = description["class_names"]
    return facts


def _from_preprocessing(wanted: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: wanted[key] for key in ("interpolation", "mean", "std") if wanted.get(key)}
    if wanted.get("size"):
        found["input_size"] = [known.get("input_size", (3,))[0], *wanted["size"]]
    if wanted.get("crop"):
        found["crop_mode"] = wanted["crop"]
    if wanted.get("size") and wanted.get("resize"):
        found["crop_pct"] = _crop_share(min(wanted["size"]), wanted["resize"], known.get("crop_pct"))
    return found


def _crop_share(size: int, resize: int, known: float | None) -> float:
    """The share that timm turns into `resize` again: it takes floor(size / share)."""
    candidates = [share for share in (known, size / resize) if share and math.floor(size / share) == resize]
    return candidates[0] if candidates else size / (resize + 0.5)
