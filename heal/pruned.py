"""Putting a mask or a cut into a model, and saying what it did."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from heal import masking, surgery
from heal.errors import WeightsError
from heal.families.family import ChannelGroup, Family
from heal.families.lookup import describe
from heal.values import ChannelCut, Mask


def apply(model: nn.Module, pruned: Mask | ChannelCut) -> None:
    """Mask or cut the model in place."""
    if isinstance(pruned, Mask):
        masking.apply(model, pruned)
    else:
        surgery.cut(model, pruned)


def left(model: nn.Module, pruned: Mask | ChannelCut | None) -> Family:
    """The dense model's table, without the blocks that were dropped: a student has none of what is in them."""
    return describe(model).without(pruned.dropped if isinstance(pruned, ChannelCut) else ())


def goals(model: nn.Module, pruned: Mask | ChannelCut | None) -> dict[str, str]:
    """Of every block of the student whose output is compared, the dense block that it is compared with: itself.

    Where the last blocks were dropped, nothing behind them would ask for what they did. Then the last that stays is
    compared with the last of all; with a whole stage gone, what stands in the place of that one.
    """
    blocks, stay = describe(model).blocks, left(model, pruned).blocks
    found = {block: block for block in stay}
    if blocks[-1:] != stay[-1:]:
        last = blocks[-1]
        is_followed_by_nothing = bool(stay) and stay[-1].rpartition(".")[0] == last.rpartition(".")[0]
        found[stay[-1] if is_followed_by_nothing else last] = last
    return found


def kept(
    model: nn.Module, pruned: Mask | ChannelCut, of: Literal["blocks", "followers", "producers"]
) -> dict[str, Tensor]:
    """Of every such module of the groups that were cut, by the dense model's table, the channels that stay [k]."""
    if isinstance(pruned, Mask):
        return {}
    groups = left(model, pruned).cuttable
    return {module: keep for name, keep in pruned.keep.items() for module in getattr(groups[name], of)}


def describe_cuts(model: nn.Module, pruned: Mask | ChannelCut) -> tuple[str, ...]:
    """One line a layer: "producer -> consumer: kept of all"; and one a block that goes: "block: dropped"."""
    if isinstance(pruned, Mask):
        return tuple(f"{layer}: {int(k.count_nonzero())} of {k.numel()} weights" for layer, k in pruned.keep.items())
    groups = left(model, pruned).cuttable
    narrower = (f"{_ends(groups[name])}: {kept} of {pruned.total[name]}" for name, kept in pruned.kept.items())
    return (*narrower, *(f"{block}: dropped" for block in pruned.dropped))


def _ends(group: ChannelGroup) -> str:
    return " -> ".join(listed(ends) for ends in (group.producers, group.consumers) if ends)


def listed(names: Iterable[str]) -> str:
    """With " + " between; names that differ in one number as a shell writes them, `layer1.{0..5}.conv3`."""
    runs: list[list[list[str]]] = []
    for name in names:
        pieces = re.split(r"(\d+)", name)
        run = next((run for run in runs if len(run[0]) == len(pieces) and _is_run([*run, pieces])), None)
        runs += [[pieces]] if run is None else []
        if run is not None:
            run.append(pieces)
    return " + ".join("".join(_numbers(set(column)) for column in zip(*run, strict=True)) for run in runs)


def _is_run(names: list[list[str]]) -> bool:
    """They differ in one piece, and that is a number."""
    apart = [column for column in zip(*names, strict=True) if len(set(column)) > 1]
    return len(apart) == 1 and all(piece.isdecimal() for piece in apart[0])


def _numbers(pieces: set[str]) -> str:
    if len(pieces) == 1:
        return pieces.pop()
    numbers = sorted(int(piece) for piece in pieces)
    is_range = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
    return f"{{{numbers[0]}..{numbers[-1]}}}" if is_range else f"{{{','.join(map(str, numbers))}}}"


def refuse_broken(model: nn.Module) -> None:
    """Raise WeightsError naming the first tensor that holds NaN or infinity, or the first weight not in float32."""
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32:
            raise WeightsError(f"weights: {name} is {weight.dtype}; statistics and healing take float32: model.float()")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"weights: {name} holds NaN or infinity; the model cannot be compressed as it is")
