"""Patches, their moments, damage and repair, against convolutions that were really run."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from heal.allocators.erk import Erk, ratio
from heal.allocators.pool import Pool, by_shape
from heal.allocators.projection_forced import ProjectionForced
from heal.allocators.raw_damage import RawDamage
from heal.allocators.relative_repairability import RelativeRepairability, measured
from heal.allocators.repair_rules import GRID, greedy, modulated
from heal.compat import timm
from heal.errors import MethodError, NumericalError
from heal.families.parts import called
from heal.masking import keep_largest
from heal.method import AllocationContext, taps
from heal.patch_correlation import is_correlated
from heal.patch_moments import PatchStream
from heal.patches import patches
from heal.repairability import Damage, Layer, Outputs, _measured, channel_weights, gains
from heal.statistics import capture
from heal.values import Budget
from heal.wiring import trace
from tests.heal import nets

ALL = ("stem", "depthwise", "classifier")

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "pointwise": lambda: nn.Conv2d(6, 4, 1, stride=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "dilated": lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2),
    "oblong": lambda: nn.Conv2d(6, 4, (1, 5), padding=(0, 2)),
    "same": lambda: nn.Conv2d(6, 4, 3, padding="same"),
    "tensorflow": lambda: timm.layers.Conv2dSame(6, 4, 3, stride=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_weight_times_patches_is_the_convolution(kind: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = CONVOLUTIONS[kind](), torch.randn(2, 6, *size)
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
        inputs = _inputs(model, images, layer)
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
            assert torch.allclose(stats.comoment, other.comoment, rtol=0, atol=2e-6 * float(stats.m2.max()) + 1e-6)


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


class _Twice(nn.Module):
    """One convolution, called on a map and on the map at half the resolution."""

    def __init__(self, pool: bool) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.again(self.pool(self.again(self.stem(x)).relu())).mean((2, 3)))
        return out


def test_a_layer_that_is_called_twice_keeps_its_halves_apart() -> None:
    model, images = _Twice(pool=False).eval(), nets.images(6)
    changed = torch.where(torch.arange(6).view(-1, 1, 1, 1) % 2 == 1, 3 * images.flip(0), images)
    for batch_size in (3, 6):
        before, after = (capture(model, x, {"again.patches": True}, batch_size) for x in (images, changed))
        assert before["again.patches/0"].count == 2 * 3 * nets.SIZE**2
        assert torch.equal(before["again.patches/0"].comoment, after["again.patches/0"].comoment)


def test_maps_of_two_sizes_count_together() -> None:
    model, images = _Twice(pool=True).eval(), nets.images(4)
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


@pytest.mark.parametrize("allocator", [RelativeRepairability, RawDamage])
@pytest.mark.parametrize("rule", ["prior", "greedy"])
@pytest.mark.parametrize("unit", ["weights", "macs"])
def test_a_layer_that_is_never_called_has_no_damage(allocator: type, rule: str, unit: str) -> None:
    model, method = _Twice(pool=True).eval(), allocator(include=("stem",), rule=rule)
    model.add_module("unused", nn.Conv2d(8, 8, 1))
    batches = [nets.images(4), nets.images(4, size=24)]
    context = AllocationContext(statistics=capture(model, batches, taps(model, [method])), images=batches)
    found = method.allocate(model, Budget(**{unit: 0.5}), context)
    assert set(found.kept) == {"stem", "again", "unused"}
    assert 0 <= found.asked - found.got < max(found.cost.values(), default=1)
    assert set(found.evidence["raw_damage"]["unused"]) == {0}


def test_a_layer_that_sees_no_images_counts_in_both_halves() -> None:
    tap = "layers.0.blocks.0.attn.cpb_mlp.0.patches"  # of positions, one row whatever the images
    found = capture(nets.build("swinv2"), nets.images(4), {tap: True})
    assert torch.equal(found[f"{tap}/0"].comoment, found[f"{tap}/1"].comoment)


def test_one_image_is_not_two_halves() -> None:
    with pytest.raises(NumericalError, match="two images"):
        capture(nets.build("vit"), nets.images(1), {"patch_embed.proj.patches": True})


GOLDEN = [  # (r, rho, m) -> raw, repaired, RR, RR of the best affine repair (methods.md 3c)
    ((0.5, 0.8, 0.3), 0.54, 0.40, 0.74074, 0.66667),
    ((0.5, 0.5, 0.0), 0.75, 1.0, 1.33333, 1.0),
    ((0.3, 0.9, 0.0), 0.55, 0.20, 0.36364, 0.34545),
    ((0.3, 0.5, 0.8), 1.43, 1.0, 0.69930, 0.52448),
    ((1.0, 0.9, 0.0), 0.2, 0.2, 1.0, 0.95),
]


def _outputs(r: float, rho: float, m: float, scale: float = 1.0) -> Outputs:
    one = torch.ones(1, dtype=torch.float64)
    return Outputs(
        mean=0.7 * scale * one,
        variance=scale**2 * one,
        masked_mean=(0.7 + m) * scale * one,
        masked_variance=(r * scale) ** 2 * one,
        covariance=rho * r * scale**2 * one,
    )


@pytest.mark.parametrize(("moments", "raw", "repaired", "ratio", "best"), GOLDEN)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_damage_of_known_moments(
    moments: tuple[float, float, float], raw: float, repaired: float, ratio: float, best: float, scale: float
) -> None:
    both = _outputs(*moments, scale)
    found = _measured(both, both, torch.ones(1, dtype=torch.float64))
    assert found.raw == pytest.approx(raw * scale**2)
    assert found.repaired["rr"] == pytest.approx(repaired * scale**2)
    assert found.ratio("rr") == pytest.approx(ratio, abs=1e-5)
    assert found.ratio("rr_ls") == pytest.approx(best, abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(r=st.floats(0.01, 2), rho=st.floats(-1, 1), m=st.floats(-2, 2))
def test_no_channelwise_repair_beats_least_squares(r: float, rho: float, m: float) -> None:
    both = _outputs(r, rho, m)
    found = _measured(both, both, torch.ones(1, dtype=torch.float64))
    assert found.repaired["rr_ls"] <= min(found.repaired.values()) + 1e-9
    assert found.repaired["rr_ls"] == pytest.approx(1 - rho**2, abs=1e-9)
    shrunk = gains(both)["rr_asr"]
    assert found.repaired["rr_asr"] == pytest.approx(float(1 + shrunk**2 * r**2 - 2 * rho * shrunk * r), abs=1e-9)


def test_a_channel_that_died_keeps_its_mean_alone() -> None:
    found = _measured(_outputs(0, 0, -0.7), _outputs(0, 0, -0.7), torch.ones(1, dtype=torch.float64))
    assert found.repaired["rr"] == pytest.approx(1.0), "its variance is what is lost"
    assert found.raw == pytest.approx(1.49)


def _inputs(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    kept: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad():
        model(images)
    hook.remove()
    return kept[0]


def _by_running(model: nn.Module, images: Tensor, layer: str, density: float, norm: str | None) -> Damage:
    """The damage from outputs that were really computed, in two halves."""
    module = model.get_submodule(layer)
    weight = module.weight.detach()
    masked = weight * keep_largest(weight.abs(), round(density * weight.numel()))
    inputs = _inputs(model, images, layer)

    def run(w: Tensor, half: int) -> np.ndarray:
        x = inputs[half::2].double()
        if isinstance(module, nn.Linear):
            return (x @ w.double().T).reshape(-1, len(w)).numpy()
        out = F.conv2d(x, w.double(), None, module.stride, module.padding, module.dilation, module.groups)
        return out.movedim(1, -1).reshape(-1, len(w)).numpy()

    a = np.ones(len(weight))
    if norm is not None:
        bn = model.get_submodule(norm)
        a = (bn.weight.detach().double() ** 2 / (bn.running_var.double() + bn.eps)).numpy()
    raw = nomean = kept = energy = 0.0
    for half in (0, 1):
        fit, fit_masked = run(weight, half), run(masked, half)
        z, pruned = run(weight, 1 - half), run(masked, 1 - half)
        std, dead = fit_masked.std(0), fit_masked.var(0) <= 1e-5 * fit.var(0)
        gamma = np.where(dead, 1, fit.std(0) / np.where(dead, 1, std))
        repaired = gamma * pruned + fit.mean(0) - gamma * fit_masked.mean(0)
        alive = z.var(0) >= 1e-8 * z.var(0).mean()
        raw += (a * ((pruned - z) ** 2).mean(0))[alive].sum() / 2
        nomean += (a * (pruned - z).var(0))[alive].sum() / 2
        kept += (a * ((repaired - z) ** 2).mean(0))[alive].sum() / 2
        energy += (a * z.var(0))[alive].sum() / 2
    return Damage(raw, nomean, {"rr": kept, "rr_nomean": kept}, energy)


@pytest.mark.parametrize("name", ["resnet", "mobilenetv2", "vit"])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_closed_expressions_are_what_running_the_layer_gives(name: str, density: float) -> None:
    model, images = nets.build(name), nets.images(6)
    layers = dict(called(model))
    statistics = capture(model, images, {f"{layer}.patches": True for layer in layers})
    wiring = trace(model, layers, images[:1])
    for layer, module in layers.items():
        if statistics[f"{layer}.patches/0"].count < 16:
            continue  # a map of one pixel: three rows fit nothing, and rounding decides
        norm = wiring.norm_after.get(layer)
        weights = channel_weights(model.get_submodule(norm) if norm else None, len(module.weight))
        found = Layer(module, layer, statistics, weights).damage(density)
        expected = _by_running(model, images, layer, density, norm)
        near = {"rel": 1e-3, "abs": 1e-5 * expected.energy + 1e-9}
        assert found.energy == pytest.approx(expected.energy, **near), layer
        assert found.raw == pytest.approx(expected.raw, **near), layer
        assert found.raw_nomean == pytest.approx(expected.raw_nomean, **near), layer
        assert found.repaired["rr"] == pytest.approx(expected.repaired["rr"], **near), layer


# From damage to densities


def _toy_pool(sparsity: float) -> Pool:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Linear(8, 10))
    return Pool.of(model, ALL, Budget(weights=sparsity), AllocationContext())


def test_the_prior_modulated_rule_on_its_example() -> None:
    pool = _toy_pool(0.75)
    prior = dict(zip(pool.weights, (0.292328, 0.151786, 0.546429), strict=True))
    scores = dict(zip(pool.weights, (0.4, 0.8, 0.2), strict=True))
    pool_first = next(iter(pool.weights))
    found = modulated(pool, prior, scores, 1.0)
    assert list(found.values()) == pytest.approx([0.246966, 0.256466, 0.230819], abs=1e-6)
    assert pool.allocation(found).got == 119
    dense = modulated(pool, {**prior, pool_first: 1.0}, {**scores, pool_first: 0.0}, 1.0)
    assert dense[pool_first] == max(dense.values()), "a layer that the prior keeps dense has no damage, and stays"
    plain = modulated(pool, prior, scores, 0.0)
    assert list(plain.values()) == pytest.approx(list(prior.values()), abs=1e-5), "strength 0 is the prior"


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.5, 4), min_size=3, max_size=3), st.floats(0.3, 0.9))
def test_greedy_buys_what_an_exhaustive_search_finds_best(powers: list[float], sparsity: float) -> None:
    """On convex curves no allocation on a fine lattice has less damage under the same budget."""
    pool = _toy_pool(sparsity)
    power = dict(zip(pool.weights, powers, strict=True))

    def curve(layer: str, density: float) -> float:
        """Linear between the points of the grid, as the rule sees it."""
        return float(np.interp(density, (0.0, *GRID), [(1 - g) ** (1 + power[layer]) for g in (0.0, *GRID)]))

    found = greedy(pool, curve)
    spent = sum(found[layer] * pool.totals[layer] for layer in found)
    assert spent == pytest.approx(pool.target, rel=1e-6)
    total = sum(curve(layer, density) for layer, density in found.items())
    first, second, third = pool.weights
    for a, b in itertools.product(np.linspace(0.05, 1, 9), repeat=2):
        c = (pool.target - a * pool.totals[first] - b * pool.totals[second]) / pool.totals[third]
        if 0.125 <= c <= 1 and a >= 0.04 and b >= 0.03:
            assert total <= curve(first, a) + curve(second, b) + curve(third, c) + 1e-6


@pytest.mark.parametrize("allocator", [RelativeRepairability, RawDamage])
@pytest.mark.parametrize("rule", ["prior", "greedy"])
@pytest.mark.parametrize("name", ["resnet", "mobilenetv3", "vit"])
def test_the_allocators_meet_the_budget_and_keep_their_evidence(allocator: type, rule: str, name: str) -> None:
    model, images = nets.build(name), nets.images(8)
    method = allocator(include=ALL, rule=rule)
    context = AllocationContext(statistics=capture(model, images, taps(model, [method])), images=images)
    found = method.allocate(model, Budget(weights=0.9), context)
    assert found.got == found.asked
    assert found.evidence["densities"] == list(GRID)
    assert all(count > 0 for count in found.kept.values()), "no layer loses everything"
    for layer, row in found.evidence["rr"].items():
        assert len(row) == len(GRID) and row[-1] == 0, f"{layer}: a dense layer has no damage"
    if allocator is RelativeRepairability and rule == "prior":
        plain = RelativeRepairability(include=ALL, strength=0).allocate(model, Budget(weights=0.9), context)
        erk = Erk(include=ALL).allocate(model, Budget(weights=0.9), context)
        assert found.kept != plain.kept
        drift = sum(abs(plain.kept[layer] - erk.kept[layer]) for layer in erk.kept)
        assert drift <= 0.02 * erk.asked, "strength 0 is ERK but for the least densities"


@pytest.mark.parametrize(("allocator", "rests_on"), [(RelativeRepairability, "rr"), (RawDamage, "raw_damage")])
def test_the_probe_is_the_density_at_which_the_prior_is_modulated(allocator: type, rests_on: str) -> None:
    model, images = nets.build("resnet"), nets.images(8)
    for probe in ("prior", "uniform"):
        method = allocator(include=ALL, probe=probe)
        context = AllocationContext(statistics=capture(model, images, taps(model, [method])), images=images)
        pool = Pool.of(model, ALL, Budget(weights=0.9), context)
        measure, erk = measured(model, pool, context), pool.filled(by_shape(pool, ratio))
        found = method.allocate(model, Budget(weights=0.9), context).evidence
        assert found["rests_on"] == rests_on
        for layer, score in found["scores"].items():
            at = measure(layer, erk[layer] if probe == "prior" else 0.1)
            expected = at.ratio("rr") if rests_on == "rr" else at.raw / at.energy
            assert score == pytest.approx(0.0 if probe == "prior" and erk[layer] == 1 else expected)


def test_the_densities_of_the_rest_keep_their_evidence() -> None:
    model, images = nets.build("resnet"), nets.images(8)
    method = ProjectionForced(projections="erk", rest="relative_repairability")
    context = AllocationContext(statistics=capture(model, images, taps(model, [method])), images=images)
    found = method.allocate(model, Budget(weights=0.8), context)
    assert found.got == found.asked and found.evidence["rests_on"] == "rr"


def test_wrong_params_are_refused() -> None:
    for wrong in ({"rule": "greed"}, {"strength": -1}, {"variant": "rr_asrr"}, {"probe": "here"}):
        with pytest.raises(MethodError):
            RelativeRepairability(**wrong)  # type: ignore[arg-type]
