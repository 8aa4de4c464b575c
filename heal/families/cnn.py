"""Convolutional networks: ResNet, RegNet, VGG, and what timm builds from inverted residuals.

Groups of kind "inner" lie inside a block: no block's output changes its width. Groups of kind "residual" are the
streams between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from heal.families.channelwise import carries_channels, kind_of, leaves_channels, part, squeeze
from heal.families.discovery import children, classifier, is_plain, matrices, norms, present
from heal.families.family import ChannelGroup, Family
from heal.families.skips import droppable
from heal.families.streams import streams


@dataclass(frozen=True)
class Chain:
    """Inner channels of one kind of block; names are relative to it.

    straight: modules in between that must be absent or leave channels alone (anti-aliasing carries
    one filter a channel). squeeze: a squeeze-and-excitation in between, "" for none.
    """

    producer: str
    followers: tuple[str, ...]
    consumer: str
    straight: tuple[str, ...] = ()
    squeeze: str = ""


CHAINS: dict[str, tuple[Chain, ...]] = {
    "resnet.BasicBlock": (Chain("conv1", ("bn1",), "conv2", straight=("aa",)),),
    "resnet.Bottleneck": (Chain("conv1", ("bn1",), "conv2"), Chain("conv2", ("bn2",), "conv3", straight=("aa",))),
    "regnet.Bottleneck": (
        Chain("conv1.conv", ("conv1.bn",), "conv2.conv", straight=("conv1.aa",)),
        Chain("conv2.conv", ("conv2.bn",), "conv3.conv", straight=("conv2.aa",), squeeze="se"),
    ),
    "regnet.PreBottleneck": (
        Chain("conv1", ("norm2",), "conv2"),
        Chain("conv2", ("norm3",), "conv3", squeeze="se"),
    ),
    "_efficientnet_blocks.InvertedResidual": (
        Chain("conv_pw", ("bn1", "conv_dw", "bn2"), "conv_pwl", straight=("aa",), squeeze="se"),
    ),
    "_efficientnet_blocks.EdgeResidual": (Chain("conv_exp", ("bn1",), "conv_pwl", straight=("aa",), squeeze="se"),),
    "_efficientnet_blocks.UniversalInvertedResidual": (
        Chain(
            "pw_exp.conv",
            ("pw_exp.bn", "dw_mid.conv", "dw_mid.bn"),
            "pw_proj.conv",
            straight=("pw_exp.aa", "dw_mid.aa"),
            squeeze="se",
        ),
    ),
}


def resnet(model: nn.Module) -> Family:
    """Layers: every convolution of the residual blocks."""
    stages = tuple(name for name, _ in model.named_children() if name.startswith("layer"))
    blocks = tuple(block for stage in stages for block in present(model, stage))
    between = streams(model, ("conv1", "bn1", "act1", "maxpool", *blocks, "fc"), blocks)
    return _with_projections("resnet", model, blocks, (*_inner_groups(model, blocks), *between))


def regnet(model: nn.Module) -> Family:
    """Layers: every convolution of the blocks, and the head's if there is one. Grouped ones are left whole."""
    stages = tuple(name for name, _ in model.named_children() if name in ("s1", "s2", "s3", "s4"))
    blocks = tuple(block for stage in stages for block in present(model, stage))
    has_head = is_plain(part(model, "final_conv.conv"))
    head = ("final_conv.conv",) if has_head else ("final_conv", "head.fc")
    groups = (*_inner_groups(model, blocks), *streams(model, ("stem", *blocks, *head), blocks))
    return _with_projections("regnet", model, (*blocks, "final_conv") if has_head else blocks, groups)


def efficientnet(model: nn.Module) -> Family:
    """EfficientNet, MobileNetV2, V3 and relatives; the head's convolution counts as a last block."""
    blocks = tuple(block for stage in children(model, "blocks") for block in present(model, stage))
    has_head = is_plain(part(model, "conv_head"))
    between = streams(model, ("conv_stem", "bn1", *blocks, "conv_head" if has_head else "classifier"), blocks)
    groups = (*_inner_groups(model, blocks), *between)
    if not has_head:
        return _family("efficientnet", model, roots=blocks, blocks=blocks, groups=groups)
    roots, states = (*blocks, "conv_head"), (*blocks, _head_state(model))
    return _family("efficientnet", model, roots=roots, blocks=states, groups=groups)


def vgg(model: nn.Module) -> Family:
    """Layers: all convolutions but the first. Blocks end at the poolings; the head's two convolutions are the last."""
    features = children(model, "features")
    pools = tuple(name for name in features if isinstance(model.get_submodule(name), nn.MaxPool2d))
    head = _group("pre_logits", model.get_submodule("pre_logits"), Chain("fc1", (), "fc2"))
    reader = ("pre_logits.fc1",) if part(model, "pre_logits.fc1") is not None else ()
    chains = streams(model, (*features, *reader), pools)
    inner = tuple(replace(group, kind="inner") for group in chains if not group.blocks)
    groups = (*inner, *((head,) if head is not None else ()), *(group for group in chains if group.blocks))
    return _family("vgg", model, roots=(*features[1:], "pre_logits"), blocks=(*pools, "pre_logits"), groups=groups)


def _with_projections(name: str, model: nn.Module, blocks: tuple[str, ...], groups: tuple[ChannelGroup, ...]) -> Family:
    table = _family(name, model, roots=blocks, blocks=blocks, groups=groups)
    return replace(table, projections=tuple(layer for layer in table.layers if ".downsample." in f"{layer}."))


def _family(
    name: str, model: nn.Module, roots: tuple[str, ...], blocks: tuple[str, ...], groups: tuple[ChannelGroup, ...]
) -> Family:
    return Family(
        name=name,
        layers=matrices(model, roots),
        blocks=blocks,
        groups=groups,
        norms=norms(model),
        classifier=classifier(model),
        droppable=droppable(model, blocks),
    )


def _head_state(model: nn.Module) -> str:
    """What holds the head convolution's output after its activation; before, an in-place one overwrites it."""
    last = [name for name in ("bn2", "norm_head", "act2") if not leaves_channels(part(model, name))]
    return last[-1] if last else "conv_head"


def _inner_groups(model: nn.Module, blocks: tuple[str, ...]) -> tuple[ChannelGroup, ...]:
    groups = []
    for name in blocks:
        block = model.get_submodule(name)
        for chain in CHAINS.get(kind_of(block), ()):
            group = _group(name, block, chain)
            groups += [group] if group is not None else []
    return tuple(groups)


def _group(name: str, block: nn.Module, chain: Chain) -> ChannelGroup | None:
    """The chain's group in this block, or None where something in it mixes channels."""
    followers = [follower for follower in chain.followers if not leaves_channels(part(block, follower))]
    carries = all(carries_channels(part(block, follower)) for follower in followers)
    straight = all(leaves_channels(part(block, path)) for path in chain.straight)
    ends = is_plain(part(block, chain.producer)) and is_plain(part(block, chain.consumer))
    gate = squeeze(block, chain.squeeze)
    if not (carries and straight and ends) or gate is None:
        return None
    reduce, expand = gate
    producers = tuple(f"{name}.{path}" for path in (chain.producer, *expand))
    consumers = tuple(f"{name}.{path}" for path in (*reduce, chain.consumer))
    return ChannelGroup(producers[0], producers, consumers, tuple(f"{name}.{path}" for path in followers))
