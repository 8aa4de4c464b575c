"""Whole blocks go: found, dropped as if they added nothing, described, saved, and cut again."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import heal
from heal import bundle, bundle_format, cost, surgery
from heal.allocators.depth import Depth
from heal.architecture import Architecture
from heal.errors import ArchitectureError, BundleError
from heal.families.family import Family, MlpPair
from heal.families.lookup import describe
from heal.families.skips import Dropped
from heal.healers.starfish import Starfish
from heal.masking import keep_largest
from heal.method import refuse_unit
from heal.pruned import apply, describe_cuts
from heal.values import ChannelCut, Mask
from tests.heal import nets
from tests.heal.bundles import assert_same_model, recipe
from tests.heal.nets import _timm, images, randomise
from tests.heal.test_residual_channels import OWN
from tests.heal.test_surgery import assert_equal_to, random_cut, zero_out

_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
KINDS: dict[str, Callable[[], nn.Module]] = {
    **nets.NETS,
    **OWN,
    "layer scale": _timm("deit3_small_patch16_224", **_VIT),
    "norm behind": _timm("vit_base_patch16_18x2_224", **_VIT),
    "hybrid": _timm("mobilenetv4_hybrid_medium"),
    "silu": _timm("resnet18", layers=(1, 2, 1, 1), channels=(8, 8, 8, 16), act_layer="silu"),
}
NONE = ("vgg", "preactivation regnet", "mobilenetv1", "silu")
FIXED = ("vit", "deit", "swin", "swinv2", "layer scale", "norm behind")
LARGE = ("hybrid", "edge residuals")
able = pytest.mark.parametrize("net", [net for net in KINDS if net not in NONE])
able_and_small = pytest.mark.parametrize(
    "net", [pytest.param(net, marks=pytest.mark.slow) if net in LARGE else net for net in KINDS if net not in NONE]
)
SEVERAL = ("Block", "SwinTransformerBlock", "SwinTransformerV2Block", "ParallelThingsBlock", "MobileAttention")
LAST = {  # of every branch of those, of others what comes last of what is there
    "Block": ("attn.proj", "mlp.fc2"),
    "SwinTransformerBlock": ("attn.proj", "mlp.fc2"),
    "SwinTransformerV2Block": ("norm1", "norm2"),
    "ParallelThingsBlock": ("attns.0.attn.proj", "attns.1.attn.proj", "ffns.0.mlp.fc2", "ffns.1.mlp.fc2"),
    "MobileAttention": ("conv_cpe_dw", "layer_scale"),
    "ConvNeXtBlock": ("mlp.fc2",),
    "BasicBlock": ("bn2",),
    "Bottleneck": ("bn3", "conv3.bn"),
    "ConvBnAct": ("bn1",),
    "DepthwiseSeparableConv": ("bn2",),
    "InvertedResidual": ("bn3",),
    "EdgeResidual": ("bn2",),
    "UniversalInvertedResidual": ("pw_proj.bn", "dw_end.bn", "layer_scale"),
}


def build(net: str, seed: int = 0) -> nn.Module:
    model = KINDS[net]()
    randomise(model, seed)
    return model.eval()


def silence(model: nn.Module, block: str) -> None:
    """The branches of a block add zero: the weights and biases of what comes last in them are zero."""
    module = model.get_submodule(block)
    ends = LAST[type(module).__name__]
    found = [part for path in ends if (part := _part(module, path)) is not None and list(part.parameters())]
    for part in found if type(module).__name__ in SEVERAL else found[-1:]:
        for parameter in part.parameters():
            nn.init.zeros_(parameter)


def _part(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def shallow(net: str, share: float = 0.5) -> tuple[nn.Module, nn.Module, tuple[str, ...]]:
    """The dense network, the same with every other droppable block gone (at least one), and their names."""
    model = build(net)
    dropped = describe(model).droppable[:: round(1 / share)]
    student = copy.deepcopy(model)
    surgery.cut(student, ChannelCut({}, {}, dropped=dropped))
    return model, student, dropped


@able
def test_a_network_without_a_block_computes_as_if_the_block_added_nothing(net: str) -> None:
    model, student, dropped = shallow(net)
    silent = copy.deepcopy(model)
    for block in dropped:
        silence(silent, block)
    for size in (32,) if net in FIXED else (32, 48):
        assert_equal_to(student, silent, images(2, size))
    with torch.no_grad():
        assert float((model(images(2)) - student(images(2))).norm()) > 1e-4 * float(model(images(2)).norm())


@able_and_small
def test_every_block_alone_can_go(net: str) -> None:
    model = build(net)
    for block in describe(model).droppable:
        student, silent = copy.deepcopy(model), copy.deepcopy(model)
        surgery.drop(student, [block])
        silence(silent, block)
        with torch.no_grad():
            torch.testing.assert_close(student(images(2)), silent(images(2)), rtol=1e-4, atol=1e-5)


@able
def test_what_is_left_is_described_as_the_table_says(net: str) -> None:
    model, student, dropped = shallow(net)
    table = describe(model)
    assert describe(student) == table.without(dropped) != table
    assert not set(dropped) & set(describe(student).blocks)
    assert cost.parameters(student) < cost.parameters(model)
    assert cost.macs(student, (3, 32, 32)) < cost.macs(model, (3, 32, 32))


@pytest.mark.parametrize("net", NONE)
def test_blocks_that_do_more_than_add_to_their_input_stay(net: str) -> None:
    model = build(net)
    assert describe(model).droppable == ()
    with pytest.raises(ArchitectureError, match="has no block that adds what it computes to its input"):
        refuse_unit(model, "blocks")


def test_the_first_block_of_a_stage_stays() -> None:
    assert describe(build("resnet")).droppable == ("layer2.1",)
    assert describe(build("joined stem")).droppable == ("layer1.0", "layer1.1")


@pytest.mark.parametrize("net", ["vit", "swinv2", "convnext", "bottleneck", "mobilenetv3", "mobilenetv4", "regnet"])
def test_channels_and_blocks_go_at_once_or_one_after_the_other(net: str) -> None:
    model, drops_first, dropped = shallow(net)
    channels = random_cut(drops_first, 0.5, updates=False)
    masked = copy.deepcopy(model)
    zero_out(masked, channels, describe(model).without(dropped))
    for block in dropped:
        silence(masked, block)
    surgery.cut(drops_first, channels)
    cuts_first = copy.deepcopy(model)
    surgery.cut(cuts_first, random_cut(cuts_first, 0.5, seed=1, updates=False))
    expected = copy.deepcopy(cuts_first)
    surgery.drop(cuts_first, dropped)
    for block in dropped:
        silence(expected, block)
    at_once = copy.deepcopy(model)
    surgery.cut(at_once, ChannelCut(channels.keep, channels.total, dropped=dropped))
    assert_equal_to(drops_first, masked, images(2))
    assert_equal_to(at_once, masked, images(2))
    assert_equal_to(cuts_first, expected, images(2))


@able_and_small
def test_a_shallow_network_comes_back_from_its_bundle(net: str, tmp_path: Path) -> None:
    _, student, dropped = shallow(net)
    if net in ("vit", "resnet", "mobilenetv3", "regnet"):
        surgery.cut(student, random_cut(student, 0.5, updates=False))
    heal.save(student, tmp_path, architecture=recipe(net))
    assert tuple(bundle.read(tmp_path)["dropped"]) == dropped
    again = heal.load(tmp_path)
    assert_same_model(again, student)
    assert describe(again) == describe(student)
    assert "## Blocks that were dropped" in (tmp_path / "README.md").read_text()
    with pytest.raises(BundleError, match="plain timm cannot open this model: it lacks blocks"):
        bundle.export_dense(tmp_path, tmp_path / "dense")


def test_only_a_bundle_that_lacks_blocks_is_of_the_second_version(tmp_path: Path) -> None:
    """Else its digest, by which a registry knows it, would change; and an older reader must not build it whole."""
    model = build("vit")
    for name, dropped in (("whole", ()), ("shallow", ("blocks.1",))):
        surgery.drop(model, dropped)
        heal.save(model, tmp_path / name)
        description = json.loads((tmp_path / name / "bundle.json").read_text())
        assert (description["version"], description.get("dropped")) == ((2, ["blocks.1"]) if dropped else (1, None))
        assert_same_model(heal.load(tmp_path / name), model)


@pytest.mark.parametrize(("dropped", "match"), [(["blocks.9"], "no block 'blocks.9'"), ([1], "are not all strings")])
def test_a_bundle_that_drops_what_is_not_there_is_refused(dropped: list[object], match: str, tmp_path: Path) -> None:
    heal.save(build("vit"), tmp_path)
    description = json.loads((tmp_path / "bundle.json").read_text()) | {"dropped": dropped}
    (tmp_path / "bundle.json").write_bytes(bundle_format.dumps(description))
    with pytest.raises((ArchitectureError, BundleError), match=match):
        heal.load(tmp_path)


def test_a_mask_of_a_shallow_network_holds_in_its_bundle(tmp_path: Path) -> None:
    _, student, _ = shallow("vit")
    weights = {layer: student.get_parameter(f"{layer}.weight").detach() for layer in describe(student).layers}
    mask = Mask({layer: keep_largest(w.abs(), w.numel() // 4) for layer, w in weights.items()})
    apply(student, mask)
    heal.save(student, tmp_path, mask=mask)
    assert_same_model(heal.load(tmp_path), student)


@pytest.mark.parametrize(
    ("dropped", "match"),
    [
        (("blocks.1.mlp",), r"no block 'blocks\.1\.mlp' that adds what it computes .* did you mean 'blocks\.1'"),
        (("blocks.0", "stem"), "no block 'stem'"),
        (("",), "no block ''"),
    ],
)
def test_what_is_no_droppable_block_is_refused_and_nothing_changes(dropped: tuple[str, ...], match: str) -> None:
    model = build("vit")
    before = describe(model)
    with pytest.raises(ArchitectureError, match=match):
        surgery.cut(model, ChannelCut({}, {}, dropped=dropped))
    assert describe(model) == before
    with pytest.raises(ArchitectureError, match="it has none that do"):
        surgery.drop(build("vgg"), ["features.6"])


def test_a_cut_says_nothing_of_channels_in_a_dropped_block() -> None:
    model, dropped = build("vit"), ("blocks.1",)
    chosen = ChannelCut({"blocks.1.mlp.fc1": torch.arange(4)}, {"blocks.1.mlp.fc1": 128}, dropped=dropped)
    with pytest.raises(ArchitectureError, match=r"no channel group 'blocks\.1\.mlp\.fc1'"):
        surgery.cut(model, chosen)
    assert len(describe(model).blocks) == 3
    with pytest.raises(ValueError, match="names a block twice: a, a"):
        ChannelCut({}, {}, dropped=("a", "a"))


def test_a_cut_prints_the_blocks_that_go() -> None:
    model = build("vit")
    chosen = ChannelCut({"blocks.0.mlp.fc1": torch.arange(4)}, {"blocks.0.mlp.fc1": 128}, dropped=("blocks.2",))
    assert describe_cuts(model, chosen) == (
        "blocks.0.mlp.fc1 -> blocks.0.mlp.fc2: 4 of 128",
        "blocks.2: dropped",
    )
    assert chosen.removed == 125


class Step(nn.Module):
    """A block of a network that no family knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.down(self.act(self.up(x)))
        return added


