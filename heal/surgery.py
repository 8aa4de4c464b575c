"""The only slicer: cuts channels out of a model, so that its tensors get smaller."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from heal.errors import ArchitectureError
from heal.families.family import ChannelGroup, Family
from heal.families.lookup import cuttable_or_raise, describe
from heal.masking import write
from heal.naming import nearest
from heal.values import ChannelCut

SIZES = {  # attributes that say how many channels there are, by the side that is cut
    "rows": ("out_features", "out_channels"),
    "columns": ("in_features", "in_channels"),
    "channels": ("num_features", "in_channels", "out_channels", "groups"),
}


def cut(model: nn.Module, chosen: ChannelCut, family: Family | None = None) -> None:
    """Write the cut's updates, then slice every chosen group in place; nothing changes when something does not fit.

    New parameters keep requires_grad, dtype and device; optimisers made before hold the old ones.
    Raises ArchitectureError when a group is unknown, of another width, or cannot be sliced.
    """
    groups = _fitting(model, chosen, family)
    write(model, chosen.updates)
    for group, keep in groups:
        for producer in group.producers:
            _slice(model.get_submodule(producer), "rows", keep)
        for follower in group.followers:
            _slice(model.get_submodule(follower), "channels", keep)
        for consumer in group.consumers:
            _slice(model.get_submodule(consumer), "columns", keep)


def widths(model: nn.Module, family: Family | None = None) -> dict[str, int]:
    """How many channels every group has now; empty for a network without groups."""
    groups = (family or describe(model)).cuttable
    return {name: _size(model.get_submodule(group.producers[0]), "rows") for name, group in groups.items()}


def shrink(model: nn.Module, to: Mapping[str, int], family: Family | None = None) -> None:
    """Give groups the widths of an earlier cut, so that its weights can be loaded; which channels stay is arbitrary.

    Raises ArchitectureError when a group is unknown, or the width is not within 1..present.
    """
    present = widths(model, family)
    for name, width in to.items():
        if name not in present:
            raise ArchitectureError(f"the model has no channel group {name!r}; {nearest(name, present)}")
        if not 1 <= width <= present[name]:
            raise ArchitectureError(f"channel group {name} has {present[name]} channels and cannot be given {width}")
    smaller = {name: width for name, width in to.items() if width < present[name]}
    keep = {name: torch.arange(width) for name, width in smaller.items()}
    cut(model, ChannelCut(keep, {name: present[name] for name in smaller}), family)


def _fitting(model: nn.Module, chosen: ChannelCut, family: Family | None) -> list[tuple[ChannelGroup, Tensor]]:
    """The chosen groups that lose channels, each checked against the model. Raises ArchitectureError."""
    if not chosen.keep:
        return []
    groups = (family or cuttable_or_raise(model)).cuttable
    owners = _owners(model)
    for name, total in chosen.total.items():
        if name not in groups:
            raise ArchitectureError(f"cut: the model has no channel group {name!r}; {nearest(name, groups)}")
        for side, modules in _sides(groups[name]).items():
            for module in modules:
                _refuse_unless_sliceable(name, module, model.get_submodule(module), side, total, owners)
    return [(groups[name], keep) for name, keep in chosen.keep.items() if len(keep) < chosen.total[name]]


def _sides(group: ChannelGroup) -> dict[str, tuple[str, ...]]:
    return {"rows": group.producers, "channels": group.followers, "columns": group.consumers}


def _refuse_unless_sliceable(
    group: str, name: str, module: nn.Module, side: str, total: int, owners: Mapping[int, list[str]]
) -> None:
    where = f"cut of {group}: {name} ({type(module).__name__})"
    if not (_is_channelwise(module) if side == "channels" else _is_matrix(module)):
        raise ArchitectureError(
            f"{where} cannot be sliced along its {side}; only Linear and ungrouped Conv2d can, "
            "and between them BatchNorm and depthwise Conv2d"
        )
    if _size(module, side) != total:
        raise ArchitectureError(f"{where} has {_size(module, side)} {side}, the cut was made for {total}")
    for leaf, parameter in module._parameters.items():
        shared = owners.get(id(parameter), [])
        if len(shared) > 1:
            others = " and ".join(owner for owner in shared if owner != name)
            raise ArchitectureError(f"{where} shares its {leaf} with {others}; cutting would part them")


def _is_matrix(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    return plain and module._parameters.get("weight") is not None  # else reparametrised


def _is_channelwise(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == module.in_channels == module.out_channels
    return isinstance(module, _BatchNorm)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Which modules hold each parameter, by its id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _size(module: nn.Module, side: str) -> int:
    return next(int(getattr(module, attribute)) for attribute in SIZES[side] if hasattr(module, attribute))


def _slice(module: nn.Module, side: str, keep: Tensor) -> None:
    """Select channels of every tensor that has them, and say the new number wherever it is kept."""
    tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    for name, tensor in tensors.items():
        axis = 1 if side == "columns" else 0
        if tensor.ndim > axis:
            setattr(module, name, _selected(tensor, axis, keep))
    for attribute in SIZES[side]:
        if hasattr(module, attribute):
            setattr(module, attribute, len(keep))


def _selected(tensor: Tensor, axis: int, keep: Tensor) -> Tensor:
    selected = tensor.detach().index_select(axis, keep.to(tensor.device))
    return nn.Parameter(selected, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else selected
