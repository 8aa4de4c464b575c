"""Channels that run from block to block: found, cut, ranked, folded, healed, saved; in every kind of block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import heal
from heal import surgery
from heal.allocators.global_variance import GlobalVariance
from heal.errors import ArchitectureError
from heal.families.family import KINDS
from heal.families.lookup import describe
from heal.healers.batchnorm_recalibration import BatchnormRecalibration
from heal.healers.blockwise import Blockwise
from heal.healers.distill import Distill
from heal.healers.starfish import Starfish
from heal.method import HealContext, check
from heal.pruned import describe_cuts, listed
from heal.pruners.variance import Variance
from heal.states import alignment
from heal.values import ChannelCut
from tests.heal import nets
from tests.heal.nets import _timm, images, randomise
from tests.heal.test_families import _on_meta, outputs_of
from tests.heal.test_surgery import assert_equal_to, random_cut, zero_out

_REGNET = {"w0": 8, "wa": 8, "wm": 2, "depth": 6, "group_size": 4}
_SMALL = {"layers": (1, 2, 1, 1), "channels": (8, 8, 8, 16)}

OWN: dict[str, Callable[[], nn.Module]] = {
    "joined stem": _timm("resnet18", layers=(2, 1, 1, 1), channels=(64, 8, 8, 8)),
    "gated resnet": _timm("seresnet18", **_SMALL),
    "deep stem": _timm("resnet18d", **_SMALL),
    "grouped bottleneck": _timm("resnext50_32x4d", **_SMALL, cardinality=2, base_width=32),
    "regnet": _timm("regnety_002", **_REGNET),
    "ungrouped regnet": _timm("regnety_002", **{**_REGNET, "group_size": 64}),
    "preactivation regnet": _timm("regnetv_040", **_REGNET),
    "regnet without projections": _timm("regnetz_005", **_REGNET),
    "mobilenetv1": _timm("mobilenetv1_100"),
    "mobilenetv4": _timm("mobilenetv4_conv_small_035"),
    "edge residuals": _timm("efficientnet_es"),
    "convnext of convolutions": _timm("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), conv_mlp=True),
}
STREAMS = ("resnet", "bottleneck", "vgg", "mobilenetv2", "mobilenetv3", "efficientnet")

own = pytest.mark.parametrize("net", OWN)
every = pytest.mark.parametrize(
    "net", [pytest.param(net, marks=pytest.mark.slow) if net in nets.KIN else net for net in (*STREAMS, *OWN)]
)


def build(net: str, seed: int = 0) -> nn.Module:
    if net in nets.NETS:
        return nets.build(net, seed)
    model = OWN[net]()
    randomise(model, seed)
    return model.eval()


def cut_of(model: nn.Module, kinds: tuple[str, ...], ratio: float = 0.5, seed: int = 0) -> ChannelCut:
    """Random channels of the groups of these kinds, an MLP's where there are none."""
    family = describe(model)
    groups = family.groups_of(kinds) or family.groups_of(KINDS)
    whole = random_cut(model, ratio, seed, updates=False)
    return ChannelCut({name: whole.keep[name] for name in groups}, {name: whole.total[name] for name in groups})


def twins(model: nn.Module, chosen: ChannelCut) -> tuple[nn.Module, nn.Module]:
    """The same cut, sliced and masked."""
    sliced, masked = copy.deepcopy(model), copy.deepcopy(model)
    surgery.cut(sliced, chosen)
    zero_out(masked, chosen)
    return sliced, masked


@every
def test_a_cut_stream_computes_what_the_masked_one_does(net: str) -> None:
    model = build(net)
    sliced, masked = twins(model, cut_of(model, ("residual",)))
    for size in (32, 48):
        assert_equal_to(sliced, masked, images(2, size=size))
    with torch.no_grad():
        dense, found = model(images(2)), sliced(images(2))
    assert float((dense - found).norm() / dense.norm()) > 1e-3
    assert describe(sliced) == describe(model)


@own
def test_all_kinds_may_be_cut_together_and_again(net: str) -> None:
    model = build(net)
    once, masked = twins(model, cut_of(model, KINDS))
    assert_equal_to(once, masked, images(2))
    twice, masked_twice = twins(once, cut_of(once, KINDS, 0.3, seed=1))
    assert_equal_to(twice, masked_twice, images(2))
    assert describe(twice) == describe(model)


@own
def test_a_single_channel_may_stay(net: str) -> None:
    model = build(net)
    sliced, masked = twins(model, cut_of(model, KINDS, 0.9999))
    assert set(surgery.widths(sliced).values()) == {1}
    assert_equal_to(sliced, masked, images(2))
    assert describe(sliced).cuttable == describe(model).cuttable


