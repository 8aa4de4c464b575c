"""Streaming moments against numpy, whatever the batching, and what a pass leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from heal.errors import ArchitectureError, ImagesError, NumericalError
from heal.families.lookup import describe
from heal.merging import merge
from heal.statistics import capture, moments
from tests.heal import nets

WITH_PAIRS = ["vit", "deit", "swin", "swinv2", "convnext"]


def _taps(model: nn.Module) -> dict[str, bool]:
    pairs = describe(model).pairs
    return {f"{pair.consumer}.input": True for pair in pairs} | {f"{pair.producer}.output": False for pair in pairs}


def _seen(model: nn.Module, name: str, images: Tensor) -> np.ndarray:
    """What really enters a module, collected by a hook of the test's own: float64 [rows, channels]."""
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: kept.append(args[0].detach()))
    with torch.no_grad():
        model(images)
    handle.remove()
    return kept[0].reshape(-1, kept[0].shape[-1]).double().numpy()


@pytest.mark.parametrize("name", WITH_PAIRS)
def test_moments_are_those_of_numpy(name: str) -> None:
    model, images = nets.build(name), nets.images(6)
    stats = capture(model, images, _taps(model), batch_size=2)
    for pair in describe(model).pairs:
        rows, found = _seen(model, pair.consumer, images), stats[f"{pair.consumer}.input"]
        assert found.count == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.variance, rows.var(0, ddof=1), rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(found.covariance, np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_batching_does_not_matter(name: str) -> None:
    model, images = nets.build(name), nets.images(12)
    whole = capture(model, images, _taps(model), batch_size=12)
    for batch_size in (1, 5):
        parts = capture(model, images, _taps(model), batch_size=batch_size)
        for tap, stats in whole.items():
            torch.testing.assert_close(parts[tap].mean, stats.mean, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(parts[tap].m2, stats.m2, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    split=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    offset=st.floats(-100, 100),
    scale=st.floats(0.01, 10),
    seed=st.integers(0, 1000),
)
def test_merging_parts_gives_the_whole(split: list[int], offset: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = offset + scale * torch.randn(sum(split), 5, 3, generator=generator)
    total = None
    for part in rows.split(split):
        total = moments(part, comoment=True) if total is None else merge(total, moments(part, comoment=True))
    assert total is not None
    flat = rows.reshape(-1, 3).double().numpy()
    np.testing.assert_allclose(total.mean, flat.mean(0), rtol=1e-6, atol=1e-5 * scale)
    np.testing.assert_allclose(total.variance, flat.var(0, ddof=1), rtol=1e-3, atol=1e-10 * offset**2)


def test_variance_survives_a_mean_far_away() -> None:
    """A naive float32 sum of squares gets a negative variance here."""
    rows = 30 + 0.01 * torch.randn(200, 500, 2, generator=torch.Generator().manual_seed(0))
    total = moments(rows[:1])
    for part in rows[1:].split(20):
        total = merge(total, moments(part))
    expected = rows.reshape(-1, 2).double().numpy().var(0, ddof=1)
    np.testing.assert_allclose(total.variance, expected, rtol=1e-3)


def test_a_generator_is_refused_because_it_can_be_read_once() -> None:
    model = nets.build("vit")
    with pytest.raises(ImagesError, match="one-shot"):
        capture(model, (batch for batch in [nets.images()]), _taps(model))


def test_hooks_and_modes_are_restored_also_after_an_error() -> None:
    model = nets.build("vit").train()
    model.get_submodule("blocks.0").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(NumericalError):
        capture(model, torch.full((2, 3, nets.SIZE, nets.SIZE), torch.nan), _taps(model))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_tap_that_nothing_passes_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 8, 8))
    model.add_module("unused", nn.Identity())
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign, operator]
    with pytest.raises(ArchitectureError, match=r"unused\.input"):
        capture(model, torch.randn(2, 3, 8, 8), {"unused.input": False})
