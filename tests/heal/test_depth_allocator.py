"""Which blocks go: budgets met to one block, scores against a slow reference, the greedy choice against all choices."""

from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import heal
from heal import cost, surgery
from heal.allocators.depth import Depth, influences
from heal.allocators.dropping import Goal
from heal.errors import ArchitectureError, BudgetError, ImagesError, MethodError, NumericalError
from heal.families.lookup import describe
from heal.method import AllocationContext, check
from heal.pruners import PRUNERS
from heal.values import Allocation, Budget, ChannelCut
from tests.heal import nets
from tests.heal.nets import images

CHEAP = Depth(rule="influence", images=4)


def allocated(
    model: nn.Module, budget: Budget, method: Depth = CHEAP, count: int = 6, context: AllocationContext | None = None
) -> Allocation:
    return method.allocate(model, budget, context or AllocationContext(images=images(count)))


def dropped(allocation: Allocation) -> list[str]:
    return [block for block, kept in allocation.kept.items() if not kept]


@pytest.mark.parametrize("net", ["vit", "swin", "convnext", "resnet", "mobilenetv2"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.6, 0.85, 0.99])
def test_a_budget_in_blocks_is_met_to_one_block(net: str, share: float) -> None:
    model = nets.build(net)
    family = describe(model)
    expected = math.floor((1 - share) * len(family.droppable) + 0.5)
    if expected == 0 and len(family.droppable) == len(family.blocks):
        with pytest.raises(BudgetError, match=f"blocks = {share:g} cannot be met: it drops all .* one must stay"):
            allocated(model, Budget(blocks=share))
        return
    if share and expected == len(family.droppable):
        with pytest.raises(BudgetError, match=rf"blocks = {share:g} is no more than half of one of the \d+ blocks"):
            allocated(model, Budget(blocks=share))
        return
    found = allocated(model, Budget(blocks=share))
    assert found.got == found.asked == expected and list(found.kept) == list(family.droppable)
    assert found.budget == {"unit": "blocks", "asked": expected, "got": expected, "total": len(family.droppable)}


@pytest.mark.parametrize("net", ["vit", "swinv2", "mobilenetv3", "efficientnet"])
@pytest.mark.parametrize("rule", ["influence", "greedy"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3])
def test_a_budget_in_macs_takes_the_fewest_blocks_of_its_order(net: str, rule: str, share: float) -> None:
    model, size = nets.build(net), (3, nets.SIZE, nets.SIZE)
    method = Depth(rule=rule, images=2)  # type: ignore[arg-type]
    limit = Budget(macs=share).kept(cost.macs(model, size))

    def left(blocks: list[str]) -> int:
        student = copy.deepcopy(model)
        surgery.drop(student, blocks)
        return cost.macs(student, size)

    try:
        found = allocated(model, Budget(macs=share), method)
    except BudgetError as error:
        assert left(list(describe(model).droppable)) > limit and "MACs are left; remove less" in str(error)
        return
    order = found.evidence["order"]
    assert left(order) == found.evidence["macs"]["got"] <= limit == found.evidence["macs"]["asked"]
    assert not order or left(order[:-1]) > limit
    assert found.budget["unit"] == "macs" and sorted(order) == sorted(dropped(found))


def test_one_block_stays_whatever_the_budget() -> None:
    model = nets.build("vit")
    with pytest.raises(BudgetError, match=r"macs = 0\.9 .* without 2 of the 3 blocks that can go, \d+ of \d+ MACs"):
        allocated(model, Budget(macs=0.9))
    assert len(dropped(allocated(nets.build("resnet"), Budget(blocks=0.99)))) == 1, "the others of a ResNet stay"


def test_the_last_block_in_the_order_may_be_the_dear_one() -> None:
    """What some choice meets is no promise of this order: it is refused once the order is known."""
    model = nets.build("swin")
    goal = Goal.of(model, Budget(blocks=0.0), AllocationContext())
    assert goal.first(goal.blocks) == []
    narrow = Goal(Budget(blocks=0.9), goal.blocks, goal.most, 0, None)
    with pytest.raises(BudgetError, match="drops all 4 blocks"):
        narrow.first(goal.blocks)


@pytest.mark.parametrize("net", ["vit", "swin", "convnext", "mobilenetv2"])
def test_influence_is_one_minus_the_mean_cosine_of_tokens(net: str) -> None:
    """By hand: image after image, token after token, in numpy."""
    model, batch = nets.build(net), images(3)
    family = describe(model)
    found = influences(model, family.droppable, family.states, batch)
    for block in family.droppable:
        cosines = []
        for image in batch:
            states = nets.passing(model, block, image.unsqueeze(0))
            before, after = (
                (x if family.states == "tokens" else x.permute(0, 2, 3, 1)).flatten(0, -2).double().numpy()
                for x in states
            )
            for x, y in zip(before, after, strict=True):
                cosines.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        assert found[block] == pytest.approx(1 - np.mean(cosines), abs=1e-6)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_blocks_of_least_influence_go() -> None:
    model = nets.build("mobilenetv2")
    found = allocated(model, Budget(blocks=0.4))
    (scores,) = found.evidence["scores"]
    assert found.evidence["order"] == sorted(scores, key=scores.get)[:4]
    assert scores == influences(model, describe(model).droppable, "maps", images(4)), "the first four images judge"


