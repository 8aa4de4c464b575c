"""Patches and their moments, in halves of the images, against patches that are laid out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heal.compat import timm
from heal.errors import NumericalError
from heal.families.parts import called
from heal.patch_correlation import is_correlated
from heal.patch_moments import PatchStream
from heal.patches import patches
from heal.statistics import capture
from tests.heal import nets

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "pointwise": lambda: nn.Conv2d(6, 4, 1, stride=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "dilated": lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2),
    "oblong": lambda: nn.Conv2d(6, 4, (1, 5), padding=(0, 2)),
    "same": lambda: nn.Conv2d(6, 4, 3, padding="same"),
    "circular": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, padding_mode="circular"),
    "replicating": lambda: nn.Conv2d(6, 4, (1, 5), padding=(0, 2), padding_mode="replicate"),
    "tensorflow": lambda: timm.layers.Conv2dSame(6, 4, 3, stride=2),
}


LARGER_THAN_PADDING = {"reflecting": lambda: nn.Conv2d(6, 4, 3, padding=2, padding_mode="reflect")}


@pytest.mark.parametrize("kind", CONVOLUTIONS | LARGER_THAN_PADDING)
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_weight_times_patches_is_the_convolution(kind: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = (CONVOLUTIONS | LARGER_THAN_PADDING)[kind](), torch.randn(2, 6, *size)
    columns = patches(layer, x)
    weight = layer.weight.reshape(layer.groups, -1, columns.shape[2])
    product = torch.einsum("god,ngdp->ngop", weight, columns).flatten(1, 2)
    with torch.no_grad():
        expected = layer(x) - layer.bias.view(1, -1, 1, 1)
    assert torch.allclose(product, expected.flatten(2), atol=1e-5)


def test_patches_of_a_linear_are_its_rows() -> None:
    layer, x = nn.Linear(5, 3), torch.randn(2, 4, 7, 5)
    columns = patches(layer, x)
    assert torch.equal(columns, x.reshape(2, 28, 5).transpose(1, 2).unsqueeze(1))


@pytest.mark.parametrize("name", ["resnet", "mobilenetv3", "vit"])
def test_patch_moments_are_those_of_the_two_halves(name: str) -> None:
    model, images = nets.build(name), nets.images(6) + 1
    layers = dict(called(model))
    found = capture(model, images, {f"{layer}.patches": True for layer in layers}, batch_size=4)
    again = capture(model, images, {f"{layer}.patches": True for layer in layers}, batch_size=1)
    for layer, module in layers.items():
        inputs = inputs_of(model, images, layer)
        for half in (0, 1):
            stats = found[f"{layer}.patches/{half}"]
            columns = patches(module, inputs[half::2]).double()
            rows = columns.permute(1, 2, 0, 3).flatten(2).numpy()
            assert stats.count == rows.shape[-1]
            for group in range(len(rows)):
                expected = np.cov(rows[group], ddof=0).reshape(rows.shape[1], rows.shape[1])
                near = 3e-6 * np.abs(expected).max() + 1e-9
                assert np.allclose(stats.covariance[group], expected, rtol=0, atol=near)
            assert np.allclose(stats.mean.reshape(len(rows), -1), rows.mean(-1), atol=1e-5)
            other = again[f"{layer}.patches/{half}"]
            assert torch.allclose(stats.comoment, other.comoment, rtol=0, atol=4e-6 * float(stats.m2.max()) + 1e-6)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("size", [(7, 9), (3, 3), (2, 5), (1, 1)])
def test_moments_of_every_kind_of_patch(kind: str, size: tuple[int, int]) -> None:
    """Against the covariance of the patches laid out, on inputs far from zero."""
    torch.manual_seed(0)
    layer, x = CONVOLUTIONS[kind](), torch.randn(5, 6, *size) * torch.arange(1, 7).view(1, 6, 1, 1) + 20
    if kind in ("grouped", "dilated") and min(size) < 3:
        return
    stream = PatchStream(layer)
    assert is_correlated(layer) == (kind in ("plain", "depthwise", "same"))
    for batch in x.split(3):
        stream.begin(len(batch))
        stream.add(batch)
    for half, stats in enumerate(stream.results("layer.patches").values()):
        rows = patches(layer, x[half::2]).double().permute(1, 2, 0, 3).flatten(2).numpy()
        assert stats.count == rows.shape[-1]
        assert np.allclose(stats.mean.reshape(len(rows), -1), rows.mean(-1), rtol=1e-6, atol=1e-5)
        for group, columns in enumerate(rows):
            expected = np.cov(columns, ddof=0).reshape(len(columns), -1)
            assert np.allclose(stats.covariance[group], expected, atol=3e-6 * np.abs(expected).max() + 1e-5)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_moments_round_alike_in_batches_of_any_size(groups: int) -> None:
    """On maps that never cancel, as after a ReLU: 32 768 positive squares are added up in a half."""
    torch.manual_seed(0)
    layer, x = nn.Conv2d(16, 16, 3, padding=1, groups=groups), torch.randn(64, 16, 32, 32).relu()
    rows = patches(layer, x[::2]).double().permute(1, 2, 0, 3).flatten(2)
    centred = rows - rows.mean(-1, keepdim=True)
    expected = centred @ centred.mT
    for batch_size in (1, 5, 64):
        stream = PatchStream(layer)
        for batch in x.split(batch_size):
            stream.begin(len(batch))
            stream.add(batch)
        found = stream.results("layer.patches")["layer.patches/0"].comoment
        assert (found - expected).abs().max() <= 2e-6 * expected.max(), batch_size


@pytest.mark.parametrize("layer", ["layers.0.blocks.0.attn.qkv", "layers.0.blocks.1.attn.proj", "layers.1.downsample"])
def test_halves_are_of_images_where_a_layer_sees_windows(layer: str) -> None:
    model, images = nets.build("swin"), nets.images(6)
    tap = f"{layer}.reduction.patches" if layer.endswith("downsample") else f"{layer}.patches"
    others = torch.cat([images[:, None], 3 * nets.images(6, seed=1)[:, None]], 1)
    for batch_size in (6, 3):
        before, after = (
            capture(model, others[torch.arange(6), odd], {tap: True}, batch_size)
            for odd in (torch.zeros(6).long(), torch.arange(6) % 2)
        )
        assert torch.equal(before[f"{tap}/0"].comoment, after[f"{tap}/0"].comoment), "only odd images changed"
        assert not torch.allclose(before[f"{tap}/1"].comoment, after[f"{tap}/1"].comoment, rtol=0.1)


class Twice(nn.Module):
    """One convolution, called on a map and on the map at half the resolution."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.again(self.pool(self.again(self.stem(x)).relu())).mean((2, 3)))
        return out


