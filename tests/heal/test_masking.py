"""Law 1: counts are exact to one weight, ties are stable, N:M holds in every group. Masks go in whole and stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

from heal import masking
from heal.errors import ArchitectureError, BudgetError, NumericalError
from heal.families.lookup import describe
from heal.values import NM, Mask
from tests.heal.nets import NETS, build

few = st.sampled_from([-np.inf, -1.5, -1.0, -0.0, 0.0, 1.0, 2.0, np.inf])  # many ties
shapes = arrays.array_shapes(min_dims=1, max_dims=4, max_side=6)
scores = arrays.arrays(np.float32, shapes, elements=few | st.floats(-10, 10, width=32))


def best(values: np.ndarray, count: int) -> set[int]:
    """The slow reference: indices by falling score, then rising index."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


@given(scores, st.data())
@settings(deadline=None)
def test_keep_largest_keeps_exactly_the_largest(values: np.ndarray, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, values.size))
    keep = masking.keep_largest(torch.from_numpy(values), kept)
    assert keep.shape == values.shape and keep.dtype == torch.bool
    assert set(np.flatnonzero(keep.numpy())) == best(values.flatten(), kept)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 8), st.data())
@settings(deadline=None)
def test_keep_n_of_m_keeps_the_n_largest_of_every_group(rows: int, groups: int, m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    values = data.draw(arrays.arrays(np.float32, (rows, groups * m), elements=few))
    keep = masking.keep_n_of_m(torch.from_numpy(values), NM(n, m))
    assert masking.is_n_of_m(keep, NM(n, m))
    for row in range(rows):
        for start in range(0, groups * m, m):
            inside = np.flatnonzero(keep[row, start : start + m].numpy())
            assert set(inside) == best(values[row, start : start + m], n)


def test_keep_n_of_m_of_a_convolution_groups_its_input_channels_at_one_place_of_the_kernel() -> None:
    weight = torch.randn(6, 8, 3, 2, generator=torch.Generator().manual_seed(0))
    keep = masking.keep_n_of_m(weight, NM(2, 4))
    assert masking.is_n_of_m(keep, NM(2, 4))
    for down in range(3):
        for right in range(2):
            one = masking.keep_n_of_m(weight[:, :, down, right], NM(2, 4))
            assert torch.equal(keep[:, :, down, right], one)


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_keep_by_row_keeps_equally_many_of_every_row(rows: int, width: int, data: st.DataObject) -> None:
    values = data.draw(arrays.arrays(np.float32, (rows, width), elements=few))
    kept = data.draw(st.integers(0, rows * width))
    keep = masking.keep_by_row(torch.from_numpy(values), kept).numpy()
    each, rest = divmod(kept, rows)
    assert keep.sum() == kept
    following = [sorted(row, reverse=True)[each] if rest else 0.0 for row in values]
    more = [int(keep[row].sum()) - each for row in range(rows)]
    assert sorted(more) == [0] * (rows - rest) + [1] * rest
    for row in range(rows):
        assert set(np.flatnonzero(keep[row])) == best(values[row], each + more[row])
    if rest:
        chosen = [following[row] for row in range(rows) if more[row]]
        assert min(chosen) >= max([following[row] for row in range(rows) if not more[row]], default=min(chosen))


@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 3, 3), (8,), (2, 0)])
def test_a_ragged_input_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(BudgetError, match=r"2:4 does not fit a weight of shape \[.*is not a multiple of 4"):
        masking.keep_n_of_m(torch.zeros(shape), NM(2, 4))


def test_one_weight_too_many_breaks_n_of_m() -> None:
    keep = masking.keep_n_of_m(torch.randn(3, 8), NM(2, 4))
    keep[1, 4:] = torch.tensor([True, True, True, False])
    assert not masking.is_n_of_m(keep, NM(2, 4))
    assert masking.is_n_of_m(torch.zeros(3, 8, dtype=torch.bool), NM(2, 4))


def test_equal_scores_keep_the_lower_index() -> None:
    assert masking.keep_largest(torch.zeros(5), 2).tolist() == [True, True, False, False, False]
    assert masking.keep_n_of_m(torch.zeros(1, 4), NM(1, 4)).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("kept", [-1, 5])