def test_a_block_that_does_nothing_goes_first() -> None:
    model = nets.build("vit")
    for part in ("attn.proj", "mlp.fc2"):
        for parameter in model.get_submodule(f"blocks.1.{part}").parameters():
            nn.init.zeros_(parameter)
    for method in (CHEAP, Depth(images=4)):
        found = allocated(model, Budget(blocks=0.34), method)
        assert dropped(found) == ["blocks.1"]
        assert found.evidence["scores"][0]["blocks.1"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("net", ["vit", "swin", "efficientnet"])
def test_greedy_takes_the_block_that_costs_least_among_all_again_and_again(net: str) -> None:
    model, batch = nets.build(net), images(5)
    blocks = describe(model).droppable
    found = allocated(model, Budget(blocks=0.6), Depth(images=5), count=7)

    def harm(gone: tuple[str, ...]) -> float:
        student = copy.deepcopy(model)
        surgery.cut(student, ChannelCut({}, {}, dropped=gone))
        with torch.no_grad():
            p, q = (network(batch).double().log_softmax(-1) for network in (model, student))
        return float((p.exp() * (p - q)).sum(-1).mean())

    order: list[str] = []
    for scores in found.evidence["scores"]:
        expected = {block: harm((*order, block)) for block in blocks if block not in order}
        assert scores == pytest.approx(expected, rel=1e-3, abs=1e-7)
        order.append(min(expected, key=expected.__getitem__))
    assert order == found.evidence["order"] and sorted(order) == sorted(dropped(found))
    alone = min(itertools.combinations(blocks, 1), key=harm)
    assert order[0] == alone[0]


@pytest.mark.parametrize("rule", ["influence", "greedy"])
def test_the_same_again_as_plain_json_and_the_model_untouched(rule: str) -> None:
    model = nets.build("swin").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [*map(id, model.modules())]
    method = Depth(rule=rule, images=4)  # type: ignore[arg-type]
    seen: list[tuple[str, int, int]] = []
    context = AllocationContext(images=images(6), report=lambda *step: seen.append(step))
    first, again = (allocated(model, Budget(blocks=0.5), method, context=c) for c in (context, None))
    assert first == again and json.loads(json.dumps(first.evidence, allow_nan=False)) == first.evidence
    assert [*map(id, model.modules())] == modules and all(module.training for module in model.modules())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    if rule == "greedy":
        assert seen == [("depth, block 1", i, 4) for i in (1, 2, 3, 4)] + [("depth, block 2", i, 3) for i in (1, 2, 3)]


def test_batches_choose_what_a_tensor_does() -> None:
    model = nets.build("vit")
    for method in (CHEAP, Depth(images=4)):
        whole, batches = (
            method.allocate(model, Budget(blocks=0.5), AllocationContext(images=given))
            for given in (images(6), list(images(6).split(3)))
        )
        assert whole.kept == batches.kept


@pytest.mark.parametrize(
    ("params", "match"),
    [({"rule": "gredy"}, "depth.rule = 'gredy' is unknown"), ({"images": 0}, "images = 0 must be at least 1")],
)
def test_params_that_mean_nothing_are_refused(params: dict[str, object], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        Depth(**params)  # type: ignore[arg-type]


def test_without_images_or_with_broken_weights_it_is_refused() -> None:
    with pytest.raises(ImagesError, match="depth tries its candidates on calibration images"):
        Depth().allocate(nets.build("vit"), Budget(blocks=0.5), AllocationContext())
    model = nets.build("vit")
    nn.init.constant_(model.get_parameter("blocks.1.mlp.fc1.bias"), float("nan"))
    for method in (Depth(images=2), Depth(rule="influence", images=2)):
        with pytest.raises(NumericalError, match="not finite"):
            allocated(model, Budget(blocks=0.5), method)


@pytest.mark.parametrize(
    ("net", "budget", "allocator", "pruner", "healers", "reason"),
    [
        ("vit", Budget(blocks=0.5), "global_variance", "depth", [], "allocator global_variance works on neurons"),
        ("vit", Budget(blocks=0.5), "depth", "variance", [], "pruner variance works on neurons, but the budget is in"),
        ("vit", Budget(neurons=0.5), "depth", "depth", [], "allocator depth works on blocks"),
        ("vit", Budget(macs=0.3), "depth", "variance", [], "pruner variance works on neurons, but the allocator works"),
        ("vit", Budget(blocks=0.5), "depth", "depth", ["closed_form"], "healer closed_form works on neurons"),
        ("vit", Budget(blocks=0.5), "depth", "depth", ["unipts"], "healer unipts works on weights"),
        ("vit", Budget(blocks=0.5), "depth", "depth", ["batchnorm_recalibration"], "works on BatchNorms"),
        ("vit", Budget(blocks=0.5), "depth", "none", ["starfish"], "leaves nothing to heal"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(
    net: str, budget: Budget, allocator: str, pruner: str, healers: list[str], reason: str
) -> None:
    with pytest.raises(MethodError if "BatchNorms" not in reason else ArchitectureError, match=reason):
        heal.recompress(nets.build(net), images(4), budget, allocator, pruner, healers)


def test_a_network_of_which_no_block_can_go_is_refused_before_anything_runs() -> None:
    with pytest.raises(ArchitectureError, match=r"VGG \(family vgg\) has no block that adds"):
        check(nets.build("vgg"), Budget(blocks=0.5), CHEAP, PRUNERS["depth"](), [])


def test_half_a_budget_of_another_unit_is_no_budget() -> None:
    with pytest.raises(BudgetError, match="names exactly one unit of weights, neurons, blocks, macs"):
        Budget(blocks=0.5, macs=0.5)
    with pytest.raises(BudgetError, match="in weights, neurons or blocks, not 'macs'"):
        Allocation("macs", {}, {}, 0)
    assert Budget(macs=0.5).removes("blocks") == "blocks"
