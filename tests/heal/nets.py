"""Tiny seeded networks of every family, with nothing left at an initial value that hides a mistake."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from heal.compat import timm

SIZE = 32
CLASSES = 10


def _timm(name: str, **kwargs: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = timm.create_model(name, num_classes=CLASSES, **kwargs)
        return model

    return make


def _vgg() -> nn.Module:
    plan = [32, 16, "M", 32, 32, 8, "M"]  # by class: timm's named ones hold 100 million weights in the head
    kwargs = {"norm_layer": nn.BatchNorm2d, "num_classes": CLASSES, "mlp_ratio": 1 / 64}
    model: nn.Module = timm.models.VGG(plan, **kwargs)
    return model


_VIT = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
_SWIN = {"img_size": SIZE, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}

NETS: dict[str, Callable[[], nn.Module]] = {
    "vit": _timm("vit_tiny_patch16_224", **_VIT),
    "deit": _timm("deit_tiny_distilled_patch16_224", **_VIT),
    "swin": _timm("swin_tiny_patch4_window7_224", **_SWIN),
    "swinv2": _timm("swinv2_tiny_window8_256", **_SWIN),
    "convnext": _timm("convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 16, 32)),
    "resnet": _timm("resnet18", layers=(1, 2, 1, 1), channels=(8, 16, 24, 16)),
    "bottleneck": _timm("resnet50", layers=(1, 2, 1, 1), channels=(4, 6, 8, 6)),
    "vgg": _vgg,
    "mobilenetv2": _timm("mobilenetv2_035"),
    "mobilenetv3": _timm("mobilenetv3_small_050"),
    "efficientnet": _timm("tinynet_e"),
}
"""By name; the first five have MLP pairs."""

KIN = ("deit", "swinv2", "bottleneck", "efficientnet")
EVERY = [pytest.param(name, marks=pytest.mark.slow) if name in KIN else name for name in NETS]
"""For long tests: of each family one network, and its kin only where slow tests run."""


def build(name: str, seed: int = 0) -> nn.Module:
    """The network in eval mode, every tensor drawn from the seed."""
    model = NETS[name]()
    randomise(model, seed)
    return model.eval()


def images(count: int = 4, size: int = SIZE, seed: int = 0) -> Tensor:
    """Normal noise [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def passing(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output of a layer, copied before anything overwrites them."""
    kept: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(layer).register_forward_hook(
        lambda _, args, output: kept.append((args[0].clone(), output.clone()))
    )
    with torch.no_grad():
        model(images)
    hook.remove()
    return kept[0]


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Scales about 1, biases about 0, weights at fan-in scale, running statistics as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        is_scale = name.endswith(("gamma", ".weight")) and parameter.ndim == 1
        parameter.copy_(1 + 0.2 * drawn if is_scale else drawn * _spread(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(0.3 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))


def _spread(parameter: Tensor) -> float:
    return 0.1 if parameter.ndim < 2 else max(parameter[0].numel(), 1) ** -0.5
