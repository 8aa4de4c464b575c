"""Streams: channels that run from block to block of a convolutional network, who writes them and who reads them.

A block that adds its input to what it writes goes on with the stream that it read; any other ends it and begins the
next. A stream that meets anything unknown, or that leaves the network, is no group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from heal.families.channelwise import acts_alone, carries_channels, kind_of, leaves_channels, part, squeeze
from heal.families.discovery import children, is_batch_norm, is_plain
from heal.families.family import ChannelGroup


@dataclass(frozen=True)
class Ends:
    """Where one kind of block reads a stream and where it writes one; names are relative to it.

    before, behind: norms and depthwise convolutions between the stream and `reads`, and between `writes` and the
    stream; they may be absent. straight: what must be absent or leave channels alone there. gate_before, gate_behind:
    squeeze-and-excitation there. adds: whether the input is added where nothing stands on the skip path.
    """

    reads: str
    writes: str
    before: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    straight: tuple[str, ...] = ()
    gate_before: str = ""
    gate_behind: str = ""
    adds: bool = True


SPACE_TO_DEPTH = ("conv_s2d", "bn_s2d")

ENDS: dict[str, Ends] = {
    "resnet.BasicBlock": Ends("conv1", "conv2", behind=("bn2",), gate_behind="se"),
    "resnet.Bottleneck": Ends("conv1", "conv3", behind=("bn3",), gate_behind="se"),
    "regnet.Bottleneck": Ends("conv1.conv", "conv3.conv", behind=("conv3.bn",), straight=("conv3.aa",), adds=False),
    "regnet.PreBottleneck": Ends("conv1", "conv3", before=("norm1",), adds=False),
    "_efficientnet_blocks.ConvBnAct": Ends("conv", "conv", behind=("bn1",), straight=("aa",)),
    "_efficientnet_blocks.DepthwiseSeparableConv": Ends(
        "conv_pw",
        "conv_pw",
        before=("conv_dw", "bn1"),
        behind=("bn2",),
        straight=(*SPACE_TO_DEPTH, "aa"),
        gate_before="se",
    ),
    "_efficientnet_blocks.InvertedResidual": Ends("conv_pw", "conv_pwl", behind=("bn3",), straight=SPACE_TO_DEPTH),
    "_efficientnet_blocks.EdgeResidual": Ends("conv_exp", "conv_pwl", behind=("bn2",)),
    "_efficientnet_blocks.UniversalInvertedResidual": Ends(
        "pw_exp.conv",
        "pw_proj.conv",
        before=("dw_start.conv", "dw_start.bn"),
        behind=("pw_proj.bn", "dw_end.conv", "dw_end.bn"),
        straight=("dw_start.aa", "dw_end.aa", "pw_proj.aa", "layer_scale"),
    ),
}

NOTHING = ChannelGroup("", (), (), kind="residual")


@dataclass(frozen=True)
class Passage:
    """What the stream that comes meets in one module, and what the one that leaves does; the same one if it goes on."""

    coming: ChannelGroup = NOTHING
    leaving: ChannelGroup = NOTHING
    goes_on: bool = True


def streams(model: nn.Module, road: Iterable[str], blocks: tuple[str, ...]) -> tuple[ChannelGroup, ...]:
    """The streams along a road of modules that call one another in this order; `blocks` are those that give states."""
    found: list[ChannelGroup | None] = []
    stream: ChannelGroup | None = None
    for name in _atoms(model, road):
        passage = _passage(model, name)
        if passage is None:
            stream = None
            continue
        stream = _joined(stream, passage.coming)
        if not passage.goes_on:
            found.append(stream)
            stream = NOTHING
        stream = _joined(stream, passage.leaving)
        stream = _joined(stream, replace(NOTHING, blocks=(name,) if name in blocks else ()))
    return tuple(replace(group, name=group.producers[0]) for group in found if group and _is_whole(model, group))


def _atoms(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        module = model.get_submodule(name)
        if type(module) is nn.Sequential or kind_of(module) == "conv_bn_act.ConvNormAct":
            yield from _atoms(model, children(model, name))
        else:
            yield name


def _passage(model: nn.Module, name: str) -> Passage | None:
    module = model.get_submodule(name)
    if kind_of(module) in ENDS:
        return _through(name, module, ENDS[kind_of(module)])
    if is_plain(module):
        return Passage(replace(NOTHING, consumers=(name,)), replace(NOTHING, producers=(name,)), goes_on=False)
    if is_batch_norm(module):
        return Passage(replace(NOTHING, followers=(name,)))
    return Passage() if acts_alone(module) else None


def _through(name: str, block: nn.Module, ends: Ends) -> Passage | None:
    """A block's two ends, or None where something there mixes channels or is not known."""
    before, behind = (
        tuple(path for path in paths if not leaves_channels(part(block, path))) for paths in (ends.before, ends.behind)
    )
    carry = all(carries_channels(part(block, path)) for path in (*before, *behind))
    plain = is_plain(part(block, ends.reads)) and is_plain(part(block, ends.writes))
    straight = all(leaves_channels(part(block, path)) for path in ends.straight)
    first, last, projection = squeeze(block, ends.gate_before), squeeze(block, ends.gate_behind), _projection(block)
    if not (carry and plain and straight) or first is None or last is None or projection is None:
        return None
    convolution, norms = projection
    return Passage(
        _named(name, first[1], before, (*first[0], ends.reads, *convolution)),
        _named(name, (ends.writes, *last[1], *convolution), (*behind, *norms), last[0]),
        _adds_its_input(block, ends),
    )


def _named(
    block: str, producers: tuple[str, ...], followers: tuple[str, ...], consumers: tuple[str, ...]
) -> ChannelGroup:
    made, between, read = (tuple(f"{block}.{path}" for path in paths) for paths in (producers, followers, consumers))
    return replace(NOTHING, producers=made, followers=between, consumers=read)


def _projection(block: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """(convolution, norms) on the skip path, both empty where there is none; None where it is not known."""
    if leaves_channels(part(block, "downsample")):
        return (), ()
    paths = tuple(path for path in _atoms(block, ("downsample",)) if not acts_alone(part(block, path)))
    convolution, norms = paths[:1], paths[1:]
    known = [is_plain(part(block, path)) for path in convolution] == [True]
    return (convolution, norms) if known and all(is_batch_norm(part(block, path)) for path in norms) else None


def _adds_its_input(block: nn.Module, ends: Ends) -> bool:
    """Itself, not a projection of it."""
    if hasattr(block, "has_skip"):
        return bool(block.has_skip)
    shortcut = part(block, "downsample")
    return leaves_channels(shortcut) and (shortcut is not None or ends.adds)


def _joined(stream: ChannelGroup | None, more: ChannelGroup) -> ChannelGroup | None:
    return stream and replace(
        stream,
        producers=stream.producers + more.producers,
        consumers=stream.consumers + more.consumers,
        followers=stream.followers + more.followers,
        blocks=stream.blocks + more.blocks,
    )


def _is_whole(model: nn.Module, group: ChannelGroup) -> bool:
    """All agree on how many channels there are; a classifier behind two poolings side by side does not."""
    writers = (*group.producers, *group.followers)
    written = {_size(model, name, "out_features", "out_channels", "num_features") for name in writers}
    return len(written | {_size(model, name, "in_features", "in_channels") for name in group.consumers}) == 1


def _size(model: nn.Module, name: str, *attributes: str) -> int:
    module = model.get_submodule(name)
    return next(int(getattr(module, attribute)) for attribute in attributes if hasattr(module, attribute))
