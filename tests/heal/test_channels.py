"""Channels that may be cut: how they are ranked, denoised, folded and solved for, against slow references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from torch import Tensor, nn

import heal
from heal.allocators.global_variance import GlobalVariance
from heal.channels import pool
from heal.denoising import denoised, median
from heal.errors import ArchitectureError, MethodError, NumericalError
from heal.families.family import HIDDEN
from heal.families.lookup import describe
from heal.healers.closed_form import ClosedForm
from heal.method import AllocationContext, HealContext, check, taps
from heal.pruned import apply
from heal.pruners.variance import Variance
from heal.statistics import capture, moments
from heal.values import Budget, ChannelCut, LayerStats
from heal.variances import variances
from tests.heal import nets


@pytest.mark.parametrize(("beta", "published"), [(3072 / 8192, 0.8735), (0.1, 0.9666), (0.9, None)])
def test_the_median_of_marchenko_and_pastur(beta: float, published: float | None) -> None:
    """Half of the law's mass, integrated by scipy, lies below it; two values are the published ones."""
    found = median(beta)
    assert _mass(beta, found) == pytest.approx(0.5, abs=1e-5)
    assert published is None or found == pytest.approx(published, abs=1e-4)


@pytest.mark.parametrize("beta", [1.5, 3.0])
def test_with_more_channels_than_images_the_median_is_that_of_the_rest(beta: float) -> None:
    assert _mass(beta, median(beta)) == pytest.approx(0.5 / beta, abs=1e-5)


def _mass(beta: float, upto: float) -> float:
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def density(t: float) -> float:
        return math.sqrt(max((high - t) * (t - low), 0)) / (2 * math.pi * beta * t)

    return float(quad(density, low, upto, limit=200)[0])


def test_noise_is_removed_and_signal_stays() -> None:
    """Two strong directions in white noise, as many rows as images: the rank of what stays is two."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 400, 60
    directions = torch.linalg.qr(torch.randn(width, 2, generator=generator)).Q
    x = torch.randn(rows, width, generator=generator) + 5 * torch.randn(rows, 2, generator=generator) @ directions.T
    found = moments(x[None], comoment=True)
    signal = denoised(LayerStats(found.count, found.mean, found.m2, found.comoment, images=rows))
    assert int(torch.linalg.matrix_rank(signal)) == 2
    expected = 25 * directions.double() @ directions.double().T
    assert float((signal - expected).norm() / expected.norm()) < 0.2
    with pytest.raises(NumericalError, match="how many images"):
        denoised(found)


@pytest.mark.parametrize("name", ["vit", "mobilenetv3", "bottleneck"])
def test_scores_are_what_they_say(name: str) -> None:
    model, images = nets.build(name), nets.images(6)
    groups = pool(model, HIDDEN)
    wanted = {f"{consumer}.input": True for group in groups.values() for consumer in group.consumers}
    statistics = capture(model, images, wanted)
    inputs = _inputs(model, images, wanted)
    post = variances(model, groups, statistics, "post", 0.5)
    weighted = variances(model, groups, statistics, "weighted", 0.5)
    for name, group in groups.items():
        slow = {consumer: inputs[f"{consumer}.input"].double().numpy().var(0, ddof=1) for consumer in group.consumers}
        np.testing.assert_allclose(post[name], sum(slow.values()), rtol=1e-4, atol=1e-7)
        cost = sum(
            variance * (_weight(model, consumer).double().numpy() ** 2).sum((0, 2))
            for consumer, variance in slow.items()
        )
        np.testing.assert_allclose(weighted[name], cost, rtol=1e-4, atol=1e-7)


def test_denoised_scores_lie_between_variance_and_signal() -> None:
    model, images = nets.build("vit"), nets.images(64)
    groups = pool(model, HIDDEN)
    statistics = capture(model, images, taps(model, [GlobalVariance(statistic="denoised")]))
    plain = {name: statistics[f"{group.consumers[0]}.input"] for name, group in groups.items()}
    for removed in (0.0, 0.3, 1.0):
        scores = variances(model, groups, statistics, "denoised", removed)
        for name, stats in plain.items():
            whole, signal = stats.covariance.diagonal(), denoised(stats).diagonal()
            torch.testing.assert_close(scores[name], whole + removed * (signal - whole))
            assert stats.images == 64


@pytest.mark.parametrize("statistic", ["weighted", "denoised"])
def test_the_budget_is_exact_by_every_statistic(statistic: str) -> None:
    model, images = nets.build("resnet"), nets.images(8)
    allocator, pruner = GlobalVariance(statistic=statistic), Variance(statistic=statistic)  # type: ignore[arg-type]
    result = heal.recompress(model, images, Budget(neurons=0.4), allocator, pruner, ["closed_form"])
    assert isinstance(result.pruned, ChannelCut)
    total = sum(result.pruned.total.values())
    assert total - result.pruned.removed == int(0.6 * total + 0.5)


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "vgg"])
def test_a_convolution_behind_a_cut_is_solved_by_least_squares(name: str) -> None:
    """numpy's least squares on the unfolded inputs, zero padding included, of every consumer; cut rows go as well."""
    model, images = nets.build(name), nets.images(24, size=64)
    allocator, pruner, healer = GlobalVariance(scope="layer"), Variance(), ClosedForm(damping=1e-6)
    statistics = capture(model, images, taps(model, [allocator, pruner, healer]))
    allocation = allocator.allocate(model, Budget(neurons=0.5), AllocationContext(statistics=statistics))
    pruned = pruner.prune(model, allocation, statistics)
    student = nets.build(name)
    apply(student, pruned)
    report = healer.heal(student, model, images, HealContext(statistics=statistics, pruned=pruned))
    refused = {note.split()[0] for note in report.notes}
    groups = describe(model).cuttable
    rows = {producer: pruned.keep[name] for name in pruned.keep for producer in groups[name].producers}
    consumers = [(consumer, keep) for name, keep in pruned.keep.items() for consumer in groups[name].consumers]
    inputs = _maps(model, images, [consumer for consumer, _ in consumers])
    checked = 0
    for consumer, keep in consumers:
        module = model.get_submodule(consumer)
        columns, target = _design(module, inputs[consumer], keep)
        if consumer in refused or len(columns) < 2 * columns.shape[1]:
            continue  # fewer rows than unknowns have no single solution
        own = rows.get(consumer, torch.arange(target.shape[1]))
        solved = student.get_submodule(consumer)
        found = columns @ np.vstack([_flat(solved), solved.get_parameter("bias").detach().double().numpy()[None]])
        best = columns @ np.linalg.lstsq(columns, target[:, own], rcond=None)[0]
        residual, least = ((y - target[:, own]) ** 2 for y in (found, best))
        assert residual.sum() <= least.sum() + 1e-4 * (target**2).sum()
        checked += 1
    assert checked


