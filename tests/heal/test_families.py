"""What the tables say is true of the networks: names, order, what is called, what learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from heal.channels import pool
from heal.compat import timm
from heal.errors import ArchitectureError
from heal.families.family import HIDDEN, ChannelGroup, Family, MlpPair
from heal.families.lookup import CLASSES, FAMILIES, cuttable_or_raise, describe
from tests.heal.nets import NETS, build, images

nets = pytest.mark.parametrize("net", NETS)


@contextmanager
def outputs_of(model: nn.Module, names: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """Every named module's output, in the order of their calls."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name in names
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("net", "family", "layers", "blocks", "pairs", "inner", "residual"),
    [
        ("vit", "vit", 12, 3, 3, 0, 0),
        ("deit", "vit", 12, 3, 3, 0, 0),
        ("swin", "swin", 17, 4, 4, 0, 0),
        ("swinv2", "swin", 13, 4, 4, 0, 0),
        ("convnext", "convnext", 13, 5, 5, 0, 0),
        ("resnet", "resnet", 14, 5, 0, 5, 5),
        ("bottleneck", "resnet", 19, 5, 0, 10, 5),
        ("vgg", "vgg", 6, 3, 0, 4, 2),
        ("mobilenetv2", "efficientnet", 34, 18, 0, 16, 8),
        ("mobilenetv3", "efficientnet", 41, 13, 0, 10, 6),
        ("efficientnet", "efficientnet", 40, 11, 0, 9, 8),
    ],
)
def test_the_table_has_what_the_network_has(
    net: str, family: str, layers: int, blocks: int, pairs: int, inner: int, residual: int
) -> None:
    table = describe(build(net))
    kinds = [len(table.groups_of((kind,))) for kind in ("inner", "residual")]
    sizes = (len(table.layers), len(table.blocks), len(table.pairs), *kinds)
    assert (table.name, *sizes) == (family, layers, blocks, pairs, inner, residual)


@nets
def test_every_name_is_a_module_and_none_comes_twice(net: str) -> None:
    model = build(net)
    table = describe(model)
    modules = dict(model.named_modules())
    for names in (table.layers, table.blocks, table.norms, table.classifier):
        assert len(set(names)) == len(names)
        assert set(names) <= modules.keys()
    for name, group in table.cuttable.items():
        assert name == group.name
        assert name == group.producers[0] or group.kind == "heads"
        assert {*group.modules, *group.followers, *group.consumers} <= modules.keys()
        assert set(group.blocks) <= set(table.blocks)


@nets
def test_layers_and_blocks_are_called_in_the_order_of_the_table(net: str) -> None:
    model = build(net)
    table = describe(model)
    for names in (table.layers, table.blocks, table.classifier):
        with outputs_of(model, names) as seen:
            model(images(2))
        assert tuple(seen) == names


@nets
def test_every_layer_learns_from_the_blocks_outputs(net: str) -> None:
    model = build(net)
    table = describe(model)
    with outputs_of(model, table.blocks) as seen:
        model(images(4))
    torch.stack([(state * torch.randn_like(state)).sum() for state in seen.values()]).sum().backward()  # type: ignore[no-untyped-call]
    without = [n for n in table.layers if not torch.any(_gradient(model, n))]
    assert without == []


def _gradient(model: nn.Module, layer: str) -> Tensor:
    gradient = model.get_submodule(layer).get_parameter("weight").grad
    assert gradient is not None
    return gradient


@nets
def test_no_later_layer_overwrites_a_blocks_output(net: str) -> None:
    model = build(net)
    blocks = describe(model).blocks
    copies: dict[str, Tensor] = {}
    for block in blocks:
        model.get_submodule(block).register_forward_hook(
            lambda _, __, output, block=block: copies.update({block: output.clone()})
        )
    with torch.no_grad(), outputs_of(model, blocks) as seen:
        model(images(2))
    assert [block for block in blocks if not torch.equal(seen[block], copies[block])] == []


@nets
def test_the_layout_of_the_states_is_as_the_table_says(net: str) -> None:
    model = build(net)
    table = describe(model)
    with torch.no_grad(), outputs_of(model, (*table.blocks, *table.norms)) as seen:
        model(images(2))
    widths = {seen[block].shape[-1 if table.states == "tokens" else 1] for block in table.blocks}
    assert all(seen[block].ndim == 4 for block in table.blocks) or table.states == "tokens"
    assert SIZES[net] >= widths


