"""Convolutional networks: ResNet, VGG, and what timm builds from inverted residuals.

Channel groups lie inside a block: no block's output changes its width, so a cut student's internal
states still compare with its teacher's. That leaves the residual stream of a ResNet whole, and in
a VGG the last convolution before every pooling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from heal.families.discovery import children, classifier, is_batch_norm, is_depthwise, is_plain, matrices, norms
from heal.families.family import ChannelGroup, Family


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
    "BasicBlock": (Chain("conv1", ("bn1",), "conv2", straight=("aa",)),),
    "Bottleneck": (Chain("conv1", ("bn1",), "conv2"), Chain("conv2", ("bn2",), "conv3", straight=("aa",))),
    "InvertedResidual": (Chain("conv_pw", ("bn1", "conv_dw", "bn2"), "conv_pwl", straight=("aa",), squeeze="se"),),
    "EdgeResidual": (Chain("conv_exp", ("bn1",), "conv_pwl", straight=("aa",), squeeze="se"),),
    "UniversalInvertedResidual": (
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
    """Layers: every convolution of the residual blocks. Groups: the blocks' inner channels."""
    stages = tuple(name for name, _ in model.named_children() if name.startswith("layer"))
    blocks = tuple(block for stage in stages for block in children(model, stage))
    table = _family("resnet", model, roots=blocks, blocks=blocks, groups=_inner_groups(model, blocks))
    skips = tuple(layer for layer in table.layers if ".downsample." in layer)
    return replace(table, projections=skips)


def efficientnet(model: nn.Module) -> Family:
    """EfficientNet, MobileNetV2, V3 and relatives; the head's convolution counts as a last block."""
    blocks = tuple(block for stage in children(model, "blocks") for block in children(model, stage))
    groups = _inner_groups(model, blocks)
    if not is_plain(getattr(model, "conv_head", None)):
        return _family("efficientnet", model, roots=blocks, blocks=blocks, groups=groups)
    roots, states = (*blocks, "conv_head"), (*blocks, _head_state(model))
    return _family("efficientnet", model, roots=roots, blocks=states, groups=groups)


def vgg(model: nn.Module) -> Family:
    """Layers: all convolutions but the first. Blocks end at the poolings; the head's two convolutions are the last."""
    features = children(model, "features")
    pools = tuple(name for name in features if isinstance(model.get_submodule(name), nn.MaxPool2d))
    head = _group("pre_logits", model.get_submodule("pre_logits"), Chain("fc1", (), "fc2"))
    groups = _sequential_groups(model, features) + ((head,) if head is not None else ())
    return _family("vgg", model, roots=(*features[1:], "pre_logits"), blocks=(*pools, "pre_logits"), groups=groups)


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
    )


def _head_state(model: nn.Module) -> str:
    """What holds the head convolution's output after its activation; before, an in-place one overwrites it."""
    last = [name for name in ("bn2", "norm_head", "act2") if not _leaves_channels(getattr(model, name, None))]
    return last[-1] if last else "conv_head"


def _inner_groups(model: nn.Module, blocks: tuple[str, ...]) -> tuple[ChannelGroup, ...]:
    groups = []
    for name in blocks:
        block = model.get_submodule(name)
        known = type(block).__module__.startswith("timm.")
        for chain in CHAINS.get(type(block).__name__, ()) if known else ():
            group = _group(name, block, chain)
            groups += [group] if group is not None else []
    return tuple(groups)


def _group(name: str, block: nn.Module, chain: Chain) -> ChannelGroup | None:
    """The chain's group in this block, or None where something in it mixes channels."""
    followers = [follower for follower in chain.followers if not _leaves_channels(_part(block, follower))]
    carries = all(_carries_channels(_part(block, follower)) for follower in followers)
    straight = all(_leaves_channels(_part(block, part)) for part in chain.straight)
    ends = is_plain(_part(block, chain.producer)) and is_plain(_part(block, chain.consumer))
    squeeze = _squeeze(block, chain.squeeze)
    if not (carries and straight and ends) or squeeze is None:
        return None
    reduce, expand = squeeze
    producers = tuple(f"{name}.{part}" for part in (chain.producer, *expand))
    consumers = tuple(f"{name}.{part}" for part in (*reduce, chain.consumer))
    return ChannelGroup(producers[0], producers, consumers, tuple(f"{name}.{part}" for part in followers))


def _squeeze(block: nn.Module, path: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Squeeze-and-excitation reads all channels and writes a gate for each: (consumers, producers)."""
    module = _part(block, path) if path else None
    if _leaves_channels(module):
        return (), ()
    known = type(module).__name__ == "SqueezeExcite" and is_plain(_part(module, "conv_reduce"))
    return ((f"{path}.conv_reduce",), (f"{path}.conv_expand",)) if known else None


def _sequential_groups(model: nn.Module, names: tuple[str, ...]) -> tuple[ChannelGroup, ...]:
    """Convolution after convolution, with norms and activations between; a pooling ends a block."""
    groups: list[ChannelGroup] = []
    producer, followers = "", tuple[str, ...]()
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.Conv2d):
            if producer and is_plain(module):
                groups.append(ChannelGroup(producer, (producer,), (name,), followers))
            producer, followers = (name if is_plain(module) else ""), ()
        elif is_batch_norm(module):
            followers = (*followers, name)
        elif isinstance(module, nn.MaxPool2d) or any(True for _ in module.parameters()):
            producer = ""
    return tuple(groups)


def _part(module: nn.Module | None, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _carries_channels(module: nn.Module | None) -> bool:
    return is_batch_norm(module) or is_depthwise(module)


def _leaves_channels(module: nn.Module | None) -> bool:
    empty = isinstance(module, nn.Sequential) and len(module) == 0
    return module is None or empty or isinstance(module, (nn.Identity, nn.AvgPool2d))