def _design(module: nn.Module, x: Tensor, keep: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(inputs of the kept channels with a column of ones, dense outputs), a row for every position."""
    if isinstance(module, nn.Conv2d):
        places = module.kernel_size[0] * module.kernel_size[1]
        unfolded = F.unfold(x.double(), module.kernel_size, padding=module.padding, stride=module.stride)
        chosen = unfolded.view(len(x), -1, places, unfolded.shape[-1])[:, keep].flatten(1, 2)
        columns, outputs = chosen.movedim(1, -1).flatten(0, 1), module(x).movedim(1, -1).flatten(0, 2)
    else:
        columns, outputs = x[..., keep].double().flatten(0, -2), module(x).flatten(0, -2)
    ones = np.ones((len(columns), 1))
    return np.hstack([columns.numpy(), ones]), outputs.detach().double().numpy()


def _flat(module: nn.Module) -> np.ndarray:
    return module.get_parameter("weight").detach().double().flatten(1).T.numpy()  # type: ignore[no-any-return]


def _weight(model: nn.Module, layer: str) -> Tensor:
    weight = model.get_parameter(f"{layer}.weight").detach()
    return weight.reshape(*weight.shape[:2], -1)


def _maps(model: nn.Module, images: Tensor, layers: list[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[0]}))
        for layer in layers
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


def _inputs(model: nn.Module, images: Tensor, wanted: dict[str, bool]) -> dict[str, Tensor]:
    """Rows [n, channels] of every tap."""
    maps = _maps(model, images, [tap.removesuffix(".input") for tap in wanted])
    return {
        f"{layer}.input": (x.movedim(1, -1) if isinstance(model.get_submodule(layer), nn.Conv2d) else x).flatten(0, -2)
        for layer, x in maps.items()
    }


def test_an_unknown_kind_of_channels_is_refused() -> None:
    with pytest.raises(MethodError, match="did you mean 'residual'"):
        GlobalVariance(kinds=("residuals",))
    with pytest.raises(ArchitectureError, match="no channels of kind inner; it has heads, mlp, qk, v"):
        check(nets.build("vit"), Budget(neurons=0.5), GlobalVariance(kinds=("inner",)), Variance(), [])


@pytest.mark.parametrize("kinds", [HIDDEN, ("residual",)])
def test_variance_matching_looks_at_the_channels_that_stay(kinds: tuple[str, ...]) -> None:
    """What the norms behind cut channels give has the dense mean and variance, channel by channel."""
    model, images = nets.build("bottleneck"), nets.images(16, size=64)
    allocator = GlobalVariance(kinds=kinds)
    result = heal.recompress(model, images, Budget(neurons=0.5), allocator, healers=["variance_matching"])
    assert isinstance(result.pruned, ChannelCut)
    for name, group in describe(model).groups_of(kinds).items():
        keep = result.pruned.keep[name]
        for norm in group.followers:
            dense, found = (_normed(net, images, norm) for net in (model, result.model))
            torch.testing.assert_close(found.mean(0), dense[:, keep].mean(0), atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(found.std(0), dense[:, keep].std(0), atol=1e-3, rtol=1e-3)


def _normed(model: nn.Module, images: Tensor, norm: str) -> Tensor:
    """What a BatchNorm gives before any activation, rows [n, channels]."""
    module = model.get_submodule(norm)
    x = _maps(model, images, [norm])[norm].movedim(1, -1).flatten(0, -2)
    mean, variance = module.get_buffer("running_mean"), module.get_buffer("running_var")
    gain = module.get_parameter("weight") / (variance + module.eps).sqrt()
    return (gain * (x - mean) + module.get_parameter("bias")).detach()
