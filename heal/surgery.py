"""The only slicer: cuts channels and blocks out of a model, so that its tensors get smaller and fewer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from heal.errors import ArchitectureError, MethodError
from heal.families.discovery import is_plain_attention
from heal.families.family import ChannelGroup, Family
from heal.families.heads import Heads
from heal.families.lookup import cuttable_or_raise, describe
from heal.families.narrow_attention import NarrowAttention
from heal.families.skips import Dropped
from heal.masking import write
from heal.naming import nearest
from heal.values import ChannelCut

SIZES = {  # attributes that say how many channels there are, by the side that is cut
    "rows": ("out_features", "out_channels"),
    "columns": ("in_features", "in_channels"),
    "channels": ("num_features", "in_channels", "out_channels", "groups"),
}


def cut(model: nn.Module, chosen: ChannelCut, family: Family | None = None) -> None:
    """Write the cut's updates, slice every chosen group in place, then drop blocks; nothing changes when something
    does not fit.

    New parameters keep requires_grad, dtype and device; optimisers made before hold the old ones.
    An attention whose heads lose dimensions is replaced by a NarrowAttention around the same layers.
    Raises ArchitectureError when a group is unknown, of another width, or cannot be sliced, or a block cannot be
    dropped, MethodError when heads and dimensions of one attention are to go at once.
    """
    _refuse_undroppable(model, chosen.dropped, family)
    groups = _fitting(model, chosen, family)
    write(model, chosen.updates)
    for group, keep in groups:
        indices = _indices(model, group, keep)
        for side, modules in _sides(group).items():
            for module in modules:
                _slice(model.get_submodule(module), side, indices[side])
        if group.attention:
            _settle(model, group, keep)
    drop(model, chosen.dropped, family)


def drop(model: nn.Module, blocks: Collection[str], family: Family | None = None) -> None:
    """Let the input of every such block pass on in its place. Raises ArchitectureError where that is another network:
    the block does not add to its input."""
    _refuse_undroppable(model, blocks, family)
    for block in blocks:
        swap(model, block, Dropped())


def swap(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put another module in the place of one; gives the one that stood there."""
    parent, _, child = name.rpartition(".")
    before = model.get_submodule(name)
    setattr(model.get_submodule(parent), child, module)
    return before


def _refuse_undroppable(model: nn.Module, blocks: Collection[str], family: Family | None) -> None:
    able = (family or describe(model)).droppable if blocks else ()
    other = [block for block in blocks if block not in able]
    if other:
        known = nearest(other[0], able) if able else "it has none that do"
        raise ArchitectureError(
            f"cut: {type(model).__name__} has no block {other[0]!r} that adds what it computes to its input, so it "
            f"cannot be dropped; {known}"
        )


def widths(model: nn.Module, family: Family | None = None) -> dict[str, int]:
    """How many channels every group has now; empty for a network without groups."""
    groups = (family or describe(model)).cuttable
    return {name: _width(model, group) for name, group in groups.items()}


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
    groups = (family or describe(model)).cuttable
    smaller = {name: width for name, width in to.items() if width < present[name]}
    heads = {name for name in smaller if groups[name].kind == "heads"}
    for names in (heads, smaller.keys() - heads):
        keep = {name: torch.arange(smaller[name]) for name in smaller if name in names}
        cut(model, ChannelCut(keep, {name: present[name] for name in keep}), family)


def _width(model: nn.Module, group: ChannelGroup) -> int:
    if group.attention:
        return Heads.of(model.get_submodule(group.attention)).width(group.kind)
    return _size(model.get_submodule(group.producers[0]), "rows")


def _indices(model: nn.Module, group: ChannelGroup, keep: Tensor) -> dict[str, Tensor]:
    """What stays of every side; of an attention, at the places that its layers have now."""
    if not group.attention:
        return dict.fromkeys(SIZES, keep)
    heads = Heads.of(model.get_submodule(group.attention))
    return {"rows": heads.rows(group.kind, keep), "columns": heads.columns(group.kind, keep)}


