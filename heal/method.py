"""What every method is given and gives back, and when a combination makes sense."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from heal.channels import pool, second_moment_tap
from heal.errors import ArchitectureError, MethodError
from heal.families.discovery import batch_norms
from heal.families.family import HIDDEN, Family
from heal.families.lookup import cuttable_or_raise, describe, droppable_or_raise
from heal.families.parts import parts
from heal.healer_rules import refuse_idle, refuse_order, refuse_rounds
from heal.images import Images
from heal.progress import Report, quiet
from heal.values import Allocation, Budget, ChannelCut, Mask, Statistics
from heal.variances import refuse_statistic


class Allocator(Protocol):
    """Where to prune. `unit` is the budget's; `needs` names the statistics it reads."""

    unit: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]: ...

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation: ...


class Pruner(Protocol):
    """Which weights or channels go."""

    unit: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]: ...

    def prune(self, model: nn.Module, allocation: Allocation, statistics: Statistics) -> Mask | ChannelCut: ...


class Healer(Protocol):
    """How to repair: the student in place, towards the teacher."""

    unit: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]: ...

    def heal(self, student: nn.Module, teacher: nn.Module, images: Images, context: HealContext) -> HealingReport: ...


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method is given beside the networks.

    statistics: the dense model's moments. seed: of every random draw. checkpoints: a folder to save to
    and resume from, or None; checkpoint_saved: called after each.
    """

    statistics: Statistics = field(default_factory=dict)
    seed: int = 0
    checkpoints: Path | None = None
    checkpoint_saved: Callable[[], None] = lambda: None
    report: Report = quiet
    log: Callable[[str], None] = lambda message: None


@dataclass(frozen=True, kw_only=True)
class AllocationContext(Context):
    """images: the calibration images, for the allocators that run the model.

    labels: int64 [n], the classes of the images in their order, for allocators that were told to read them.
    """

    images: Images | None = None
    labels: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class HealContext(Context):
    """pruned: what was cut or masked. cache_bytes: memory for cached teacher states; spill_bytes: disk for them."""

    pruned: Mask | ChannelCut
    cache_bytes: int = 2 * 2**30
    spill_bytes: int = 32 * 2**30


@dataclass(frozen=True)
class HealingReport:
    """What a healer did: loss per step, mean cosine per block before and after, seconds, notes.

    pruned: what is pruned now, where the healer moved it; None where it is as before. round: of those in which was
    cut, from 1.
    """

    method: str
    params: Mapping[str, Any]
    losses: tuple[float, ...] = ()
    alignment_before: Mapping[str, float] = field(default_factory=dict)
    alignment_after: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    pruned: Mask | ChannelCut | None = None
    round: int = 1


def after(context: HealContext, report: HealingReport) -> HealContext:
    """The context of the next healer: what the one before pruned anew counts from then on."""
    return context if report.pruned is None else replace(context, pruned=report.pruned)


def check(
    model: nn.Module,
    budget: Budget,
    allocator: Allocator,
    pruner: Pruner,
    healers: Iterable[Healer],
    rounds: int = 1,
) -> None:
    """Refuse a combination that makes no sense, with the reason. Raises MethodError, ArchitectureError."""
    family, healers = describe(model), list(healers)
    methods: list[tuple[str, Allocator | Pruner | Healer]] = [("allocator", allocator), ("pruner", pruner)]
    methods += [("healer", healer) for healer in healers]
    removed = budget.removes(allocator.unit)
    for kind, method in methods:
        if method.unit not in ("any", removed):
            whose = f"allocator works on {removed}" if budget.unit == "macs" else f"budget is in {budget.unit}"
            raise MethodError(
                f"{kind} {name_of(method)} works on {method.unit}, but the {whose}; "
                f"give a budget in {method.unit} or choose another {kind}"
            )
        if "block_outputs" in method.needs and not family.blocks:
            raise ArchitectureError(
                f"{kind} {name_of(method)} aligns block outputs, but family {family.name} names no blocks; "
                "choose another, or bring a family table"
            )
        _refuse_missing(model, family, f"{kind} {name_of(method)}", method.needs)
    refuse_unit(model, removed)
    names, kinds = [name_of(healer) for healer in healers], kinds_of(allocator.needs)
    refuse_order(names, name_of(pruner))
    patterned = getattr(allocator, "pattern", None) is not None
    refuse_rounds(rounds, names, bool(getattr(pruner, "writes_weights", False)), patterned)
    if kinds:
        refuse_idle(names, kinds)
        refuse_statistic(f"pruner {name_of(pruner)}", getattr(pruner, "statistic", "post"), kinds)
        unable = [kind for kind in kinds if kind not in getattr(pruner, "kinds", kinds)]
        if unable:
            raise MethodError(
                f"pruner {name_of(pruner)} cannot rank channels of kind {', '.join(unable)}; take variance"
            )


def _refuse_missing(model: nn.Module, family: Family, who: str, needs: frozenset[str]) -> None:
    kind, normalised = type(model).__name__, bool(batch_norms(model))
    if "batch_norms" in needs and not normalised:
        raise ArchitectureError(f"{who} works on BatchNorms, but {kind} has none; choose another")
    if "no_batch_norms" in needs and normalised:
        raise ArchitectureError(
            f"{who} is for networks without BatchNorm, and {kind} has it; choose batchnorm_recalibration or "
            "variance_matching"
        )
    if kinds_of(needs):
        _refuse_no_group(model, who, kinds_of(needs))
    if "projections" in needs and not family.projections:
        raise ArchitectureError(f"{who} is about projections on skip paths, but family {family.name} names none")
    if "last_norm" in needs and not family.last_norm:
        raise ArchitectureError(f"{who} compares the norm behind the blocks (final), but family {family.name} has none")
    if "norms" in needs and not family.norms:
        raise ArchitectureError(f"{who} rewrites the weights of norms, but family {family.name} names none")


def _refuse_no_group(model: nn.Module, who: str, kinds: list[str]) -> None:
    try:
        pool(model, kinds)
    except ArchitectureError as error:
        raise ArchitectureError(f"{who}: {error}") from error


def refuse_unit(model: nn.Module, removed: str) -> None:
    """Raise ArchitectureError when the family's table cannot serve what goes: weights, neurons or blocks."""
    if removed == "neurons":
        cuttable_or_raise(model)
    if removed == "blocks":
        droppable_or_raise(model)


