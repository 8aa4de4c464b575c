"""Wanda, OBS and N:M against references that are written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import heal
from heal.allocators.n_of_m import NOfM
from heal.allocators.uniform import Uniform
from heal.errors import BudgetError, MethodError
from heal.healers.unipts import Unipts
from heal.masking import is_n_of_m
from heal.method import AllocationContext, Pruner, taps
from heal.patches import patches
from heal.pruned import apply
from heal.pruners import PRUNERS
from heal.pruners.obs import Obs
from heal.pruners.wanda import Wanda
from heal.statistics import capture
from heal.values import NM, Allocation, Budget, Mask
from tests.heal import nets

LAYERS = {
    "linear": (lambda: nn.Linear(8, 6), (200, 1, 5, 8)),
    "linear without bias": (lambda: nn.Linear(8, 6, bias=False), (200, 1, 1, 8)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (30, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(8, 6, (1, 3), groups=2), (30, 8, 4, 6)),
}
PATTERNS = {"any": None, "2:4": NM(2, 4), "1:4": NM(1, 4)}


class One(nn.Module):
    """A network of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def pruned(pruner: Pruner, kind: str, kept: int, pattern: NM | None = None) -> tuple[One, One, Tensor, Mask]:
    """(dense, masked, images, mask) of one layer whose inputs are correlated and far from zero."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    dense, images = One(make()).eval(), torch.randn(shape)
    axis = channels(dense.layer)
    images = (images + images.roll(1, axis) + images.roll(2, axis)) / 2 + 1
    total = dense.layer.weight.numel()
    allocation = Allocation("weights", {"layer": kept}, {"layer": total}, kept, pattern=pattern)
    mask = pruner.prune(dense, allocation, capture(dense, images, taps(dense, [pruner])))
    masked = One(make()).eval()
    masked.load_state_dict(dense.state_dict())
    apply(masked, mask)
    return dense, masked, images, mask


def channels(layer: nn.Module) -> int:
    """The axis of its input and output that holds them."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


def columns(layer: nn.Module, images: Tensor) -> np.ndarray:
    """[groups, d, rows] of what the weight multiplies, in float64."""
    found = patches(layer, images)
    return found.double().permute(1, 2, 0, 3).flatten(2).numpy()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_obs_moves_later_columns_as_the_inverse_says(kind: str, pattern: str) -> None:
    nm = PATTERNS[pattern]
    total = LAYERS[kind][0]().weight.numel()
    if nm and LAYERS[kind][0]().weight.shape[1] % nm.m:
        pytest.skip("its input channels are no multiple of 4")
    dense, masked, images, mask = pruned(Obs(), kind, total // 2 if nm != NM(1, 4) else total // 4, nm)
    layer, keep = dense.layer, mask.keep["layer"]
    order = np.arange(keep[0].numel()).reshape(keep.shape[1:])
    order = (np.moveaxis(order, 0, -1) if nm else order).ravel()
    seen = columns(layer, images)
    weight = layer.weight.detach().double().flatten(1).numpy().reshape(len(seen), -1, len(order))
    kept = keep.flatten(1).numpy().reshape(weight.shape)
    expected = np.empty_like(weight)
    for group, x in enumerate(seen):
        moment = np.cov(x, bias=True)[np.ix_(order, order)]
        moment += 0.01 * np.diag(moment).mean() * np.eye(len(order))
        rows, stays = weight[group][:, order], kept[group][:, order]
        for at in range(len(order)):
            inverse = np.linalg.inv(moment[at:, at:])
            for row in range(len(rows)):
                if not stays[row, at]:
                    rows[row, at:] -= rows[row, at] / inverse[0, 0] * inverse[:, 0]
        expected[group][:, order] = rows
    found = masked.layer.weight.detach().double().numpy().reshape(expected.shape)
    assert np.allclose(found, expected, atol=1e-5)
    assert int(keep.sum()) == (total // 2 if nm != NM(1, 4) else total // 4)
    assert nm is None or is_n_of_m(keep, nm)


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "grouped"])
def test_the_bias_of_obs_leaves_the_mean_output_where_it_was(kind: str) -> None:
    dense, masked, images, _ = pruned(Obs(), kind, 12)
    with torch.no_grad():
        before, after = (m(images).movedim(channels(m.layer), 0).flatten(1).mean(1) for m in (dense, masked))
    assert torch.allclose(before, after, atol=1e-4)


def test_a_convolution_without_bias_is_given_none() -> None:
    _, masked, _, _ = pruned(Obs(), "convolution", 100)
    assert masked.layer.bias is None


