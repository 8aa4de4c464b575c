"""Models to put into bundles, and what must hold of them afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heal import masking, surgery
from heal.architecture import Architecture
from heal.families.lookup import describe
from heal.values import Mask
from tests.heal.nets import images

VGG = Architecture("adapter", "tests.heal.nets:_vgg")  # timm does not name it: made by class there

Description = dict[str, Any]


def recipe(name: str) -> Architecture | None:
    return VGG if name == "vgg" else None


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    state, wanted = found.state_dict(), expected.state_dict()
    assert list(state) == list(wanted) and all(same_bits(state[name], wanted[name]) for name in wanted)
    with torch.inference_mode():
        assert same_bits(found(images(2)), expected(images(2)))


def masked(model: nn.Module, density: float, seed: int = 0) -> Mask:
    """A random mask over every prunable layer, applied."""
    generator = torch.Generator().manual_seed(seed)
    weights = {layer: model.get_parameter(f"{layer}.weight") for layer in describe(model).layers}
    scores = {layer: torch.rand(weight.shape, generator=generator) for layer, weight in weights.items()}
    mask = Mask({layer: masking.keep_largest(s, round(density * s.numel())) for layer, s in scores.items()})
    masking.apply(model, mask)
    return mask


def halved(model: nn.Module) -> nn.Module:
    surgery.shrink(model, {group: max(1, width // 2) for group, width in surgery.widths(model).items()})
    return model


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
