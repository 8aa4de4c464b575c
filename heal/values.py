"""The values that travel between methods: frozen, checked when they are made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from heal.errors import BudgetError, NumericalError

UNITS = ("weights", "neurons", "blocks", "macs")


@dataclass(frozen=True)
class Budget:
    """How much to remove: one fraction in [0, 1), named by its unit.

    `weights` counts the weights of the pool (masks), `neurons` the channels that can be cut, `blocks` the blocks that
    can be dropped (cuts). `macs` counts multiply-accumulates of one image: of masks the weights of the pool, each as
    often as it is used, of cuts the whole network's. Raises BudgetError unless exactly one is given.
    """

    weights: float | None = None
    neurons: float | None = None
    macs: float | None = None
    blocks: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise BudgetError(f"a budget names exactly one unit of {', '.join(UNITS)}; got {given or 'none'}")
        if not 0 <= self.fraction < 1:
            hint = f"; did you mean {self.fraction / 100:g}?" if 1 <= self.fraction < 100 else ""
            raise BudgetError(
                f"budget {self.unit} = {self.fraction:g} is not a fraction in [0, 1), the share to remove{hint}"
            )

    @property
    def unit(self) -> str:
        """`weights`, `neurons`, `blocks` or `macs`."""
        return next(name for name in UNITS if getattr(self, name) is not None)

    def removes(self, allocator_unit: str) -> str:
        """What goes, `weights`, `neurons` or `blocks`: MACs are saved by whichever the allocator removes."""
        return allocator_unit if self.unit == "macs" else self.unit

    @property
    def fraction(self) -> float:
        """The removed share, in [0, 1)."""
        return float(getattr(self, self.unit))

    def kept(self, total: int) -> int:
        """How many of `total` stay: (1 - fraction) * total, rounded half up, with the fraction as decimals write it."""
        return math.floor((1 - Fraction(repr(self.fraction))) * total + Fraction(1, 2))


@dataclass(frozen=True)
class NM:
    """An N:M pattern: at most `n` weights stay in every group of `m` along the input."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise BudgetError(f"N:M pattern {self.n}:{self.m} needs 0 < N < M (N weights of every M stay)")

    @classmethod
    def of(cls, text: str) -> NM:
        """Of "N:M". Raises BudgetError."""
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if found is None:
            raise BudgetError(f"N:M pattern {text!r} is not two numbers, as in 2:4 (2 weights of every 4 stay)")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Allocation:
    """How many of each layer stay: weights of a prunable layer, channels of a group, or 0 or 1 of a block.

    `kept` and `total` map a dotted name to a count; `asked` is the number the budget asked for.
    `cost`: what one of a layer's weights costs of the budget, if not 1 (MACs). `evidence`: what the
    decision rests on, as plain JSON values. `pattern`: how the weights that stay lie in every layer, if not anyhow.
    """

    unit: str
    kept: Mapping[str, int]
    total: Mapping[str, int]
    asked: int
    cost: Mapping[str, int] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    pattern: NM | None = None

    def __post_init__(self) -> None:
        if self.unit not in ("weights", "neurons", "blocks"):
            raise BudgetError(f"an allocation is in weights, neurons or blocks, not {self.unit!r}")
        if self.kept.keys() != self.total.keys():
            raise BudgetError("an allocation must say kept and total for the same layers")
        for layer, kept in self.kept.items():
            if not 0 <= kept <= self.total[layer]:
                raise BudgetError(f"layer {layer}: cannot keep {kept} of {self.total[layer]} {self.unit}")

    @property
    def budget(self) -> dict[str, str | int]:
        """What the budget counts (`unit`: one of UNITS), and of that `asked`, `got` and the `total`."""
        macs = self.evidence.get("macs") if self.unit != "weights" else None
        if macs is not None:
            return {"unit": "macs", "asked": macs["asked"], "got": macs["got"], "total": macs["dense"]}
        unit = "macs" if self.cost else self.unit
        return {"unit": unit, "asked": self.asked, "got": self.got, "total": self.whole}

    @property
    def got(self) -> int:
        """How much of the budget is spent: how many stay, each at its cost."""
        return sum(kept * self.cost.get(layer, 1) for layer, kept in self.kept.items())

    @property
    def whole(self) -> int:
        """What keeping everything would cost, in the unit of `asked`."""
        return sum(total * self.cost.get(layer, 1) for layer, total in self.total.items())

    def sparsity(self, layer: str) -> float:
        """The removed share of one layer, in [0, 1]."""
        return 1 - self.kept[layer] / self.total[layer] if self.total[layer] else 0.0