def taps(
    model: nn.Module, methods: Iterable[Allocator | Pruner | Healer], cut: frozenset[str] = frozenset()
) -> dict[str, bool]:
    """The taps that the union of the methods' needs asks for; True where the second moment is.

    cut: the needs of whoever chose the channels ("cuts <kind>"), where no allocator is among the methods.
    """
    family = describe(model)
    needs = cut.union(*(method.needs for method in methods))
    wanted = _taps_of_cuts(model, family, needs)
    if any("patches" in need for need in needs) or "inputs" in needs:
        for layer, part in parts(model, family).items():
            if f"{part} patches" in needs:
                wanted[f"{layer}.patches"] = True
            if "inputs" in needs:
                wanted.setdefault(f"{layer}.input", False)
    return wanted


def _taps_of_cuts(model: nn.Module, family: Family, needs: frozenset[str]) -> dict[str, bool]:
    """Of the groups that the allocator cuts ("cuts <kind>"), or of all hidden channels where none says so."""
    wanted: dict[str, bool] = {}
    for group in family.groups_of(kinds_of(needs) or HIDDEN).values():
        if group.kind == "qk" and needs & {"moments", "qk_second_moment"}:
            wanted[f"{group.modules[0]}.output"] = "qk_second_moment" in needs
        for consumer in group.consumers:
            if needs & {"moments", "channel_second_moment"}:
                wanted[f"{consumer}.input"] = "channel_second_moment" in needs
            if "second_moment" in needs:
                wanted[second_moment_tap(model, consumer)] = True
            if "saliency" in needs:
                wanted[f"{consumer}.saliency"] = False
        if "preactivation_moments" in needs and not group.attention:
            wanted[f"{group.producers[0]}.output"] = False
    return wanted


def kinds_of(needs: frozenset[str]) -> list[str]:
    """The kinds of channels that an allocator with these needs cuts."""
    return [need.removeprefix("cuts ") for need in sorted(needs) if need.startswith("cuts ")]


def name_of(method: object) -> str:
    """The method's name in params.yaml: its file's name."""
    return type(method).__module__.rpartition(".")[2]