def test_keeping_what_is_not_there_is_refused(kept: int) -> None:
    with pytest.raises(BudgetError, match=f"cannot keep {kept} of 4"):
        masking.keep_largest(torch.zeros(4), kept)


def test_nan_has_no_order() -> None:
    broken = torch.tensor([[1.0, torch.nan, 0.0, 2.0]])
    with pytest.raises(NumericalError):
        masking.keep_largest(broken, 1)
    with pytest.raises(NumericalError):
        masking.keep_n_of_m(broken, NM(2, 4))


def random_mask(model: nn.Module, seed: int = 0) -> Mask:
    """Half of every layer, by random scores."""
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for layer in describe(model).layers:
        shape = model.get_submodule(layer).get_parameter("weight").shape
        keep[layer] = masking.keep_largest(torch.rand(shape, generator=generator), shape.numel() // 2)
    return Mask(keep)


@pytest.mark.parametrize("net", NETS)
def test_apply_zeros_what_goes_and_nothing_else(net: str) -> None:
    model, dense = build(net), build(net)
    mask = random_mask(model)
    assert not masking.holds(model, mask)
    masking.apply(model, mask)
    assert masking.holds(model, mask)
    masked = {f"{layer}.weight": keep for layer, keep in mask.keep.items()}
    for name, tensor in model.state_dict().items():
        expected = dense.state_dict()[name]
        assert torch.equal(tensor, expected * masked[name] if name in masked else expected)
    zeros = sum(int((model.state_dict()[name] == 0).sum()) for name in masked)
    assert zeros == mask.zeros


def test_apply_writes_updates_first() -> None:
    model = build("vit")
    layer = describe(model).layers[0]
    keep = random_mask(model).keep[layer]
    new = torch.randn(keep.shape)
    bias = torch.randn(len(keep))
    masking.apply(model, Mask({layer: keep}, {f"{layer}.weight": new, f"{layer}.bias": bias}))
    assert torch.equal(model.get_submodule(layer).get_parameter("weight"), new * keep)
    assert torch.equal(model.get_submodule(layer).get_parameter("bias"), bias)


def test_apply_keeps_the_parameter_objects() -> None:
    """An optimiser made before the mask still owns them."""
    model = build("resnet")
    before = dict(model.named_parameters())
    masking.apply(model, random_mask(model))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_masked_infinity_becomes_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    _set(model[0], torch.tensor([[torch.inf, 1.0]]))
    masking.apply(model, Mask({"0": torch.tensor([[False, True]])}))
    assert model[0].get_parameter("weight").tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("value", [1e-30, torch.nan])
def test_a_mask_no_longer_holds_after_tampering(value: float) -> None:
    model = build("mobilenetv2")
    mask = random_mask(model)
    masking.apply(model, mask)
    layer = describe(model).layers[-1]
    place = (~mask.keep[layer]).nonzero()[-1]
    weight = model.get_submodule(layer).get_parameter("weight").detach()
    weight[tuple(place)] = value
    assert not masking.holds(model, mask)


@pytest.mark.parametrize(
    ("layer", "shape", "match"),
    [
        ("blocks.0.mlp.f", (128, 32), "no layer 'blocks.0.mlp.f'; did you mean 'blocks.0.mlp"),
        ("blocks.0.mlp.act", (128, 32), "has no weight to mask"),
        ("blocks.0.mlp.fc1", (64, 32), r"shape \[128, 32\], the mask is \[64, 32\]"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_and_nothing_changes(
    layer: str, shape: tuple[int, ...], match: str
) -> None:
    model, dense = build("vit"), build("vit")
    whole = random_mask(model)
    mask = Mask({**whole.keep, layer: torch.ones(shape, dtype=torch.bool)}, {"norm.bias": torch.ones(32)})
    for operation in (masking.apply, masking.holds):
        with pytest.raises(ArchitectureError, match=match):
            operation(model, mask)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def _set(layer: nn.Module, weight: Tensor) -> None:
    with torch.no_grad():
        layer.get_parameter("weight").copy_(weight)
