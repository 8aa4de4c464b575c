"""Healing after blocks went: states of those that stay are compared, and only what is there is repaired."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import heal
from heal.allocators.depth import Depth
from heal.families.lookup import describe
from heal.healers.batchnorm_recalibration import BatchnormRecalibration
from heal.healers.blockwise import Blockwise
from heal.healers.distill import Distill
from heal.healers.starfish import Starfish
from heal.healers.variance_matching import VarianceMatching
from heal.images import Replay, generator
from heal.method import HealContext, Healer
from heal.pruned import apply, goals, left
from heal.states import TeacherStates, alignment
from heal.values import Budget, ChannelCut
from tests.heal import nets
from tests.heal.nets import images
from tests.heal.test_depth import build

HEALERS: dict[str, Healer] = {
    "starfish": Starfish(epochs=3, batch_size=4),
    "starfish by depth": Starfish(epochs=3, batch_size=4, depth=1.0, kl=0.1, mse=0.1, affine=True),
    "blockwise": Blockwise(steps=4, batch_size=4),
    "distill": Distill(epochs=2, batch_size=4),
    "variance_matching": VarianceMatching(),
    "batchnorm_recalibration": BatchnormRecalibration(),  # the last, for networks that have BatchNorms
}


def shallower(net: str, *dropped: str) -> tuple[nn.Module, nn.Module, HealContext]:
    """(dense, its student, the context of healing)."""
    dense = build(net)
    pruned = ChannelCut({}, {}, dropped=dropped or describe(dense).droppable[1:2] or describe(dense).droppable)
    student = copy.deepcopy(dense)
    apply(student, pruned)
    return dense, student, HealContext(pruned=pruned)


def states(model: nn.Module, blocks: tuple[str, ...], batch: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [nets.passing(model, block, batch)[1] for block in blocks]


@pytest.mark.parametrize(
    ("net", "healer"),
    [
        *((net, healer) for net in ("resnet", "mobilenetv3", "regnet") for healer in HEALERS),
        *((net, healer) for net in ("vit", "swinv2", "convnext", "layer scale") for healer in list(HEALERS)[:-1]),
    ],
)
def test_healers_compare_and_repair_the_blocks_that_stay(net: str, healer: str) -> None:
    dense, student, context = shallower(net)
    assert isinstance(context.pruned, ChannelCut)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    report = HEALERS[healer].heal(student, dense, images(8), context)
    assert list(report.alignment_after) == [b for b in describe(dense).blocks if b not in context.pruned.dropped]
    assert student.state_dict().keys() == before.keys() and describe(student) == left(dense, context.pruned)
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(tensor.isfinite().all() for tensor in student.state_dict().values() if tensor.is_floating_point())


@pytest.mark.parametrize("net", ["vit", "swin", "convnext", "bottleneck"])
def test_starfish_brings_a_shallow_network_nearer_to_the_dense_one(net: str) -> None:
    dense, student, context = shallower(net)
    with torch.no_grad():
        wanted, before = dense(images(16)), student(images(16))
    report = Starfish(epochs=10, batch_size=8, lr=1e-3, precision="float32").heal(student, dense, images(16), context)
    with torch.no_grad():
        assert (student(images(16)) - wanted).norm() < (before - wanted).norm()
    assert sum(report.alignment_after.values()) > sum(report.alignment_before.values())
    assert report.losses[-1] < report.losses[0]


@pytest.mark.parametrize("exponent", [0.0, 2.0])
def test_starfishs_loss_is_over_the_blocks_that_stay(exponent: float) -> None:
    dense, student, context = shallower("vit", "blocks.1")
    blocks, batch = ("blocks.0", "blocks.2"), images(4)
    apart = [
        float(1 - F.cosine_similarity(ours, theirs, dim=-1).mean())
        for ours, theirs in zip(states(student, blocks, batch), states(dense, blocks, batch), strict=True)
    ]
    shares = [1.0, 2.0**exponent]
    expected = sum(s * a for s, a in zip(shares, apart, strict=True)) / sum(shares)
    healer = Starfish(epochs=1, batch_size=4, precision="float32", depth=exponent)
    report = healer.heal(student, dense, batch, context)
    assert report.losses[0] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_alignment_and_cached_states_leave_out_what_was_dropped() -> None:
    dense, student, context = shallower("convnext", "stages.2.blocks.1", "stages.0.blocks.0")
    stay = ("stages.1.blocks.0", "stages.2.blocks.0", "stages.3.blocks.0")
    found = alignment(student, dense, images(4), context.pruned)
    for block, ours, theirs in zip(stay, states(student, stay, images(4)), states(dense, stay, images(4)), strict=True):
        rows = F.cosine_similarity(ours.flatten(1), theirs.flatten(1), dim=-1)
        assert found[block] == pytest.approx(float(rows.mean()), abs=1e-5)
    cached = TeacherStates(dense, Replay(images(4), 4), 2**20, 0, lambda _: None, context.pruned)
    assert tuple(found) == tuple(cached.of(0, images(4)).units) == stay


def test_where_the_last_blocks_went_the_last_that_stays_gives_what_they_gave() -> None:
    """Every state before the gap is the dense one: compared with those alone, there would be nothing to heal."""
    dense, student, context = shallower("vit", "blocks.1", "blocks.2")
    assert goals(dense, context.pruned) == {"blocks.0": "blocks.2"}
    (ours,), (theirs,) = states(student, ("blocks.0",), images(4)), states(dense, ("blocks.2",), images(4))
    expected = float(F.cosine_similarity(ours, theirs, dim=-1).mean())
    assert alignment(student, dense, images(4), context.pruned) == {"blocks.0": pytest.approx(expected, abs=1e-5)}
    with torch.no_grad():
        before = float((student(images(16)) - dense(images(16))).norm())
    for healer in (Starfish(epochs=10, batch_size=8, lr=1e-3), Blockwise(steps=40, batch_size=8, lr=1e-3)):
        healed = copy.deepcopy(student)
        report = healer.heal(healed, dense, images(16), context)
        assert report.alignment_after["blocks.0"] > report.alignment_before["blocks.0"] + 0.01
        with torch.no_grad():
            assert float((healed(images(16)) - dense(images(16))).norm()) < before


def test_where_a_whole_last_stage_went_what_stands_there_is_compared() -> None:
    dense, student, context = shallower("swin", "layers.1.blocks.0", "layers.1.blocks.1")
    last = "layers.1.blocks.1"
    first = ("layers.0.blocks.0", "layers.0.blocks.1")
    assert goals(dense, context.pruned) == {name: name for name in (*first, last)}
    for healer in (Starfish(epochs=5, batch_size=4, lr=1e-3), Blockwise(steps=2, batch_size=4)):
        report = healer.heal(student, dense, images(8), context)
        assert list(report.alignment_after) == [*first, last]


def test_goals_are_the_blocks_themselves_where_the_last_one_stays() -> None:
    dense, _, context = shallower("mobilenetv3")
    stay = left(dense, context.pruned).blocks
    assert goals(dense, context.pruned) == dict(zip(stay, stay, strict=True))
    assert goals(nets.build("vgg"), None) == {name: name for name in describe(nets.build("vgg")).blocks}


def test_blockwise_is_a_loop_over_the_blocks_that_stay() -> None:
    dense, student, context = shallower("vit", "blocks.1")
    batch, expected = images(8), copy.deepcopy(student)
    for block in ("blocks.0", "blocks.2"):
        module = expected.get_submodule(block)
        optimiser = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 4)
        numbers = torch.randint(2, (4,), generator=generator(0, f"blockwise batches of {block}")).tolist()
        for number in numbers:
            some = batch[4 * number : 4 * number + 4]
            (entered, _), (_, wanted) = (nets.passing(net, block, some) for net in (expected, dense))
            loss = (module(entered) - wanted).square().mean() / wanted.square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    Blockwise(steps=4, batch_size=4, lr=1e-3).heal(student, dense, batch, context)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_variance_matching_gives_the_norms_that_stay_their_dense_moments() -> None:
    dense, student, context = shallower("layer scale", "blocks.1")
    VarianceMatching().heal(student, dense, images(8), context)
    for norm in describe(student).norms:
        (_, theirs), (_, ours) = (nets.passing(net, norm, images(8)) for net in (dense, student))
        for moment in (Tensor.mean, Tensor.std):
            torch.testing.assert_close(
                moment(ours.flatten(0, -2), 0), moment(theirs.flatten(0, -2), 0), rtol=0.02, atol=0.02
            )


def test_healers_follow_one_another_and_the_report_says_what_went() -> None:
    model = nets.build("mobilenetv3")
    healers = [VarianceMatching(), Blockwise(steps=2, batch_size=4), Starfish(epochs=1, batch_size=4)]
    result = heal.recompress(model, images(8), Budget(blocks=0.5), Depth("influence"), "depth", healers)
    assert isinstance(result.pruned, ChannelCut) and not result.pruned.keep
    assert result.report.cuts == tuple(f"{block}: dropped" for block in result.pruned.dropped)
    assert result.report.allocation.got == 4 and len(result.pruned.dropped) == 3
    assert describe(result.model) == describe(model).without(result.pruned.dropped)
    again = heal.recompress(result.model, images(8), Budget(blocks=0.5), Depth("influence"), "depth", ["starfish"])
    assert len(describe(again.model).droppable) == 2
