"""What a family says of a network: names of modules, nothing else."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["mlp", "inner", "residual", "qk", "v", "heads"]
"""What a group's channels are: an MLP's hidden units; a convolutional block's inner channels; what runs from block to
block, as the residual stream does; dimensions of queries and keys; of values; whole heads of attention."""

KINDS: tuple[Kind, ...] = get_args(Kind)
HIDDEN: tuple[Kind, ...] = ("mlp", "inner")
"""The kinds that are cut unless others are asked for."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together; `name` is the first producer's dotted name.

    producers: modules whose output rows are sliced (Linear, Conv2d).
    followers: modules between that carry one value a channel (BatchNorm, depthwise Conv2d, GRN).
    consumers: modules whose input columns are sliced (Linear, Conv2d).
    kind: what the channels are. blocks: those of the table's whose outputs carry them, so that states can be compared.
    """

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    followers: tuple[str, ...] = ()
    kind: Kind = "inner"
    blocks: tuple[str, ...] = ()


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
    1x1 convolutions on skip paths.
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

    @property
    def cuttable(self) -> dict[str, ChannelGroup]:
        """Every channel group by its name, the MLP pairs included."""
        return {pair.producer: pair.group for pair in self.pairs} | {group.name: group for group in self.groups}

    def groups_of(self, kinds: Collection[str]) -> dict[str, ChannelGroup]:
        """The channel groups of these kinds by name."""
        return {name: group for name, group in self.cuttable.items() if group.kind in kinds}