@dataclass(frozen=True)
class Mask:
    """Which weights stay.

    `keep` maps a layer's dotted name to a bool tensor of its weight's shape. `updates` maps a
    parameter's dotted name to the value it takes before masking (methods that also repair). `pattern`
    is what every layer obeys, so that whoever moves the mask keeps to it.
    """

    keep: Mapping[str, Tensor]
    updates: Mapping[str, Tensor] = field(default_factory=dict)
    pattern: NM | None = None

    def __post_init__(self) -> None:
        for layer, keep in self.keep.items():
            if keep.dtype != torch.bool:
                raise TypeError(f"mask of {layer} must be bool, not {keep.dtype}")

    @property
    def zeros(self) -> int:
        """How many weights go."""
        return sum(int(keep.numel() - keep.count_nonzero()) for keep in self.keep.values())

    @property
    def total(self) -> int:
        """How many weights the masked layers have."""
        return sum(keep.numel() for keep in self.keep.values())


@dataclass(frozen=True)
class ChannelCut:
    """Which channels stay, and which blocks go; the tensors get smaller and fewer.

    `keep` maps a channel group's name to the ascending int64 indices that stay, `total` to its
    width before. Indices are [kept], or [heads, kept] where every head of attention keeps dimensions of its own;
    the width is then that of one head. `updates` maps a parameter's dotted name to the value it takes, at its shape
    before the cut (mean folding writes the consumers' biases so). `dropped`: dotted names of the blocks that go, of
    whose channels `keep` says nothing; it may be empty then.
    """

    keep: Mapping[str, Tensor]
    total: Mapping[str, int]
    updates: Mapping[str, Tensor] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.dropped)) < len(self.dropped):
            raise ValueError(f"a cut names a block twice: {', '.join(self.dropped)}")
        if self.keep.keys() != self.total.keys():
            raise ValueError("a cut must say keep and total for the same groups")
        for group, keep in self.keep.items():
            if keep.dtype != torch.int64 or keep.ndim not in (1, 2):
                raise TypeError(f"cut of {group} must be an int64 tensor of indices, 1-D, or 2-D with a row a head")
            if keep.numel() == 0:
                raise BudgetError(f"cut of {group} would leave no channel; lower the budget")
            if bool((keep.diff() <= 0).any()) or int(keep.min()) < 0 or int(keep.max()) >= self.total[group]:
                raise ValueError(f"cut of {group}: indices must ascend within 0..{self.total[group] - 1}")

    @property
    def kept(self) -> dict[str, int]:
        """How many channels of every group stay."""
        return {group: keep.shape[-1] for group, keep in self.keep.items()}

    @property
    def removed(self) -> int:
        """How many channels and blocks go."""
        return sum(self.total.values()) - sum(self.kept.values()) + len(self.dropped)


@dataclass(frozen=True)
class LayerStats:
    """Moments of one tap over all rows (image x position): float64, mergeable.

    `mean` [d], `m2` [d] the sum of squared deviations, `comoment` [d, d] the sum of products of
    deviations (None when it was not asked for; of patches [groups, d / groups, d / groups]). `images`: how many
    the rows come from, 0 where nobody counted. Raises NumericalError when not finite.
    """

    count: int
    mean: Tensor
    m2: Tensor
    comoment: Tensor | None = None
    images: int = 0

    def __post_init__(self) -> None:
        for name in ("mean", "m2", "comoment"):
            value = getattr(self, name)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise NumericalError(f"statistics: {name} is not finite; the weights or images hold NaN or infinity")
        if bool((self.m2 < 0).any()):
            raise NumericalError("statistics: a variance came out negative")

    @property
    def variance(self) -> Tensor:
        """Per channel [d], divisor N - 1 (Welford, VBP section 3)."""
        return self.m2 / max(self.count - 1, 1)

    @property
    def covariance(self) -> Tensor:
        """Over channels [d, d], divisor N."""
        if self.comoment is None:
            raise NumericalError("statistics: the second moment was not captured; the method must declare it needs it")
        return self.comoment / self.count


Statistics = Mapping[str, LayerStats]
"""Moments by tap: "<module>.input", ".output", ".patches/0" or ".saliency"."""
