"""The gate: measurements and limits in, a verdict out. Pure; it measures nothing and moves nothing."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from heal.errors import InputError

QUALITY = ("max_drop_dense", "max_drop_champion", "min_agreement")

SLACK = 1e-9
"""Two shares of counted images differ by far more; the float difference 0.92 - 0.9 exceeds 0.02 by less."""


class GateError(InputError):
    """The gate has no limit that could tell a good model from a bad one."""


@dataclass(frozen=True)
class Gate:
    """The limits of `promotion` in the params; None does not limit.

    max_drop_dense, max_drop_champion: top-1 that may be lost against dense and against the champion,
    fractions in [0, 1]. min_agreement: the share of images that must get the dense model's class.
    max_bytes: of the weights file. max_macs: of one image. min_speedup: dense seconds / challenger seconds.
    """

    max_drop_dense: float | None = None
    max_drop_champion: float | None = None
    min_agreement: float | None = None
    max_bytes: int | None = None
    max_macs: int | None = None
    min_speedup: float | None = None

    @property
    def digest(self) -> str:
        """Names the limits: the same limits, the same digest."""
        return _digest(asdict(self))


@dataclass(frozen=True)
class Measured:
    """What champion and challenger did on the same images.

    top-1 values are fractions in [0, 1], None without labels (the champion's also without a champion);
    `agreement` is the challenger's with dense; `speedup` is None when it was not measured.
    """

    images: int
    agreement: float
    bytes: int
    macs: int
    dense_top1: float | None = None
    champion_top1: float | None = None
    challenger_top1: float | None = None
    speedup: float | None = None

    @property
    def labelled(self) -> bool:
        """Whether top-1 is known."""
        return self.challenger_top1 is not None and self.dense_top1 is not None


@dataclass(frozen=True)
class Criterion:
    """One limit and what was measured against it; `name` is the params key."""

    name: str
    measured: float
    limit: float
    passed: bool

    def __str__(self) -> str:
        outcome = "passed" if self.passed else "rejected"
        return f"{self.name:<18} {_shown(self.measured):<14} limit {_shown(self.limit):<14} {outcome}"


@dataclass(frozen=True)
class Verdict:
    """Every criterion that applied, whether all passed, and what names this verdict.

    `notes` say which limits could not apply, and why. `gate` is the digest of the limits, `evaluation`
    names the images and labels.
    """

    criteria: tuple[Criterion, ...]
    passed: bool
    digest: str
    gate: str
    evaluation: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [*(str(criterion) for criterion in self.criteria), *self.notes]
        return "\n".join([*lines, "passed" if self.passed else "rejected"])


def judge(measured: Measured, gate: Gate, evaluation: str = "") -> Verdict:
    """Hold every measurement against its limit. evaluation: names the images and labels that were measured on.

    Without labels quality is judged by agreement alone; the limits on bytes, MACs and speed need no
    labels and hold as ever. Raises GateError when no limit on quality would apply.
    """
    criteria = tuple(_criteria(measured, gate))
    if not any(criterion.name in QUALITY for criterion in criteria):
        wanted = " or ".join(QUALITY) if measured.labelled else "min_agreement, as there are no labels"
        raise GateError(f"promotion sets no limit on quality that can be held; set promotion.{wanted}")
    notes = tuple(_notes(measured, gate))
    content = [asdict(gate), asdict(measured), evaluation, notes]
    passed = all(criterion.passed for criterion in criteria)
    return Verdict(criteria, passed, _digest(content), gate.digest, evaluation, notes)


def _criteria(measured: Measured, gate: Gate) -> Iterator[Criterion]:
    """The limits that are set and can be held, in the order of the params."""
    found: dict[str, float | None] = {
        "max_drop_dense": _drop(measured.dense_top1, measured.challenger_top1),
        "max_drop_champion": _drop(measured.champion_top1, measured.challenger_top1),
        "min_agreement": measured.agreement,
        "max_bytes": measured.bytes,
        "max_macs": measured.macs,
        "min_speedup": math.nan if measured.speedup is None else measured.speedup,
    }
    for name, value in found.items():
        limit = getattr(gate, name)
        if limit is not None and value is not None:
            # NaN passes neither way.
            passed = value <= limit + SLACK if name.startswith("max") else value >= limit - SLACK
            yield Criterion(name, float(value), float(limit), passed)


def _drop(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else before - after


def _notes(measured: Measured, gate: Gate) -> Iterator[str]:
    if not measured.labelled:
        yield "no labels: quality is judged by agreement with dense alone"
    elif measured.champion_top1 is None and gate.max_drop_champion is not None:
        yield "no champion yet: max_drop_champion does not apply"


def _shown(value: float) -> str:
    """Shares and ratios with four decimals, bytes and MACs in full."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _digest(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
