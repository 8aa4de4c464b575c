"""How a bundle stores tensors: packed, narrowed, or refused; always the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from heal import bundle
from heal.bundle_format import WEIGHTS
from heal.compat import timm
from heal.errors import InputError, WeightsError
from heal.families.lookup import describe
from heal.weights_file import decode, decode_masks, encode
from tests.heal.bundles import assert_same_model, files_of, halved, masked, same_bits
from tests.heal.nets import build


def test_a_masked_vit_is_smaller_than_a_dense_one(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
    bundle.save(model, tmp_path / "dense")
    bundle.save(model, tmp_path / "masked", mask=masked(model, 0.25))
    dense, packed = ((tmp_path / name / WEIGHTS).stat().st_size for name in ("dense", "masked"))
    prunable = sum(model.get_parameter(f"{layer}.weight").numel() for layer in describe(model).layers)
    assert dense - packed > prunable * (4 * 0.75 - 1 / 8) * 0.98


def test_the_file_names_its_layout_and_the_parts_are_the_published_ones(tmp_path: Path) -> None:
    model = build("resnet")
    layer = "layer1.0.conv2"
    bundle.save(model, tmp_path / "b", mask=masked(model, 0.25))
    with safe_open(tmp_path / "b" / WEIGHTS, "pt") as file:
        assert file.metadata() == {"layout": "sparse-bitmask/1"}
        assert file.get_tensor(f"{layer}.weight.shape").tolist() == [8, 8 * 9]
        assert {f"{layer}.weight.{part}" for part in ("compressed", "bitmask", "row_offsets")} < set(file.keys())


def test_kept_zeros_survive(tmp_path: Path) -> None:
    model = build("vit")
    mask = masked(model, 0.25)
    for layer, keep in mask.keep.items():
        first = keep.flatten().nonzero()[0]
        model.get_parameter(f"{layer}.weight").data.view(-1)[first] = 0
    bundle.save(model, tmp_path / "b", mask=mask)
    found = bundle.masks(tmp_path / "b")
    assert found.keep.keys() == mask.keep.keys()
    assert all(torch.equal(found.keep[layer], keep) for layer, keep in mask.keep.items())


@pytest.mark.parametrize(("density", "is_packed"), [(0.75, False), (0.66, False), (0.64, True), (0.0, True)])
def test_tensors_are_packed_from_35_percent_zeros_on(density: float, is_packed: bool, tmp_path: Path) -> None:
    model = build("vit")
    bundle.save(model, tmp_path / "b", mask=masked(model, density))
    layouts = {name: entry["layout"] for name, entry in bundle.read(tmp_path / "b")["tensors"].items()}
    assert {layouts[f"{layer}.weight"] for layer in describe(model).layers} == {
        "sparse-bitmask" if is_packed else "dense"
    }
    assert layouts["head.weight"] == layouts["patch_embed.proj.weight"] == "dense"
    assert_same_model(bundle.load(tmp_path / "b"), model)


def test_without_a_mask_the_zeros_of_prunable_layers_are_found(tmp_path: Path) -> None:
    model = build("vit")
    bundle.save(model, tmp_path / "given", mask=masked(model, 0.25))
    bundle.save(model, tmp_path / "found")
    assert files_of(tmp_path / "given") == files_of(tmp_path / "found")
    model.get_parameter("head.weight").data.zero_()
    bundle.save(model, tmp_path / "head")
    assert bundle.read(tmp_path / "head")["tensors"]["head.weight"]["layout"] == "dense"


def test_values_that_fit_float16_are_stored_so_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    model = build("vit")
    weight = model.get_parameter("blocks.0.mlp.fc1.weight")
    weight.data.copy_(weight.data.half().float())
    weight.data[0, :3] = torch.tensor([-0.0, 2**-24, 65504.0])
    bundle.save(model, tmp_path / "b")
    entries = bundle.read(tmp_path / "b")["tensors"]
    assert (entries["blocks.0.mlp.fc1.weight"]["stored"], entries["blocks.0.mlp.fc1.weight"]["dtype"]) == (
        "float16",
        "float32",
    )
    assert entries["blocks.0.mlp.fc2.weight"]["stored"] == "float32"
    assert_same_model(bundle.load(tmp_path / "b"), model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_named_dtype_rounds_the_matrices_and_nothing_else(dtype: str, tmp_path: Path) -> None:
    model = build("resnet")
    bundle.save(model, tmp_path / "b", mask=masked(model, 0.25), dtype=dtype)
    loaded = bundle.load(tmp_path / "b").state_dict()
    for name, tensor in model.state_dict().items():
        expected = tensor.to(getattr(torch, dtype)).to(tensor.dtype) if tensor.ndim > 1 else tensor
        assert same_bits(loaded[name], expected), name
    assert bundle.read(tmp_path / "b")["dtype"] == dtype


def test_weights_that_cannot_be_stored_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    model = build("vit")
    weight = model.get_parameter("blocks.1.mlp.fc1.weight")
    weight.data[0, 0] = 1e6
    with pytest.raises(WeightsError, match=r"blocks.1.mlp.fc1.weight holds 1e\+06, too large for float16"):
        bundle.save(model, tmp_path / "b", dtype="float16")
    with pytest.raises(WeightsError, match="float8"):
        bundle.save(model, tmp_path / "b", dtype="float8")
    for value in ("nan", "inf"):
        weight.data[0, 0] = float(value)
        with pytest.raises(WeightsError, match=r"blocks.1.mlp.fc1.weight holds NaN or infinity"):
            bundle.save(model, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_mask_that_does_not_hold_is_refused(tmp_path: Path) -> None:
    model = build("vit")
    mask = masked(model, 0.25)
    model.get_parameter("blocks.0.mlp.fc1.weight").data.add_(1)
    with pytest.raises(WeightsError, match=r"blocks.0.mlp.fc1.weight: \d+ weights outside its mask are not zero"):
        bundle.save(model, tmp_path / "b", mask=mask)
    with pytest.raises(InputError, match="made for another model"):
        bundle.save(halved(model), tmp_path / "b", mask=mask)


@st.composite
def states(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Small state dicts of any shapes and dtypes, some tensors masked."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    state, keep = {}, {}
    for number in range(draw(st.integers(0, 4))):
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64]))
        drawn = torch.randn(shape, generator=generator) if draw(st.booleans()) else torch.ones(shape)
        state[f"t{number}"] = drawn.to(dtype)
        if draw(st.booleans()):
            keep[f"t{number}"] = torch.rand(shape, generator=generator) < draw(st.floats(0, 1))
            state[f"t{number}"] = state[f"t{number}"].masked_fill(~keep[f"t{number}"], 0)
    return state, keep


@given(states())
@settings(deadline=None, max_examples=100)
def test_any_state_dict_goes_through_the_weights_file(case: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    state, keep = case
    data, entries = encode(state, keep, "float32")
    found = decode(data, json.loads(json.dumps(entries)))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
    assert all(torch.equal(mask, keep[name]) for name, mask in decode_masks(data, entries).items())
    assert encode(state, keep, "float32")[0] == data
