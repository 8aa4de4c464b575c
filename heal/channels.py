"""What is known of channels that may be cut: which there are, what they carry, what they weigh."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from heal.families.family import HIDDEN, KINDS, ChannelGroup
from heal.families.lookup import cuttable_or_raise
from heal.merging import merge
from heal.naming import refuse_unknown
from heal.values import LayerStats

BESIDE = tuple(kind for kind in KINDS if kind not in HIDDEN)


def refuse_unknown_kinds(param: str, include: Iterable[str]) -> None:
    """Raise MethodError unless all are kinds of groups that can be taken in beside the hidden channels."""
    for kind in include:
        refuse_unknown(param, kind, BESIDE)


def cuts(include: Iterable[str]) -> frozenset[str]:
    """The needs of an allocator that cuts hidden channels and these kinds."""
    return frozenset(f"cuts {kind}" for kind in (*HIDDEN, *include))


def pool(model: nn.Module, include: Iterable[str]) -> dict[str, ChannelGroup]:
    """The groups that are cut: hidden channels and these kinds, in the table's order. Raises ArchitectureError."""
    return cuttable_or_raise(model).groups_of((*HIDDEN, *include))


def is_pointwise(module: nn.Module) -> bool:
    """Every output position reads one input position: a channel's mean passes it as a constant."""
    return not isinstance(module, nn.Conv2d) or (
        module.kernel_size == (1, 1) and module.padding in ((0, 0), 0, "valid")
    )


def second_moment_tap(model: nn.Module, consumer: str) -> str:
    """The tap of what a consumer's weight multiplies."""
    return f"{consumer}.input" if is_pointwise(model.get_submodule(consumer)) else f"{consumer}.patches"


def second_moment(statistics: Mapping[str, LayerStats], model: nn.Module, consumer: str) -> LayerStats:
    """Of the columns of a consumer's weight [out, in, ...] flattened, comoment [d, d]."""
    tap = second_moment_tap(model, consumer)
    if tap in statistics:
        return statistics[tap]
    both = merge(statistics[f"{tap}/0"], statistics[f"{tap}/1"])
    assert both.comoment is not None
    return LayerStats(both.count, both.mean, both.m2, both.comoment[0])


def columns(module: nn.Module, keep: Tensor) -> Tensor:
    """The columns of a consumer's flattened weight that multiply the channels `keep` [k], ascending: [k * places]."""
    places = module.get_parameter("weight")[0, 0].numel()
    return (keep.unsqueeze(1) * places + torch.arange(places)).flatten()


def through(module: nn.Module, mean: Tensor) -> Tensor:
    """What channels of these means [in] add to a consumer's output [out], in float64; padding is left out."""
    weight = module.get_parameter("weight").detach().double().cpu()
    return weight.reshape(*weight.shape[:2], -1).sum(2) @ mean


def highest(scores: Tensor, kept: int) -> Tensor:
    """Ascending indices of the `kept` highest scores; of equal ones the later stays."""
    order = torch.argsort(scores, stable=True)
    return order[len(order) - kept :].sort().values


def folded(
    model: nn.Module,
    groups: Mapping[str, ChannelGroup],
    keep: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStats],
) -> dict[str, Tensor]:
    """Every consumer's bias with what the mean of the cut channels gives it; one that has none gets one."""
    updates = {}
    for name, group in groups.items():
        for consumer in group.consumers:
            module = model.get_submodule(consumer)
            mean = statistics[f"{consumer}.input"].mean.clone()
            mean[keep[name]] = 0
            shift, bias = through(module, mean), module._parameters["bias"]
            new = shift if bias is None else bias.detach().double().cpu() + shift
            updates[f"{consumer}.bias"] = new.to(module.get_parameter("weight"))
    return updates