SIZES = {
    "vit": {32},
    "deit": {32},
    "swin": {16, 32},
    "swinv2": {16, 32},
    "convnext": {8, 16, 32},
    "resnet": {8, 16, 24},
    "bottleneck": {16, 24, 32},
    "vgg": {16, 8, 4096},
    "mobilenetv2": {8, 16, 24, 32, 56, 112, 1280},
    "mobilenetv3": {8, 16, 24, 48, 288, 1024},
    "efficientnet": {8, 16, 24, 40, 56, 96, 160, 1280},
}


@pytest.mark.parametrize("net", ["vit", "deit", "swin", "swinv2", "convnext"])
def test_a_pair_is_producer_activation_consumer(net: str) -> None:
    model = build(net)
    for pair in describe(model).pairs:
        names = (pair.producer, pair.activation, pair.consumer)
        with torch.no_grad(), outputs_of(model, names) as seen:
            model(images(1))
        assert tuple(seen) == names
        produced, activated, consumed = seen.values()
        act, consumer = (model.get_submodule(name) for name in names[1:])
        assert torch.equal(act(produced), activated)
        assert torch.equal(consumer(activated), consumed)


@nets
def test_the_classifier_is_not_prunable(net: str) -> None:
    model = build(net)
    table = describe(model)
    assert table.classifier
    assert not set(table.classifier) & set(table.layers)
    assert all(model.get_submodule(name).get_parameter("weight").shape[0] == 10 for name in table.classifier)


def test_a_distilled_deit_has_two_classifiers() -> None:
    assert describe(build("deit")).classifier == ("head", "head_dist")


def test_a_network_without_a_head_has_no_classifier() -> None:
    assert describe(timm.create_model("resnet18", num_classes=0)).classifier == ()


def _on_meta(name: str, **kwargs: object) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **kwargs)
    return model


@pytest.mark.parametrize(
    ("name", "family", "blocks", "hidden", "residual"),
    [
        ("vit_tiny_patch16_224", "vit", 12, 12, 0),
        ("deit_base_distilled_patch16_224", "vit", 12, 12, 0),
        ("deit3_small_patch16_224", "vit", 12, 12, 0),
        ("vit_small_patch14_reg4_dinov2", "vit", 12, 12, 0),
        ("swin_tiny_patch4_window7_224", "swin", 12, 12, 0),
        ("swinv2_tiny_window8_256", "swin", 12, 12, 0),
        ("convnext_tiny", "convnext", 18, 18, 0),
        ("resnet18", "resnet", 8, 8, 4),
        ("resnet50", "resnet", 16, 32, 5),
        ("seresnet50", "resnet", 16, 32, 5),
        ("regnetx_002", "regnet", 13, 0, 5),
        ("regnety_008", "regnet", 14, 0, 5),
        ("regnetv_040", "regnet", 22, 0, 5),
        ("mobilenetv1_100", "efficientnet", 13, 0, 14),
        ("resnext50_32x4d", "resnet", 16, 0, 5),
        ("vgg16", "vgg", 6, 9, 5),
        ("vgg16_bn", "vgg", 6, 9, 5),
        ("mobilenetv2_100", "efficientnet", 18, 16, 8),
        ("mobilenetv3_large_100", "efficientnet", 17, 14, 7),
        ("mobilenetv4_conv_small", "efficientnet", 18, 12, 8),
        ("efficientnet_b0", "efficientnet", 17, 15, 8),
        ("tf_efficientnet_lite0", "efficientnet", 17, 15, 8),
        ("efficientnetv2_rw_t", "efficientnet", 40, 37, 6),
    ],
)
def test_published_networks_have_a_family(name: str, family: str, blocks: int, hidden: int, residual: int) -> None:
    table = describe(_on_meta(name))
    cuttable = [len(table.groups_of(kinds)) for kinds in (HIDDEN, ("residual",))]
    assert (table.name, len(table.blocks), *cuttable) == (family, blocks, hidden, residual)


@pytest.mark.parametrize(
    "name",
    [
        "convnextv2_atto",  # its MLP normalises the hidden layer (GRN)
        "regnety_040_sgn",  # its norms mix channels, and its convolutions are grouped
        "mixnet_s",  # its convolutions are several of different sizes
    ],
)
def test_what_mixes_channels_has_no_group(name: str) -> None:
    model = _on_meta(name)
    assert describe(model).layers
    with pytest.raises(ArchitectureError, match=r"is of family .* give a budget in weights"):
        cuttable_or_raise(model)


