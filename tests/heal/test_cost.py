"""Counts against hand formulas; latency by what it does, never by how long it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from heal import cost, surgery
from heal.compat import timm
from heal.errors import ImagesError, InputError
from heal.families.lookup import describe
from tests.heal.nets import CLASSES, build, images


def test_parameters_and_nonzeros_count_shared_tensors_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.fill_(1)[0] = 0
    assert cost.parameters(model) == 9 + 6
    assert cost.nonzeros(model) == 6 + 3


def vit_macs(size: int, patch: int, width: int, depth: int, hidden: int) -> int:
    """Patches, then per block: qkv, queries by keys, weights by values, projection, MLP; then the head."""
    patches = (size // patch) ** 2
    tokens = patches + 1
    attention = tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width
    block = attention + 2 * tokens * width * hidden
    return patches * 3 * patch**2 * width + depth * block + width * CLASSES


@pytest.mark.parametrize("size", [32, 48])
def test_macs_of_a_vit_are_those_of_the_hand_formula(size: int) -> None:
    shape = {"img_size": size, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": CLASSES}
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    assert cost.macs(model, (3, size, size)) == vit_macs(size, 8, 32, 3, 128)


def test_macs_do_not_depend_on_how_attention_is_computed() -> None:
    model = build("vit")
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = False
    assert cost.macs(model, (3, 32, 32)) == vit_macs(32, 8, 32, 3, 128)


def test_macs_of_torchs_own_encoder_are_counted() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=64, batch_first=True)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(16, 16), layer).eval()
    tokens, width = 3, 16
    encoder = tokens * width * 4 * width + 2 * tokens * tokens * width + 2 * tokens * width * 64
    assert cost.macs(model, (3, 4, 4)) == tokens * 16 * width + encoder
    assert torch.backends.mha.get_fastpath_enabled()


def test_macs_of_convolutions_know_stride_groups_and_kernels() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 16 x 16 positions
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.Conv2d(8, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )
    by_hand = 16 * 16 * (8 * 3 * 9 + 8 * 25 + 12 * 8) + 12 * CLASSES
    assert cost.macs(model, (3, 32, 32)) == by_hand


def test_cuts_lower_the_macs_and_zeros_do_not() -> None:
    model = build("vit")
    dense = cost.macs(model, (3, 32, 32))
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.fc1.weight").zero_()
    assert cost.macs(model, (3, 32, 32)) == dense
    surgery.shrink(model, {pair.producer: 48 for pair in describe(model).pairs})
    assert cost.macs(model, (3, 32, 32)) == vit_macs(32, 8, 32, 3, 48)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = build("resnet").train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cost.macs(model, (3, 32, 32))
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(RuntimeError):
        cost.macs(model, (5, 32, 32))
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Recorder(nn.Module):
    """Writes its name into a shared list at every call."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.name, self.calls = name, calls

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        self.calls.append(self.name)
        return x


def test_latency_interleaves_and_turns_the_order_around() -> None:
    calls: list[str] = []
    models = {"a": Recorder("a", calls), "b": Recorder("b", calls).eval()}
    found = cost.latency(models, images(1), rounds=4, warmup=2)
    assert "".join(calls) == "abba" + "abbaabba"
    assert models["a"].training and not models["b"].training
    for name in "ab":
        assert found[name].runs == 4
        assert 0 < found[name].low <= found[name].median <= found[name].high


def test_latency_takes_medians_and_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1, 10, 13, 20, 22, 30, 35, 40, 44])  # passes of 1, 3, 2, 5, 4 seconds
    monkeypatch.setattr("heal.cost.time.perf_counter", lambda: next(clock))
    found = cost.latency({"a": Recorder("a", [])}, images(1), rounds=5, warmup=0)
    assert found["a"] == cost.Latency(median=3, low=2, high=4, runs=5)


def test_latency_restores_modes_after_an_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(RuntimeError):
        cost.latency({"a": model}, images(1))
    assert model.training


def test_latency_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(InputError, match="rounds = 0"):
        cost.latency({}, images(1), rounds=0)
    with pytest.raises(ImagesError, match="non-empty"):
        cost.latency({}, images(1)[:0])
