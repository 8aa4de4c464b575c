"""Damage and repair, against convolutions that were really run."""

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
from heal.errors import MethodError
from heal.families.parts import called
from heal.masking import keep_largest
from heal.method import AllocationContext, taps
from heal.repairability import Damage, Layer, Outputs, _measured, channel_weights, gains
from heal.statistics import capture
from heal.values import Budget
from heal.wiring import trace
from tests.heal import nets
from tests.heal.test_patch_moments import Twice, inputs_of

ALL = ("stem", "depthwise", "classifier")

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


def _by_running(model: nn.Module, images: Tensor, layer: str, density: float, norm: str | None) -> Damage:
    """The damage from outputs that were really computed, in two halves."""
    module = model.get_submodule(layer)
    weight = module.weight.detach()
    masked = weight * keep_largest(weight.abs(), round(density * weight.numel()))
    inputs = inputs_of(model, images, layer)

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


@pytest.mark.parametrize("allocator", [RelativeRepairability, RawDamage])
@pytest.mark.parametrize("rule", ["prior", "greedy"])
@pytest.mark.parametrize("unit", ["weights", "macs"])
def test_a_layer_that_is_never_called_has_no_damage(allocator: type, rule: str, unit: str) -> None:
    model, method = Twice(pool=True).eval(), allocator(include=("stem",), rule=rule)
    model.add_module("unused", nn.Conv2d(8, 8, 1))
    batches = [nets.images(4), nets.images(4, size=24)]
    context = AllocationContext(statistics=capture(model, batches, taps(model, [method])), images=batches)
    found = method.allocate(model, Budget(**{unit: 0.5}), context)
    assert set(found.kept) == {"stem", "again", "unused"}
    assert 0 <= found.asked - found.got < max(found.cost.values(), default=1)
    assert set(found.evidence["raw_damage"]["unused"]) == {0}


def test_wrong_params_are_refused() -> None:
    for wrong in ({"rule": "greed"}, {"strength": -1}, {"variant": "rr_asrr"}, {"probe": "here"}):
        with pytest.raises(MethodError):
            RelativeRepairability(**wrong)  # type: ignore[arg-type]