def _settle(model: nn.Module, group: ChannelGroup, keep: Tensor) -> None:
    """Let an attention whose layers were sliced know how many heads of which width there are."""
    attention: Any = model.get_submodule(group.attention)
    if group.kind == "heads":
        attention.num_heads = len(keep)
    if group.kind != "heads" or not hasattr(attention, "attn_dim"):  # older timm takes it for the width of tokens
        attention = NarrowAttention(attention)
        swap(model, group.attention, attention)
    heads = Heads.of(attention)
    attention.head_dim, attention.attn_dim = heads.v, heads.number * heads.v


def _fitting(model: nn.Module, chosen: ChannelCut, family: Family | None) -> list[tuple[ChannelGroup, Tensor]]:
    """The chosen groups that lose channels, each checked against the model. Raises ArchitectureError."""
    if not chosen.keep:
        return []
    groups = (family or cuttable_or_raise(model)).without(chosen.dropped).cuttable
    owners = _owners(model)
    for name, total in chosen.total.items():
        if name not in groups:
            raise ArchitectureError(f"cut: the model has no channel group {name!r}; {nearest(name, groups)}")
        for side, modules in _sides(groups[name]).items():
            for module in modules:
                _refuse_unless_sliceable(name, module, model.get_submodule(module), side, owners)
        _refuse_another_width(model, groups[name], chosen.keep[name], total)
    smaller = [(groups[name], keep) for name, keep in chosen.keep.items() if chosen.kept[name] < chosen.total[name]]
    _refuse_overlap([group for group, _ in smaller])
    return smaller


def _sides(group: ChannelGroup) -> dict[str, tuple[str, ...]]:
    return {"rows": group.modules, "channels": group.followers, "columns": group.consumers}


def _refuse_another_width(model: nn.Module, group: ChannelGroup, keep: Tensor, total: int) -> None:
    if group.attention:
        _refuse_other_heads(group, model.get_submodule(group.attention), keep, total)
        return
    for side, modules in _sides(group).items():
        for name in modules:
            module = model.get_submodule(name)
            if _size(module, side) != total:
                where = f"cut of {group.name}: {name} ({type(module).__name__})"
                raise ArchitectureError(f"{where} has {_size(module, side)} {side}, the cut was made for {total}")
    if keep.ndim != 1:
        raise ArchitectureError(f"cut of {group.name}: channels of kind {group.kind} are in no heads, so keep is 1-D")


def _refuse_other_heads(group: ChannelGroup, attention: nn.Module, keep: Tensor, total: int) -> None:
    where = f"cut of {group.name}: {group.attention} ({type(attention).__name__})"
    if not is_plain_attention(attention):
        raise ArchitectureError(f"{where} is not timm's plain Attention, so its heads cannot be cut")
    heads = Heads.of(attention)
    if heads.width(group.kind) != total:
        what = "heads" if group.kind == "heads" else "dimensions a head"
        raise ArchitectureError(f"{where} has {heads.width(group.kind)} {what}, the cut was made for {total}")
    if keep.ndim == 2 and (group.kind == "heads" or len(keep) != heads.number):
        raise ArchitectureError(
            f"{where} has {heads.number} heads, the cut has {len(keep)} rows; give a row of dimensions for every head, "
            "or one for all, and of heads one"
        )


def _refuse_overlap(groups: list[ChannelGroup]) -> None:
    whole = {group.attention for group in groups if group.kind == "heads"}
    for group in groups:
        if group.attention in whole and group.kind != "heads":
            raise MethodError(
                f"cut of {group.name}: heads of {group.attention} go as well, and with them dimensions; "
                "cut heads first, then dimensions of those that stay"
            )


def _refuse_unless_sliceable(
    group: str, name: str, module: nn.Module, side: str, owners: Mapping[int, list[str]]
) -> None:
    where = f"cut of {group}: {name} ({type(module).__name__})"
    if not (_is_channelwise(module) if side == "channels" else _is_matrix(module)):
        raise ArchitectureError(
            f"{where} cannot be sliced along its {side}; only Linear and ungrouped Conv2d can, "
            "and between them BatchNorm and depthwise Conv2d"
        )
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
