"""Masks: exact counts, N:M groups, and putting them into a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heal.errors import ArchitectureError, BudgetError, NumericalError
from heal.naming import nearest
from heal.values import NM, Mask


def keep_largest(scores: Tensor, kept: int) -> Tensor:
    """True for exactly `kept` of the scores (any shape); of equal scores the lower index stays.

    Raises BudgetError unless 0 <= kept <= scores.numel(), NumericalError on NaN.
    """
    if not 0 <= kept <= scores.numel():
        raise BudgetError(f"cannot keep {kept} of {scores.numel()} weights")
    order = torch.sort(_ordered(scores).flatten(), descending=True, stable=True).indices
    keep = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    keep[order[:kept]] = True
    return keep.reshape(scores.shape)


def keep_n_of_m(scores: Tensor, pattern: NM) -> Tensor:
    """True for exactly N scores of every M consecutive ones along the input; of equal ones the lower index stays.

    scores [out, in] or [out, in, h, w]: M input channels, at one place of the kernel, are a group. Raises
    BudgetError when M does not divide the channels, NumericalError on NaN.
    """
    groups = _groups(_ordered(scores), pattern)
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices
    keep = torch.zeros_like(groups, dtype=torch.bool)
    keep.scatter_(-1, order[..., : pattern.n], True)
    return keep.flatten(-2).movedim(-1, 1).contiguous()


def keep_best(scores: Tensor, kept: int, pattern: NM | None) -> Tensor:
    """`keep_n_of_m` where there is a pattern, else `keep_largest`."""
    return keep_largest(scores, kept) if pattern is None else keep_n_of_m(scores, pattern)


def keep_by_row(scores: Tensor, kept: int) -> Tensor:
    """True for exactly `kept` of the scores [out, ...], equally many of every row, the rest by the next score.

    Of equal scores the lower index stays. Raises BudgetError, NumericalError.
    """
    rows = _ordered(scores).flatten(1)
    each, rest = divmod(kept, len(rows))
    order = torch.sort(rows, dim=1, descending=True, stable=True).indices
    keep = torch.zeros_like(rows, dtype=torch.bool)
    keep.scatter_(1, order[:, :each], True)
    if rest:
        following = order[:, each]
        chosen = keep_largest(rows.gather(1, following.unsqueeze(1)).flatten(), rest)
        keep[chosen, following[chosen]] = True
    return keep.view_as(scores)


def carries(weight: Tensor, pattern: NM) -> bool:
    """Whether the channels of a weight's input are a multiple of M."""
    return weight.ndim > 1 and weight.shape[1] > 0 and weight.shape[1] % pattern.m == 0


def is_n_of_m(keep: Tensor, pattern: NM) -> bool:
    """Whether at most N stay in every group of M. Raises BudgetError when M does not divide the input."""
    return bool((_groups(keep, pattern).sum(-1) <= pattern.n).all())


def apply(model: nn.Module, mask: Mask) -> None:
    """Write the mask's updates, then zero what does not stay; nothing changes when something does not fit.

    Raises ArchitectureError when the mask or an update does not fit the model.
    """
    weights = {layer: masked_weight(model, layer, keep) for layer, keep in mask.keep.items()}
    write(model, mask.updates)
    with torch.no_grad():
        for layer, weight in weights.items():
            weight.masked_fill_(~mask.keep[layer].to(weight.device), 0)


def holds(model: nn.Module, mask: Mask) -> bool:
    """Whether every masked weight is zero. Raises ArchitectureError when the mask does not fit the model."""
    weights = {layer: masked_weight(model, layer, keep) for layer, keep in mask.keep.items()}
    return all(bool((w.detach()[~mask.keep[layer].to(w.device)] == 0).all()) for layer, w in weights.items())


def masked_weight(model: nn.Module, layer: str, keep: Tensor) -> Tensor:
    """The weight that a mask is for. Raises ArchitectureError when there is none of its shape."""
    modules = dict(model.named_modules())
    if layer not in modules:
        raise ArchitectureError(f"mask: the model has no layer {layer!r}; {nearest(layer, modules)}")
    weight = getattr(modules[layer], "weight", None)
    if not isinstance(weight, Tensor):
        raise ArchitectureError(f"mask: {layer} ({type(modules[layer]).__name__}) has no weight to mask")
    if weight.shape != keep.shape:
        raise ArchitectureError(
            f"mask: {layer} has a weight of shape {list(weight.shape)}, the mask is {list(keep.shape)}; "
            "it was made for another model"
        )
    return weight


def write(model: nn.Module, updates: Mapping[str, Tensor]) -> None:
    """Give parameters and buffers new values, all or none; a layer without a bias gets one.

    Raises ArchitectureError when a name or shape does not fit, NumericalError on NaN or infinity.
    """
    places = {name: _place(model, name, value) for name, value in updates.items()}
    with torch.no_grad():
        for name, (owner, leaf) in places.items():
            present = getattr(owner, leaf)
            if present is None:
                weight = owner.get_parameter("weight")
                owner.register_parameter(leaf, nn.Parameter(updates[name].to(weight), weight.requires_grad))
            else:
                present.copy_(updates[name])


def _place(model: nn.Module, name: str, value: Tensor) -> tuple[nn.Module, str]:
    """The module and the attribute that an update is for."""
    path, _, leaf = name.rpartition(".")
    owner = dict(model.named_modules()).get(path)
    present = getattr(owner, leaf, None)
    if isinstance(present, Tensor):
        shape = list(present.shape)
    elif leaf == "bias" and isinstance(owner, (nn.Linear, nn.Conv2d)):
        shape = [len(owner.weight)]
    else:
        raise ArchitectureError(f"update: the model has no tensor {name!r}; {nearest(name, model.state_dict())}")
    if list(value.shape) != shape:
        raise ArchitectureError(f"update: {name} has shape {shape}, the new value {list(value.shape)}")
    if not bool(torch.isfinite(value).all()):
        raise NumericalError(f"update: the new value of {name} is not finite")
    assert owner is not None
    return owner, leaf


def _ordered(scores: Tensor) -> Tensor:
    if bool(torch.isnan(scores).any()):
        raise NumericalError("scores: some are NaN, so they have no order; the weights or statistics hold NaN")
    return scores.detach()


def _groups(x: Tensor, pattern: NM) -> Tensor:
    """[out, ..., in / M, M] of a tensor [out, in, ...]."""
    if not carries(x, pattern):
        inputs = x.shape[1] if x.ndim > 1 else 0
        raise BudgetError(
            f"{pattern} does not fit a weight of shape {list(x.shape)}: "
            f"its input, {inputs}, is not a multiple of {pattern.m}; leave the layer out, or choose another pattern"
        )
    last = x.movedim(1, -1)
    return last.reshape(*last.shape[:-1], -1, pattern.m)