@pytest.mark.parametrize("kind", LAYERS)
def test_obs_disturbs_the_output_less_than_its_mask_alone(kind: str) -> None:
    dense, masked, images, mask = pruned(Obs(), kind, LAYERS[kind][0]().weight.numel() // 2)
    alone = One(LAYERS[kind][0]())
    alone.load_state_dict(dense.state_dict())
    apply(alone, Mask(mask.keep))

    def error(model: One) -> float:
        with torch.no_grad():
            apart = (model(images) - dense(images)).movedim(channels(model.layer), 0).flatten(1)
        return float(apart.var(1).sum())

    assert error(masked) < 0.9 * error(alone)


def test_an_input_that_is_always_the_same_is_left_out_of_obs() -> None:
    torch.manual_seed(0)
    model, images = One(nn.Linear(8, 4)), torch.randn(50, 1, 1, 8)
    images[..., 3] = 2
    allocation = Allocation("weights", {"layer": 16}, {"layer": 32}, 16)
    mask = Obs().prune(model, allocation, capture(model, images, taps(model, [Obs()])))
    assert not mask.updates["layer.weight"][:, 3].any()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("granularity", ["row", "layer"])
def test_wanda_keeps_the_largest_products_of_weight_and_input(kind: str, granularity: str) -> None:
    dense, _, images, mask = pruned(Wanda(granularity), kind, 26)
    layer = dense.layer
    power = images.double().movedim(channels(layer), 0).flatten(1).square().mean(1).sqrt()
    weight = layer.weight.detach().double()
    scores = torch.empty_like(weight)
    rows_of_group = len(weight) // getattr(layer, "groups", 1)
    for row in range(len(weight)):
        for column in range(weight.shape[1]):
            channel = row // rows_of_group * weight.shape[1] + column
            scores[row, column] = weight[row, column].abs() * power[channel]
    keep = mask.keep["layer"]
    assert int(keep.sum()) == 26
    if granularity == "layer":
        assert scores[keep].min() >= scores[~keep].max()
    else:
        counts = keep.flatten(1).sum(1)
        assert counts.max() - counts.min() <= 1
        assert all(scores[row][keep[row]].min() >= scores[row][~keep[row]].max() for row in range(len(weight)))


@pytest.mark.parametrize("name", [name for name, entry in PRUNERS.items() if entry.unit == "weights"])
@pytest.mark.parametrize("net", ["vit", "resnet"])
def test_a_pattern_holds_in_every_group_of_every_layer(net: str, name: str) -> None:
    pruner = PRUNERS[name]()
    model, images = nets.build(net), nets.images(4)
    context = AllocationContext(images=images)
    allocation = NOfM("1:4", include=("stem", "classifier")).allocate(model, Budget(weights=0.75), context)
    mask = pruner.prune(model, allocation, capture(model, images, taps(model, [pruner])))
    assert isinstance(mask, Mask) and mask.pattern == NM(1, 4)
    for layer, keep in mask.keep.items():
        assert is_n_of_m(keep, NM(1, 4)) and int(keep.sum()) == keep.numel() // 4, layer


def test_a_mask_that_moves_keeps_its_pattern() -> None:
    model, images = nets.build("resnet"), nets.images(8)
    mover = Unipts(epochs=3, lr=0.5, batch_size=4, augment=False)
    result = heal.recompress(model, images, Budget(weights=0.5), NOfM("2:4"), "magnitude", [mover])
    begun = heal.recompress(model, images, Budget(weights=0.5), NOfM("2:4"), "magnitude", ["none"])
    assert isinstance(result.pruned, Mask) and isinstance(begun.pruned, Mask)
    assert any(not torch.equal(keep, begun.pruned.keep[layer]) for layer, keep in result.pruned.keep.items())
    for layer, keep in result.pruned.keep.items():
        assert is_n_of_m(keep, NM(2, 4)) and is_n_of_m(result.model.get_submodule(layer).weight != 0, NM(2, 4)), layer


def test_what_cannot_carry_a_pattern_stays_dense_and_is_named() -> None:
    model, said = nets.build("resnet"), []
    context = AllocationContext(images=nets.images(2), log=said.append)
    allocation = NOfM(include=("stem",)).allocate(model, Budget(weights=0.5), context)
    stem = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    assert stem not in allocation.kept
    assert allocation.evidence["left_dense"] == {stem: model.get_submodule(stem).weight.numel()}
    assert any(stem in message and "stay dense" in message for message in said)


def test_a_budget_that_is_not_the_patterns_is_refused() -> None:
    model, context = nets.build("vit"), AllocationContext()
    with pytest.raises(BudgetError, match=r"2:4 removes 0.5 .*write weights: 0.5"):
        NOfM().allocate(model, Budget(weights=0.6), context)
    with pytest.raises(BudgetError, match=r"1:3 removes 0.666667 .*write weights: 0.666667"):
        NOfM("1:3").allocate(model, Budget(weights=0.6), context)
    assert NOfM("1:3", include=("stem",)).allocate(model, Budget(weights=0.666667), context).got
    with pytest.raises(BudgetError, match="is not two numbers"):
        NOfM("two of four")
    with pytest.raises(BudgetError, match="needs 0 < N < M"):
        NOfM("4:4")


def test_wrong_params_are_refused() -> None:
    with pytest.raises(MethodError, match=r"obs\.damping = 0"):
        Obs(damping=0)
    with pytest.raises(MethodError, match=r"obs\.block = 0"):
        Obs(block=0)
    with pytest.raises(MethodError, match=r"wanda\.granularity"):
        Wanda("column")  # type: ignore[arg-type]


def test_uniform_allocations_have_no_pattern() -> None:
    assert Uniform().allocate(nets.build("vit"), Budget(weights=0.5), AllocationContext()).pattern is None
