"""Cuts by a budget in MACs, the baselines that rank channels by norm and saliency, and mean folding as a healer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import heal
from heal.allocators.filter_norm import FilterNorm
from heal.allocators.global_variance import GlobalVariance
from heal.allocators.snip import Snip, felt
from heal.channels import norms, pool
from heal.cost import macs
from heal.errors import BudgetError, MethodError
from heal.families.family import HIDDEN
from heal.families.lookup import describe
from heal.healers.mean_folding import MeanFolding
from heal.method import AllocationContext, HealContext, check, taps
from heal.pruned import apply
from heal.pruners.magnitude import Magnitude
from heal.pruners.variance import Variance
from heal.statistics import capture
from heal.surgery import shrink, widths
from heal.values import Budget
from tests.heal import nets


@pytest.mark.parametrize("name", ["vit", "mobilenetv2", "mobilenetv3"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2])
def test_a_budget_in_macs_takes_the_widest_cut_that_fits(name: str, fraction: float) -> None:
    model, images = nets.build(name), nets.images(4)
    size = tuple(images.shape[1:])
    result = heal.recompress(model, images, Budget(macs=fraction), FilterNorm(scope="layer"), "filter_norm", [])
    limit = Budget(macs=fraction).kept(macs(model, size))
    evidence = result.report.allocation.evidence["macs"]
    assert macs(result.model, size) == evidence["got"] <= limit == evidence["asked"]
    found = result.report.allocation
    if fraction:
        wider = Budget(neurons=1 - (found.got + len(found.kept)) / found.whole)  # a channel more of every group
        allocation = FilterNorm(scope="layer").allocate(model, wider, AllocationContext())
        larger = copy.deepcopy(model)
        shrink(larger, allocation.kept)
        assert macs(larger, size) > limit


def test_a_budget_in_macs_that_these_channels_cannot_save_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"macs = 0\.9 cannot be met: the narrowest cut .* leaves \d+ of \d+ MACs"):
        heal.recompress(nets.build("vit"), nets.images(4), Budget(macs=0.9), healers=[])


def test_macs_are_saved_by_what_the_allocator_removes() -> None:
    model = nets.build("vit")
    check(model, Budget(macs=0.2), GlobalVariance(), Variance(), [])
    with pytest.raises(MethodError, match="magnitude works on weights, but the allocator works on neurons"):
        check(model, Budget(macs=0.2), GlobalVariance(), Magnitude(), [])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *((name, HIDDEN) for name in ("vit", "bottleneck", "mobilenetv3", "swin")),
        *((name, ("residual",)) for name in ("resnet", "bottleneck", "mobilenetv3")),
    ],
)
def test_saliency_is_what_snip_sums_over_a_units_weights(name: str, kinds: tuple[str, ...]) -> None:
    """|sum of w dL/dw| over the weights that read a channel, by autograd on the parameters, batch after batch."""
    model, images = nets.build(name), nets.images(6)
    allocator = Snip(kinds=kinds)
    statistics = capture(model, images, taps(model, [allocator]), batch_size=4)
    logits = model(images)
    F.cross_entropy(logits, logits.argmax(-1)).backward()
    for group in pool(model, kinds).values():
        expected = torch.zeros(0)
        for consumer in group.consumers:
            weight = model.get_parameter(f"{consumer}.weight")
            assert weight.grad is not None
            product = (weight.detach() * weight.grad).double().transpose(0, 1).flatten(1).sum(1)
            expected = product if expected.numel() == 0 else expected + product
        scale = float(expected.abs().max())
        torch.testing.assert_close(felt(group, statistics), expected.abs(), rtol=1e-3, atol=1e-4 * scale)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_filter_norms_are_those_of_the_producers_rows() -> None:
    model = nets.build("mobilenetv3")
    for group in pool(model, HIDDEN).values():
        rows = [model.get_parameter(f"{p}.weight").detach().flatten(1).double().numpy() for p in group.producers]
        np.testing.assert_allclose(norms(model, group), np.linalg.norm(np.hstack(rows), axis=1), rtol=1e-6)


@pytest.mark.parametrize("name", ["vit", "bottleneck"])
@pytest.mark.parametrize("baseline", ["filter_norm", "snip"])
def test_baselines_meet_the_budget_and_fold_nothing(name: str, baseline: str) -> None:
    model, images = nets.build(name), nets.images(4)
    result = heal.recompress(model, images, Budget(neurons=0.3), baseline, baseline, [])
    cut = widths(result.model)
    assert sum(cut[name] for name in result.pruned.keep) == int(0.7 * result.report.allocation.whole + 0.5)
    assert not result.pruned.updates


@pytest.mark.parametrize("name", ["vit", "bottleneck", "mobilenetv3"])
def test_mean_folding_is_what_the_cut_folds_and_twice_is_as_good_as_once(name: str) -> None:
    model, images = nets.build(name), nets.images(8)
    allocator, pruner, healer = GlobalVariance(scope="layer"), Variance(fold_mean=False), MeanFolding()
    statistics = capture(model, images, taps(model, [allocator, pruner, healer]))
    allocation = allocator.allocate(model, Budget(neurons=0.5), AllocationContext(statistics=statistics))
    cut, folded = (p.prune(model, allocation, statistics) for p in (pruner, Variance()))
    student, expected = copy.deepcopy(model), copy.deepcopy(model)
    apply(student, cut)
    apply(expected, folded)
    for _ in range(2):
        healer.heal(student, model, images, HealContext(statistics=statistics, pruned=cut))
        for group in describe(model).groups_of(HIDDEN).values():
            for consumer in group.consumers:
                found, wanted = (net.get_submodule(consumer).get_parameter("bias") for net in (student, expected))
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_mean_output_is_the_dense_one_again_after_training() -> None:
    """Whatever the weights became: on the dense inputs of the kept neurons the consumer's mean is the dense one."""
    model, images = nets.build("vit"), nets.images(8)
    allocator, pruner, healer = GlobalVariance(), Variance(), MeanFolding()
    statistics = capture(model, images, taps(model, [allocator, pruner, healer]))
    allocation = allocator.allocate(model, Budget(neurons=0.5), AllocationContext(statistics=statistics))
    cut = pruner.prune(model, allocation, statistics)
    student = copy.deepcopy(model)
    apply(student, cut)
    for pair in describe(model).pairs:
        nn.init.normal_(student.get_submodule(pair.consumer).get_parameter("weight"))
    healer.heal(student, model, images, HealContext(statistics=statistics, pruned=cut))
    for pair in describe(model).pairs:
        mean, keep = statistics[f"{pair.consumer}.input"].mean, cut.keep[pair.producer]
        dense, module = (net.get_submodule(pair.consumer) for net in (model, student))
        mean = mean.clone()
        wanted = F.linear(mean, dense.get_parameter("weight").double(), dense.get_parameter("bias").double())
        found = F.linear(mean[keep], module.get_parameter("weight").double(), module.get_parameter("bias").double())
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kinds", [("qk",), ("v",), ("heads",)])
@pytest.mark.parametrize("pruner", ["snip", "filter_norm"])
def test_a_pruner_that_cannot_rank_attention_is_refused(pruner: str, kinds: tuple[str, ...]) -> None:
    with pytest.raises(MethodError, match=f"pruner {pruner} cannot rank channels of kind {kinds[0]}"):
        heal.recompress(nets.build("vit"), nets.images(4), Budget(neurons=0.5), GlobalVariance(kinds=kinds), pruner, [])


@pytest.mark.parametrize(
    ("healers", "said"),
    [
        (["batchnorm_recalibration", "mean_folding"], "mean_folding stands on the dense running statistics"),
        (["closed_form", "mean_folding"], "leave mean_folding out"),
    ],
)
def test_means_are_not_folded_twice(healers: list[str], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        heal.recompress(nets.build("resnet"), nets.images(4), Budget(neurons=0.5), healers=healers)
