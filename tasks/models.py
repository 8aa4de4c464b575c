"""Loading and saving models between stages: always as bundles, children inheriting their parent's facts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heal import bundle
from heal.architecture import Architecture
from heal.errors import InputError
from heal.values import ChannelCut, Mask

INHERITED = ("class_names", "preprocessing", "licence")


def load(folder: Path, allow_adapters: tuple[str, ...] = (), device: str = "cpu") -> nn.Module:
    """The model of the bundle in `folder`/bundle, in eval mode, on the device that params name."""
    return bundle.load(folder / "bundle", allow_adapters=allow_adapters).to(device_of(device))


def save_child(
    model: nn.Module,
    folder: Path,
    parent: Path,
    pruned: Mask | ChannelCut,
    method: Mapping[str, Any],
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """Write `folder`/bundle as a child of the bundle in `parent`/bundle; returns its digest."""
    known = bundle.read(parent / "bundle")
    metadata = {key: known.get(key) for key in INHERITED}
    metadata |= {"parent_digest": bundle.digest(parent / "bundle"), "method": dict(method)}
    metadata["calibration_digest"] = None if calibration is None else calibration["ids_digest"]
    built = known["architecture"]
    return bundle.save(
        model,
        folder / "bundle",
        architecture=Architecture(built["source"], built["name"], built["kwargs"]),
        mask=pruned if isinstance(pruned, Mask) and pruned.keep else None,
        metadata=metadata,
    )


def device_of(name: str) -> torch.device:
    """The device that `auto` stands for, or the one named. Raises InputError when this machine has it not."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = torch.device(name)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name}: torch finds {torch.cuda.device_count()} CUDA devices here; use cpu or auto")
    return wanted
