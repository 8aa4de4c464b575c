"""A trial of an allocation: what it answers, what it leaves alone, and how many images it looks at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heal import masking
from heal.allocators.trial import Trial, at_most, divergence
from heal.allocators.uniform import Uniform
from heal.images import Images
from heal.method import AllocationContext
from heal.pruners.magnitude import Magnitude
from heal.values import Budget
from tests.heal import nets
from tests.heal.judged import ALL, pool_of, the_long_way


@pytest.mark.parametrize("mode", ["cumulative", "ema_reset"])
@pytest.mark.parametrize("name", ["vit", "resnet", "mobilenetv2"])
def test_a_trial_judges_as_a_fresh_copy_would(name: str, mode: str) -> None:
    dense, images = nets.build(name), nets.images(12)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    pool = pool_of(dense, Budget(weights=0.3))
    trial = Trial(dense, pool.weights, images, 5, "agreement", mode)  # type: ignore[arg-type]
    for sparsity in (0.3, 0.8, 0.1):  # sparser and denser again: the working copy forgets what it was
        found = Uniform(include=ALL).allocate(dense, Budget(weights=sparsity), AllocationContext())
        agreement, near = the_long_way(dense, found, images, mode, 5)
        assert trial.fitness(found.kept) == (pytest.approx(agreement), pytest.approx(near, rel=1e-4))
        assert masking.holds(trial.network, Magnitude().prune(dense, found, {}))
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())
    networks = [dense, trial.network]
    assert not any(m._forward_hooks or m._forward_pre_hooks for network in networks for m in network.modules())


def test_the_first_number_decides_and_the_second_breaks_ties() -> None:
    dense, images = nets.build("resnet"), nets.images(8)
    pool = pool_of(dense, Budget(weights=0.5))
    kept = pool.allocation(dict.fromkeys(pool.weights, 0.5)).kept
    judged = {by: Trial(dense, pool.weights, images, 4, by, "cumulative").fitness(kept) for by in ("agreement", "kl")}  # type: ignore[arg-type]
    assert judged["kl"] == judged["agreement"][::-1]
    assert (0.5, -0.1) > (0.5, -0.2) > (0.4, -0.0), "which is how tuples compare"
    assert Trial(dense, pool.weights, images, 4, "kl", "cumulative").fitness(pool.totals)[0] < 0, "norms differ"
    vit = nets.build("vit")
    whole = pool_of(vit, Budget(weights=0.0))
    assert Trial(vit, whole.weights, images, 4, "kl", "cumulative").fitness(whole.totals) == (0.0, 1.0)


def test_the_divergence_does_not_depend_on_how_many_images_are_computed_at_once() -> None:
    p, q = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0)).split([1250, 1250])
    one = (p.double().softmax(1) * (p.double().log_softmax(1) - q.double().log_softmax(1))).sum(1).mean()
    assert divergence(p, q) == pytest.approx(float(one), rel=1e-12)
    assert divergence(p, p) == 0


class _Counting:
    """An image array that remembers what it was asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images, self.shape, self.asked = images, tuple(images.shape), set[int]()

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        self.asked |= set(indices.tolist())
        return self.images[indices]


@pytest.mark.parametrize("count", [1, 4, 7, 30])
def test_no_more_images_are_looked_at_than_asked_for(count: int) -> None:
    images, array = nets.images(10), _Counting(nets.images(10))
    forms: list[Images] = [images, array, [images[:4], images[4:8], images[8:]]]
    dense = nets.build("vit")
    pool = pool_of(dense, Budget(weights=0.5))
    kept = pool.allocation(dict.fromkeys(pool.weights, 0.5)).kept
    found = []
    for form in forms:
        few = at_most(AllocationContext(images=form), count, "sequence")
        found.append(Trial(dense, pool.weights, few, 4, "kl", "cumulative").fitness(kept))
    assert array.asked == set(range(min(count, 10)))
    assert found[0] == found[1] == found[2]