@pytest.mark.parametrize("net", ["mobilenetv2", "efficientnet", "gated resnet", "regnet", "preactivation regnet"])
def test_the_law_holds_in_training_mode(net: str) -> None:
    model = build(net)
    sliced, masked = (twin.double().train() for twin in twins(model, cut_of(model, ("residual",))))
    assert_equal_to(sliced, masked, images(8).double())


@every
def test_a_group_names_the_blocks_whose_outputs_carry_it(net: str) -> None:
    """Where nobody reads what was cut, the states of dense and cut network are the same in the channels that stay."""
    model = build(net)
    family, chosen = describe(model), cut_of(model, ("residual",), ratio=0.25)
    sliced, masked = twins(model, chosen)
    named = [block for group in family.cuttable.values() for block in group.blocks]
    assert len(named) == len(set(named)) and set(named) <= set(family.blocks)
    assert min(alignment(sliced, masked, images(4), chosen).values()) > 1 - 1e-5
    with outputs_of(model, family.blocks) as dense, outputs_of(sliced, family.blocks) as cut, torch.no_grad():
        model(images(1)), sliced(images(1))
    assert {block for block in family.blocks if dense[block].shape != cut[block].shape} == set(named)


@pytest.mark.parametrize(
    ("net", "name", "blocks", "inner", "residual"),
    [
        ("joined stem", "resnet", 5, 5, 4),
        ("gated resnet", "resnet", 5, 5, 5),
        ("deep stem", "resnet", 5, 5, 7),
        ("grouped bottleneck", "resnet", 5, 0, 5),
        ("regnet", "regnet", 6, 0, 5),
        ("ungrouped regnet", "regnet", 6, 12, 5),
        ("preactivation regnet", "regnet", 6, 0, 5),
        ("mobilenetv1", "efficientnet", 13, 0, 14),
        ("mobilenetv4", "efficientnet", 18, 12, 8),
        ("edge residuals", "efficientnet", 19, 18, 7),
    ],
)
def test_the_table_has_what_the_network_has(net: str, name: str, blocks: int, inner: int, residual: int) -> None:
    family = describe(build(net))
    found = [len(family.groups_of((kind,))) for kind in ("inner", "residual")]
    assert (family.name, len(family.blocks), *found) == (name, blocks, inner, residual)


def test_the_regnets_layers_and_blocks_are_called_in_their_order() -> None:
    for net in ("regnet", "regnet without projections"):
        model = build(net)
        family = describe(model)
        for names in (family.layers, family.blocks, family.classifier):
            with outputs_of(model, names) as seen, torch.no_grad():
                model(images(2))
            assert tuple(seen) == names


def test_a_stage_that_adds_to_the_stem_begins_there() -> None:
    group = describe(build("joined stem")).cuttable["conv1"]
    assert group.producers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert group.followers == ("bn1", "layer1.0.bn2", "layer1.1.bn2")
    assert group.consumers == ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0")
    assert (group.kind, group.blocks) == ("residual", ("layer1.0", "layer1.1"))


@pytest.mark.parametrize(
    ("name", "kwargs", "missing"),
    [
        ("resnet18", {"global_pool": "catavgmax"}, {"layer4.0.conv2"}),  # two poolings side by side: twice the columns
        ("resnet18", {"num_classes": 0}, {"layer4.0.conv2"}),  # the stream is the answer
        ("resnetblur18", {}, {"conv1"}),  # a blur counts its channels
        ("ecaresnet50d", {}, {"conv1.6", *(f"layer{stage}.0.conv3" for stage in (1, 2, 3, 4))}),  # neighbours mix
    ],
)
def test_a_stream_that_meets_what_is_not_known_is_left_out(name: str, kwargs: dict, missing: set[str]) -> None:  # type: ignore[type-arg]
    """Beside the plain network's groups."""
    plain = "resnet50d" if "50" in name else "resnet18"
    found, all_of_them = (describe(_on_meta(n, **k)).groups_of(("residual",)) for n, k in ((name, kwargs), (plain, {})))
    assert all_of_them.keys() - found.keys() == missing


def recompressed(
    net: str, healers: list[object], budget: float = 0.5, **params: object
) -> tuple[nn.Module, heal.Result]:
    model = build(net)
    allocator = GlobalVariance(**{"kinds": ("residual",), "scope": "layer", **params})  # type: ignore[arg-type]
    asked = heal.Budget(neurons=budget)
    return model, heal.recompress(model, images(16, size=64), asked, allocator, "variance", healers)  # type: ignore[arg-type]