def test_a_layer_that_is_called_twice_keeps_its_halves_apart() -> None:
    model, images = Twice(pool=False).eval(), nets.images(6)
    changed = torch.where(torch.arange(6).view(-1, 1, 1, 1) % 2 == 1, 3 * images.flip(0), images)
    for batch_size in (3, 6):
        before, after = (capture(model, x, {"again.patches": True}, batch_size) for x in (images, changed))
        assert before["again.patches/0"].count == 2 * 3 * nets.SIZE**2
        assert torch.equal(before["again.patches/0"].comoment, after["again.patches/0"].comoment)


def test_maps_of_two_sizes_count_together() -> None:
    model, images = Twice(pool=True).eval(), nets.images(4)
    found = capture(model, images, {"again.patches": True}, 2)
    seen: list[Tensor] = []
    hook = model.again.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(images)
    hook.remove()
    for half in (0, 1):
        rows = [patches(model.again, x[half::2]).double().permute(1, 2, 0, 3).reshape(72, -1) for x in seen]
        columns, stats = torch.cat(rows, 1).numpy(), found[f"again.patches/{half}"]
        assert stats.count == columns.shape[1] == 2 * (nets.SIZE**2 + nets.SIZE**2 // 4)
        assert np.allclose(stats.mean, columns.mean(1), atol=1e-5)
        assert np.allclose(stats.covariance[0], np.cov(columns, ddof=0), atol=1e-5)


def test_a_layer_that_sees_no_images_counts_in_both_halves() -> None:
    tap = "layers.0.blocks.0.attn.cpb_mlp.0.patches"  # of positions, one row whatever the images
    found = capture(nets.build("swinv2"), nets.images(4), {tap: True})
    assert torch.equal(found[f"{tap}/0"].comoment, found[f"{tap}/1"].comoment)


def test_one_image_is_not_two_halves() -> None:
    with pytest.raises(NumericalError, match="two images"):
        capture(nets.build("vit"), nets.images(1), {"patch_embed.proj.patches": True})


def inputs_of(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    kept: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad():
        model(images)
    hook.remove()
    return kept[0]