class Steps(nn.Module):
    """Brings its own table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 10)
        self.steps = nn.ModuleList(Step() for _ in range(4))
        names = tuple(f"steps.{i}" for i in range(4))
        self.regrow_family = Family(
            "steps",
            tuple(f"{name}.{part}" for name in names for part in ("up", "down")),
            names,
            tuple(MlpPair(f"{name}.up", f"{name}.act", f"{name}.down") for name in names),
            classifier=("head",),
            states="tokens",
            droppable=names,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        for step in self.steps:
            x = step(x)
        answer: Tensor = self.head(x.mean(1))
        return answer


def test_a_table_of_ones_own_names_what_can_be_dropped(tmp_path: Path) -> None:
    adapter = Architecture("adapter", "tests.heal.test_depth:Steps")
    model = adapter.build([adapter.name])
    table = describe(model)
    student = heal.recompress(model, images(4), heal.Budget(blocks=0.5), "depth", "depth", [Starfish(epochs=1)]).model
    assert len(describe(student).blocks) == 2 and describe(model) == table
    again = heal.recompress(student, images(4), heal.Budget(neurons=0.5), healers=["closed_form"]).model
    heal.save(again, tmp_path)
    assert_same_model(heal.load(tmp_path, allow_adapters=[adapter.name]), again)
    with pytest.raises(ArchitectureError, match="droppable names 'head', which is none of its blocks"):
        Family("steps", (), ("steps.0",), droppable=("head",))


@pytest.mark.parametrize("rule", ["greedy", "influence"])
def test_a_table_that_names_a_block_of_another_shape_is_refused_by_name(rule: str) -> None:
    model = Steps()
    model.stem, model.steps[0] = nn.Conv2d(3, 4, 8, 8), nn.Linear(4, 8)
    model.regrow_family = replace(model.regrow_family, layers=(), pairs=())
    with pytest.raises(ArchitectureError, match=r"steps\.0 takes \[1, 16, 4\] and gives \[1, 16, 8\]"):
        heal.recompress(
            model,
            images(4),
            heal.Budget(blocks=0.5),
            Depth(rule=rule),
            "depth",
            ["none"],  # type: ignore[arg-type]
        )


def test_a_dropped_block_takes_what_timm_hands_on() -> None:
    x = torch.ones(2, 3)
    assert Dropped()(x, attn_mask=None, is_causal=True) is x
    _, student, _ = shallow("vit")
    tokens = student.forward_features(images(2), attn_mask=torch.ones(17, 17, dtype=torch.bool))  # type: ignore[operator]
    torch.testing.assert_close(tokens, student.forward_features(images(2)))  # type: ignore[operator]
