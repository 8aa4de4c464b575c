"""What a family says of a network: names of modules, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

from heal.errors import ArchitectureError
from heal.families.heads import PARTS

Kind = Literal["mlp", "inner", "residual", "qk", "v", "heads"]
"""What a group's channels are: an MLP's hidden units; a convolutional block's inner channels; what runs from block to
block, as the residual stream does; dimensions of queries and keys; of values; whole heads of attention."""

KINDS: tuple[Kind, ...] = get_args(Kind)
HIDDEN: tuple[Kind, ...] = ("mlp", "inner")
"""The kinds that are cut unless others are asked for."""
ATTENTION: tuple[Kind, ...] = ("qk", "v", "heads")
"""The kinds of timm's plain attention."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together; `name` is mostly the first producer's dotted name.

    producers: modules whose output rows are sliced (Linear, Conv2d); "<module>:<part>" is a part of its rows.
    followers: modules between that carry one value a channel (BatchNorm, depthwise Conv2d, GRN).
    consumers: modules whose input columns are sliced (Linear, Conv2d).
    kind: what the channels are.
    attention: the attention whose heads hold them, "" elsewhere: a channel of kind "qk" or "v" is one dimension of
        every head, one of kind "heads" a whole head. `attention_groups` makes these. Else raises ArchitectureError.
    blocks: those of the table's whose outputs carry them, so that states can be compared.
    """

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    followers: tuple[str, ...] = ()
    kind: Kind = "inner"
    attention: str = ""
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind in ATTENTION and self.producers != _producers(self.attention, self.kind):
            raise ArchitectureError(
                f"channel group {self.name} is of kind {self.kind}, but its producers "
                f"{', '.join(self.producers)} are no such parts of an attention; let attention_groups make it"
            )

    @property
    def modules(self) -> tuple[str, ...]:
        """The producers' modules: without their parts, each once."""
        return tuple(dict.fromkeys(producer.partition(":")[0] for producer in self.producers))


def attention_groups(attention: str) -> tuple[ChannelGroup, ...]:
    """Of timm's plain attention of that dotted name: dimensions of queries and keys, those of values, heads.

    What heads and the other two have in common is cut by one of them at a time.
    """
    proj = (f"{attention}.proj",)
    kinds: tuple[tuple[Kind, str, tuple[str, ...]], ...] = (("qk", "q", ()), ("v", "v", proj), ("heads", "heads", proj))
    return tuple(
        ChannelGroup(f"{attention}.qkv:{part}", _producers(attention, kind), consumers, (), kind, attention)
        for kind, part, consumers in kinds
    )


def _producers(attention: str, kind: Kind) -> tuple[str, ...]:
    return tuple(f"{attention}.qkv:{part}" for part in PARTS[kind])


@dataclass(frozen=True)
class MlpPair:
    """An MLP's hidden layer: producer -> activation -> consumer."""

    producer: str
    activation: str
    consumer: str

    @property
    def group(self) -> ChannelGroup:
        """The pair as a channel group."""
        return ChannelGroup(self.producer, (self.producer,), (self.consumer,), kind="mlp")


@dataclass(frozen=True)
class Family:
    """The table of one network. All names are dotted module names, in forward order.

    `states` says how a block's output is laid out: "tokens" puts channels last (one vector a
    token), "maps" is [n, c, h, w] (one vector an image, as STARFISH flattens them). `projections` are the
    1x1 convolutions on skip paths. `droppable` are those of the blocks that add what they compute to their input, and
    nothing else, so that without one its input passes on. `last_norm` is the norm behind all blocks, if there is one.
    Raises ArchitectureError when `droppable` names other blocks.
    """

    name: str
    layers: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    pairs: tuple[MlpPair, ...] = ()
    groups: tuple[ChannelGroup, ...] = ()
    norms: tuple[str, ...] = ()
    classifier: tuple[str, ...] = ()
    projections: tuple[str, ...] = ()
    states: Literal["tokens", "maps"] = "maps"
    droppable: tuple[str, ...] = ()
    last_norm: str = ""

    def __post_init__(self) -> None:
        other = [name for name in self.droppable if name not in self.blocks]
        if other:
            raise ArchitectureError(
                f"family {self.name}: droppable names {other[0]!r}, which is none of its blocks; add it to `blocks`"
            )

    @property
    def cuttable(self) -> dict[str, ChannelGroup]:
        """Every channel group by its name, the MLP pairs included."""
        return {pair.producer: pair.group for pair in self.pairs} | {group.name: group for group in self.groups}

    def groups_of(self, kinds: Collection[str]) -> dict[str, ChannelGroup]:
        """The channel groups of these kinds by name."""
        return {name: group for name, group in self.cuttable.items() if group.kind in kinds}

    def without(self, dropped: Collection[str]) -> Family:
        """The table of what is left when these blocks are gone."""
        if not dropped:
            return self

        def stay(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name for name in names if not any(f"{name}.".startswith(f"{block}.") for block in dropped))

        return replace(
            self,
            layers=stay(self.layers),
            blocks=stay(self.blocks),
            pairs=tuple(pair for pair in self.pairs if stay((pair.producer,))),
            groups=tuple(_left(group, stay) for group in self.groups if stay(group.producers)),
            norms=stay(self.norms),
            projections=stay(self.projections),
            droppable=stay(self.droppable),
        )


def _left(group: ChannelGroup, stay: Callable[[tuple[str, ...]], tuple[str, ...]]) -> ChannelGroup:
    return replace(
        group,
        producers=stay(group.producers),
        consumers=stay(group.consumers),
        followers=stay(group.followers),
        blocks=stay(group.blocks),
    )
