"""What is known of channels that may be cut: which there are, what they carry, what they weigh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from heal.errors import ArchitectureError, MethodError
from heal.families.family import KINDS, ChannelGroup, Kind
from heal.families.heads import Heads
from heal.families.lookup import cuttable_or_raise
from heal.merging import merge
from heal.naming import refuse_unknown
from heal.values import LayerStats, Statistics

PLAIN: tuple[Kind, ...] = ("mlp", "inner", "residual")
"""The kinds whose channels are rows of whole modules."""


def refuse_unknown_kinds(param: str, kinds: Sequence[str], known: Sequence[Kind] = KINDS) -> None:
    """Raise MethodError unless all are kinds that the method knows, there is one, and no two hold the same weights."""
    if not kinds:
        raise MethodError(f"{param} is empty; name at least one of {', '.join(known)}")
    for kind in kinds:
        refuse_unknown(param, kind, known)
    inside = [kind for kind in ("qk", "v") if kind in kinds]
    if "heads" in kinds and inside:
        raise MethodError(
            f"{param} = {', '.join(kinds)}: heads are made of the dimensions that {' and '.join(inside)} count, so "
            "what goes with a head would go twice; leave out one, and cut it in a second run from what the first gives"
        )


def cuts(kinds: Iterable[str]) -> frozenset[str]:
    """The needs of an allocator that cuts channels of these kinds."""
    return frozenset(f"cuts {kind}" for kind in kinds)


def pool(model: nn.Module, kinds: Iterable[str]) -> dict[str, ChannelGroup]:
    """The groups of these kinds, in the table's order. Raises ArchitectureError where there is none."""
    family, kinds = cuttable_or_raise(model), tuple(kinds)
    chosen = family.groups_of(kinds)
    if not chosen:
        present = sorted({group.kind for group in family.cuttable.values()})
        raise ArchitectureError(
            f"{type(model).__name__} (family {family.name}) has no channels of kind {' or '.join(kinds)}; "
            f"it has {', '.join(present)}: set `kinds` to some of these"
        )
    return chosen


def is_pointwise(module: nn.Module) -> bool:
    """Every output position reads one input position, and all are read: a channel's mean passes as a constant."""
    return not isinstance(module, nn.Conv2d) or (
        module.kernel_size == module.stride == (1, 1) and module.padding in ((0, 0), 0, "valid")
    )


def second_moment_tap(model: nn.Module, consumer: str) -> str:
    """The tap of what a consumer's weight multiplies."""
    return f"{consumer}.input" if is_pointwise(model.get_submodule(consumer)) else f"{consumer}.patches"


def second_moment(statistics: Statistics, model: nn.Module, consumer: str) -> LayerStats:
    """Of the columns of a consumer's weight [out, in, ...] flattened, comoment [d, d]."""
    tap = second_moment_tap(model, consumer)
    if tap in statistics:
        return statistics[tap]
    both = merge(statistics[f"{tap}/0"], statistics[f"{tap}/1"])
    assert both.comoment is not None
    return LayerStats(both.count, both.mean, both.m2, both.comoment[0], both.images)


def consumed(model: nn.Module, group: ChannelGroup, keep: Tensor) -> Tensor:
    """The input channels that the group's consumers keep, ascending: of heads and their dimensions many for each."""
    return Heads.of(model.get_submodule(group.attention)).columns(group.kind, keep) if group.attention else keep


def columns(module: nn.Module, keep: Tensor) -> Tensor:
    """The columns of a consumer's flattened weight that multiply the channels `keep` [k], ascending: [k * places]."""
    places = module.get_parameter("weight")[0, 0].numel()
    return (keep.unsqueeze(1) * places + torch.arange(places)).flatten()


def through(module: nn.Module, mean: Tensor) -> Tensor:
    """What channels of these means [in] add to a consumer's output [out], in float64; padding is left out."""
    weight = module.get_parameter("weight").detach().double().cpu()
    return weight.reshape(*weight.shape[:2], -1).sum(2) @ mean


def norms(model: nn.Module, group: ChannelGroup) -> Tensor:
    """The norm of the producers' rows, all producers together, without biases; float64 [channels], of queries and
    keys and of values [heads, channels]."""
    weights = [model.get_submodule(module).get_parameter("weight") for module in group.modules]
    squares = [weight.detach().double().cpu().flatten(1).square().sum(1) for weight in weights]
    total = torch.stack(squares).sum(0)
    heads = Heads.of(model.get_submodule(group.attention)) if group.attention else None
    return (total if heads is None else heads.totals(group.kind, total)).sqrt()


def highest(scores: Tensor, kept: int) -> Tensor:
    """Ascending indices of the `kept` highest scores along the last axis; of equal ones the later stays."""
    order = torch.argsort(scores, stable=True)
    return order[..., order.shape[-1] - kept :].sort().values


def folded(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    keep: Mapping[str, Tensor],
    statistics: Statistics,
) -> dict[str, Tensor]:
    """Every consumer's bias with what the mean of the cut channels gives it; one that has none gets one."""
    updates = {}
    for name, group in groups.items():
        for consumer in group.consumers:
            module = model.get_submodule(consumer)
            mean = statistics[f"{consumer}.input"].mean.clone()
            mean[consumed(model, group, keep[name])] = 0
            shift, bias = through(module, mean), module._parameters["bias"]
            new = shift if bias is None else bias.detach().double().cpu() + shift
            updates[f"{consumer}.bias"] = new.to(module.get_parameter("weight"))
    return updates
