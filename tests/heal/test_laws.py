"""What holds of every method in the dictionaries on every family; a new entry is tested by being there."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import heal
from heal.allocators import ALLOCATORS
from heal.errors import ArchitectureError, BudgetError, InputError
from heal.families.lookup import describe
from heal.healers import HEALERS
from heal.method import AllocationContext, HealContext, check, taps
from heal.pruned import apply
from heal.pruners import PRUNERS
from heal.statistics import capture
from heal.surgery import widths
from heal.values import Budget, Mask
from tests.heal import nets
from tests.heal.entries import BUDGETS, combinations, quick, small


@pytest.mark.parametrize("healer", HEALERS)
@pytest.mark.parametrize("net", nets.EVERY)
def test_the_laws_hold(net: str, healer: str) -> None:
    dense, images = nets.build(net), nets.images(4)
    before = _state(dense)
    for budget, allocator, pruner in combinations(dense, healer):
        try:
            first, again = (
                heal.recompress(dense, images, budget, allocator, pruner, [quick(healer)]) for _ in range(2)
            )
        except ArchitectureError as error:
            assert net == "swinv2" and "nothing passed layers.0.blocks.0.attn.qkv" in str(error)
            continue
        assert _same(_state(first.model), _state(again.model)), "the same seed gives the same bits"
        assert _same(_state(dense), before), "the dense model is only read"
        assert all(tensor.isfinite().all() for tensor in _state(first.model).values() if tensor.is_floating_point())
        allocation = first.report.allocation
        assert sum(allocation.kept.values()) == budget.kept(sum(allocation.total.values())), "the budget is exact"
        if type(pruner) is PRUNERS["none"]:
            assert _same(_state(first.model), before), "nothing was pruned"
        elif isinstance(first.pruned, Mask):
            assert first.pruned.keep.keys() == allocation.kept.keys()
            for layer, keep in first.pruned.keep.items():
                weight = first.model.get_submodule(layer).get_parameter("weight")
                assert int(keep.sum()) == allocation.kept[layer], "the allocation is met layer by layer"
                assert not weight[~keep].any(), "what is masked stays zero"
        elif budget.unit == "blocks":
            assert set(first.pruned.dropped) == {block for block, kept in allocation.kept.items() if not kept}
            assert describe(first.model) == describe(dense).without(first.pruned.dropped)
        else:
            found = widths(first.model)
            assert {layer: found[layer] for layer in allocation.kept} == dict(allocation.kept)


@pytest.mark.parametrize("healer", sorted(set(HEALERS) - {"none"}))
@pytest.mark.parametrize("net", ["vit", "convnext", "resnet", "mobilenetv2"])
def test_the_teacher_is_only_read_and_no_hook_stays(net: str, healer: str) -> None:
    teacher, images = nets.build(net), nets.images(4)
    before, modes = _state(teacher), _modes(teacher)
    for budget, allocator, pruner in combinations(teacher, healer):
        wanted = taps(teacher, [allocator, pruner, quick(healer)])
        statistics = capture(teacher, images, wanted)
        context = AllocationContext(statistics=statistics, images=images)
        pruned = pruner.prune(teacher, allocator.allocate(teacher, budget, context), statistics)
        for breaks in (None, RuntimeError("the progress is drawn no more")):
            student = copy.deepcopy(teacher)
            apply(student, pruned)
            _heal(healer, student, teacher, images, HealContext(statistics=statistics, pruned=pruned), breaks)
            assert _same(_state(teacher), before) and _modes(teacher) == modes
            assert not _hooks(student) and not _hooks(teacher)


def _heal(
    name: str, student: nn.Module, teacher: nn.Module, images: Tensor, context: HealContext, breaks: Exception | None
) -> None:
    """Heal, or break off where progress is reported; a healer that reports none runs to its end."""

    def report(stage: str, done: int, total: int) -> None:
        if breaks is not None:
            raise breaks

    try:
        quick(name).heal(student, teacher, images, dataclasses.replace(context, report=report))
    except RuntimeError as error:
        assert error is breaks


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()] + [p.requires_grad for p in model.parameters()]


def _hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("net", nets.EVERY)
def test_every_allocation_meets_its_budget(net: str, allocator: str) -> None:
    dense, images = nets.build(net), nets.images(8)
    before = _state(dense)
    for budget in (Budget(weights=0.5),) if allocator == "n_of_m" else (*BUDGETS, Budget(macs=0.6)):
        method = small(allocator)
        try:
            check(dense, budget, method, PRUNERS["none"](), [])
        except InputError:
            continue
        statistics = capture(dense, images, taps(dense, [method]))
        context = AllocationContext(statistics=statistics, images=images)
        try:
            first = method.allocate(dense, budget, context)
        except BudgetError:
            narrow = budget.unit == "macs" and method.unit != "weights"
            assert allocator == "uniform_plus" or narrow, "only protected ends, and what is not cut, exceed a budget"
            continue
        if budget.unit != "weights":
            assert first == method.allocate(dense, budget, context), "the same seed gives the same allocation"
        if budget.unit == "macs" and first.unit != "weights":
            assert first.evidence["macs"]["got"] <= first.evidence["macs"]["asked"] and first.got == first.asked
            continue
        assert first.asked == budget.kept(first.whole)
        slack = 1 if budget.unit != "macs" else max(first.cost.values())
        assert 0 <= first.asked - first.got < slack, "the budget is met to one weight"
        assert _same(_state(dense), before), "the dense model is only read"


@pytest.mark.parametrize("net", nets.NETS)
def test_a_combination_makes_sense_or_is_refused_before_anything_is_computed(net: str) -> None:
    model = nets.build(net)
    tried = [combination for healer in HEALERS for combination in combinations(model, healer)]
    assert any(budget.unit == "weights" for budget, _, _ in tried), "every network can be masked"
    assert any(budget.unit == "neurons" for budget, _, _ in tried) == bool(describe(model).cuttable)
    assert any(budget.unit == "blocks" for budget, _, _ in tried) == bool(describe(model).droppable)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