def distance(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((one(x) - other(x)).norm() / other(x).norm())


def test_channels_that_do_not_vary_are_found_and_folded_exactly() -> None:
    """In half of its channels every norm of a stream writes a constant; all readers are pointwise."""
    model = build("bottleneck")
    for at, group in enumerate(describe(model).groups_of(("residual",)).values()):
        for norm in group.followers:
            weight = model.get_parameter(f"{norm}.weight")
            gone = torch.randperm(len(weight), generator=torch.Generator().manual_seed(at))[: len(weight) // 2]
            with torch.no_grad():
                weight[gone] = 0
    allocator = GlobalVariance(kinds=("residual",))
    result = heal.recompress(model, images(8), heal.Budget(neurons=0.5), allocator, "variance", [])
    assert distance(result.model, model, images(4, seed=9)) < 1e-5


@pytest.mark.parametrize("net", ["resnet", "mobilenetv3", "regnet"])
def test_the_closed_form_brings_the_answers_nearer(net: str) -> None:
    dense, cut = recompressed(net, [])
    _, solved = recompressed(net, ["closed_form"])
    fresh = images(16, size=64, seed=5)
    assert distance(solved.model, dense, fresh) < distance(cut.model, dense, fresh)


@pytest.mark.parametrize("net", ["resnet", "mobilenetv2", "preactivation regnet"])
def test_states_are_healed_in_the_channels_that_stay(net: str) -> None:
    healers = [Starfish(epochs=3, batch_size=8, mse=0.1), Blockwise(steps=2, batch_size=8), Distill(epochs=1)]
    _, result = recompressed(net, [*healers, BatchnormRecalibration(batch_size=8)])
    starfish, *_ = result.report.healing
    before, after = (sum(found.values()) for found in (starfish.alignment_before, starfish.alignment_after))
    assert after > before
    assert all(len(report.alignment_after) == len(starfish.alignment_after) for report in result.report.healing)


@pytest.mark.parametrize("net", ["bottleneck", "mobilenetv3", "preactivation regnet"])
def test_a_cut_network_comes_back_from_its_bundle(net: str, tmp_path: Path) -> None:
    kinds = {group.kind for group in describe(build(net)).groups}
    _, result = recompressed(net, ["closed_form"], kinds=tuple(kinds))
    heal.save(result.model, tmp_path / "bundle")
    with torch.no_grad():
        assert torch.equal(heal.load(tmp_path / "bundle")(images(2)), result.model(images(2)))


def test_every_kind_loses_the_same_share_and_the_budget_is_exact() -> None:
    dense, result = recompressed("resnet", ["closed_form"], 0.4, kinds=("inner", "residual"), scope="global")
    family, kept, total = describe(dense), surgery.widths(result.model), surgery.widths(dense)
    for kind in ("inner", "residual"):
        members = family.groups_of((kind,))
        asked = 0.6 * sum(total[name] for name in members)
        assert abs(sum(kept[name] for name in members) - asked) <= 1
    assert sum(kept.values()) == int(0.6 * sum(total.values()) + 0.5)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_widths_are_rounded_within_the_budget(scope: str) -> None:
    dense, result = recompressed("resnet", [], 0.4, multiple=4, scope=scope)
    total = {name: surgery.widths(dense)[name] for name in describe(dense).groups_of(("residual",))}
    kept = {name: surgery.widths(result.model)[name] for name in total}
    assert sum(kept.values()) == int(0.6 * sum(total.values()) + 0.5)
    assert sum(width % 4 > 0 for width in kept.values()) <= 1


def test_a_table_that_does_not_say_which_blocks_carry_a_cut_is_refused() -> None:
    model = build("resnet")
    family = describe(model)
    model.regrow_family = replace(family, groups=tuple(replace(group, blocks=()) for group in family.groups))  # type: ignore[assignment]
    chosen = cut_of(model, ("residual",))
    student, _ = twins(model, chosen)
    with pytest.raises(
        ArchitectureError, match=r"block layer1.0 gives \[.*\] in the student .* `blocks` of the channel"
    ):
        Starfish(epochs=1).heal(student, model, images(4), HealContext(pruned=chosen))


def test_a_network_without_streams_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="no channels of kind residual; it has mlp"):
        check(nets.build("convnext"), heal.Budget(neurons=0.5), GlobalVariance(kinds=("residual",)), Variance(), [])


def test_a_long_group_is_one_short_line() -> None:
    model = _on_meta("resnet50")
    total = {"layer3.0.conv3": 1024}
    (line,) = describe_cuts(model, ChannelCut({"layer3.0.conv3": torch.arange(512)}, total))
    assert line == (
        "layer3.{0..5}.conv3 + layer3.0.downsample.0 -> "
        "layer3.{1..5}.conv1 + layer4.0.conv1 + layer4.0.downsample.0: 512 of 1024"
    )


def test_names_are_listed_as_a_shell_writes_them() -> None:
    assert listed(["b1.fc", "b2.fc"]) == "b{1,2}.fc"
    assert listed(["b1.0.fc", "b2.1.fc"]) == "b1.0.fc + b2.1.fc"
    assert listed(["b1.fc", "c.fc", "b3.fc", "b10.fc"]) == "b{1,3,10}.fc + c.fc"
    assert listed(["conv_pw", "se.conv_expand"]) == "conv_pw + se.conv_expand"
