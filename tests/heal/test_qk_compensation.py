"""Queries and keys that are mixed so that they make up for those that went, against slow references."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heal.allocators.global_variance import GlobalVariance
from heal.errors import MethodError
from heal.healers.closed_form import ClosedForm
from heal.healers.qk_compensation import QkCompensation, compensation
from heal.method import AllocationContext, HealContext
from heal.pruned import apply
from heal.pruners.variance import Variance
from heal.values import Budget, ChannelCut, Mask
from tests.heal import nets
from tests.heal.test_attention import ATTENTION, QK, V, queries_and_keys, seen_by, statistics_of, tokens_of


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_compensation_solves_its_normal_equations(kept: int) -> None:
    """Against the Kronecker system of all unknowns at once; U and V multiply to I + M, which is not symmetric."""
    q, k = (np.random.default_rng(seed).normal(size=(200, 6)) @ _mixing(seed) + 0.5 for seed in (0, 1))
    keep, gone, damping = torch.arange(kept), np.arange(kept, 6), 0.01
    second = [torch.tensor(x.T @ x / len(x)) for x in (q, k)]
    u, v = compensation(*second, keep, damping)
    g_q, g_k = (moment.numpy()[:kept, :kept] for moment in second)
    lost = second[0].numpy()[:kept, gone] @ second[1].numpy()[gone, :kept]
    ridge = damping * np.trace(g_q) * np.trace(g_k) / kept**2
    system = np.kron(g_q, g_k) + ridge * np.eye(kept**2)
    m = np.linalg.solve(system, lost.reshape(-1)).reshape(kept, kept)
    np.testing.assert_allclose(u @ v.T, np.eye(kept) + m, rtol=1e-7, atol=1e-9)
    assert kept == 1 or np.abs(m - m.T).max() > 1e-3


def _mixing(seed: int) -> np.ndarray:
    return np.random.default_rng(10 + seed).normal(size=(6, 6))


@pytest.mark.parametrize("extra", [(), ("v",)])
def test_compensation_is_the_best_mix_of_what_stays(extra: tuple[str, ...]) -> None:
    """Nearly undamped, the scores of every head over all pairs come as close as least squares bring them."""
    model, images = _correlated(), nets.images(12)
    healer, allocator = QkCompensation(damping=1e-9), GlobalVariance(kinds=("qk", *extra), scope="layer")
    statistics = statistics_of(model, images, allocator, Variance(), healer)
    allocation = allocator.allocate(model, Budget(neurons=0.5), AllocationContext(statistics=statistics))
    pruned, student = Variance().prune(model, allocation, statistics), copy.deepcopy(model)
    apply(student, pruned)
    before = _distance(student, model, images)
    healer.heal(student, model, images, HealContext(statistics=statistics, pruned=pruned))
    assert _distance(student, model, images) < (0.9 if extra else 0.5) * before
    q, k, _ = seen_by(model, images)
    healed = queries_and_keys(student.get_submodule(ATTENTION), tokens_of(model, images))
    for head, keep in enumerate(pruned.keep[QK].numpy()):
        scores, (left, right) = q[head] @ k[head].T, (side[head][:, keep] for side in (q, k))
        best = left @ np.linalg.pinv(left) @ scores @ (right @ np.linalg.pinv(right)).T
        mixed = healed[0][head] @ healed[1][head].T
        least, plain, found = (np.square(scores - other).sum() for other in (best, left @ right.T, mixed))
        assert found <= 1.001 * least + 1e-9 * np.square(scores).sum() and found < 0.5 * plain


def test_compensation_works_without_biases_and_on_the_same_dimensions_of_all_heads() -> None:
    model, images = _correlated(), nets.images(12)
    for block in model.blocks:
        block.attn.qkv.bias = None
    pruned, student = ChannelCut({QK: torch.tensor([0, 1, 2, 3])}, {QK: 8}), copy.deepcopy(model)
    healer = QkCompensation()
    statistics = statistics_of(model, images, GlobalVariance(kinds=("qk",)), healer)
    apply(student, pruned)
    before = _distance(student, model, images)
    healer.heal(student, model, images, HealContext(statistics=statistics, pruned=pruned))
    assert _distance(student, model, images) < 0.5 * before
    assert student.get_submodule(f"{ATTENTION}.qkv").bias is None


def _correlated() -> nn.Module:
    """Half of each head's queries and keys are nearly mixtures of the others, as those of trained networks are."""
    model, generator = nets.build("vit"), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in model.blocks:
            mix = torch.randn(8, 4, 4, generator=generator) / 2
            weight, bias = block.attn.qkv.weight[:64].view(8, 8, 32), block.attn.qkv.bias[:64].view(8, 8, 1)
            weight *= 2
            for rows in (weight, bias):
                rows[:, 4:] = mix @ rows[:, :4] + 0.02 * rows[:, 4:]
    return model


def _distance(student: nn.Module, model: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((student(images) - model(images)).norm())


def test_a_healer_says_what_it_lacks() -> None:
    model, images = nets.build("vit"), nets.images(2)
    values, queries = (ChannelCut({name: torch.arange(4)}, {name: 8}) for name in (V, QK))
    for healer, pruned, match in (
        (QkCompensation(), values, f"but {V} was cut; add qk"),
        (QkCompensation(), Mask({}), "the pruner gave a mask"),
        (ClosedForm(), queries, "heal queries and keys by qk_compensation"),
    ):
        with pytest.raises(MethodError, match=match):
            healer.heal(copy.deepcopy(model), model, images, HealContext(pruned=pruned))


def test_a_damping_is_above_zero() -> None:
    with pytest.raises(MethodError, match="damping = 0 must be greater than 0"):
        QkCompensation(damping=0)