def test_of_a_gated_mlp_only_the_attention_is_left_to_cut() -> None:
    table = describe(_on_meta("vit_giant_patch14_dinov2"))
    assert table.pairs == () and {group.kind for group in table.groups} == {"qk", "v", "heads"}
    with pytest.raises(ArchitectureError, match="no channels of kind mlp; it has heads, qk, v"):
        pool(_on_meta("vit_giant_patch14_dinov2"), ["mlp"])


def test_a_normalised_mlp_is_no_pair() -> None:
    assert describe(_on_meta("vit_tiny_patch16_224", scale_mlp_norm=True)).pairs == ()


def test_anti_aliasing_excludes_the_channels_before_it() -> None:
    plain, blurred = (describe(_on_meta(name)).groups_of(HIDDEN) for name in ("resnet50", "resnetblur50"))
    assert plain.keys() - blurred.keys() == {"layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"}


def test_every_class_of_the_lookup_is_timms() -> None:
    assert {name for name in CLASSES if not issubclass(getattr(timm.models, name), nn.Module)} == set()
    assert set(CLASSES.values()) | {"generic"} == FAMILIES.keys()


class Block(nn.Module):
    """A CIFAR residual block, as in anybody's own file."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Module):
    """Named like timm's, and not timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(Block(8), Block(8))
        self.stage2 = nn.Sequential(Block(8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.stage2(self.stage1(self.stem(x)))
        return torch.as_tensor(self.fc(hidden.mean((2, 3))))


def test_anybodys_network_gets_the_generic_family() -> None:
    table = describe(ResNet())
    inner = tuple(f"{b}.{conv}" for b in ("stage1.0", "stage1.1", "stage2.0") for conv in ("conv1", "conv2"))
    assert table.name == "generic"
    assert table.layers == ("stem", *inner)
    assert table.blocks == ("stage1.0", "stage1.1", "stage2.0")
    assert (table.classifier, table.states, table.cuttable) == (("fc",), "maps", {})


def test_generic_blocks_of_a_torchvision_transformer_are_its_encoder_layers() -> None:
    from torchvision.models import VisionTransformer  # importable once heal.compat is

    model = VisionTransformer(16, 8, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
    table = describe(model)
    assert table.blocks == tuple(f"encoder.layers.encoder_layer_{i}" for i in range(3))
    assert table.states == "tokens"
    assert table.classifier == ("heads.head",)
    with torch.no_grad(), outputs_of(model, table.layers) as seen:
        model(torch.randn(1, 3, 16, 16))
    assert seen.keys() == set(table.layers)


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)), ()),
        (lambda: nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(3))), ("0", "1", "2")),
        (lambda: nn.Sequential(nn.Sequential(Block(3), Block(3)), nn.Sequential(Block(3))), ("0.0", "0.1", "1.0")),
    ],
)
def test_generic_blocks_are_repeated_children(make: Callable[[], nn.Module], blocks: tuple[str, ...]) -> None:
    assert describe(make()).blocks == blocks


def test_a_network_without_a_table_is_refused_with_the_known_families() -> None:
    with pytest.raises(ArchitectureError) as refusal:
        cuttable_or_raise(ResNet())
    message = str(refusal.value)
    assert message.startswith("ResNet has no table of channel groups")
    assert all(name in message for name in FAMILIES if name != "generic")
    assert "budget in weights" in message


def test_layers_that_share_a_weight_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].weight = model[0].weight
    assert describe(model).layers == ("0",)


def test_a_network_may_bring_its_own_table() -> None:
    model = ResNet()
    group = ChannelGroup("stage1.0.conv1", ("stage1.0.conv1",), ("stage1.0.conv2",), ("stage1.0.bn1",))
    own = Family("mine", layers=("stage1.0.conv1",), groups=(group,))
    model.regrow_family = own  # type: ignore[assignment]
    assert describe(model) is own
    assert cuttable_or_raise(model) is own


def test_a_brought_table_that_names_no_module_is_refused_with_the_nearest_name() -> None:
    model = ResNet()
    pair = MlpPair("stage1.0.conv1", "stage1.0.bn1", "stage1.0.convv2")
    model.regrow_family = Family("mine", layers=(), pairs=(pair,))  # type: ignore[assignment]
    with pytest.raises(ArchitectureError, match=r"'stage1.0.convv2'.*did you mean 'stage1.0.conv2'"):
        describe(model)
