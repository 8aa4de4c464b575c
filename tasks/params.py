"""The experiment's params: one file and its overrides, checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from heal.errors import MethodError
from tasks import auto, methods
from tasks import params_schema as schema
from tasks.params_check import checked
from tasks.params_file import Json, ParamsError, Written, override, read

if TYPE_CHECKING:
    from heal.method import Allocator, Healer, Pruner

__all__ = ["Params", "ParamsError", "UndeclaredReadError", "load", "of"]

Scalar: TypeAlias = str | int | float | bool | None
AnySection = TypeVar("AnySection", bound=schema.Section)

# What a stage is permitted, not what it computes: open to every stage, part of no key.
PERMISSIONS = ("dense.adapter_allow",)


class UndeclaredReadError(Exception):
    """A stage read a param that its row in table.py does not declare: a bug in the stage."""


def load(path: Path | None, overrides: Sequence[str] = ()) -> Params:
    """The params of a file (None: the defaults) with `section.key=value` overrides on top.

    Raises ParamsError with one line for each thing to change, MethodError when the methods named make no sense
    together. Methods that are left to `auto` are chosen when one of them is first asked for, as only then the dense
    model must be there; what is wrong with them is raised then.
    """
    return of(override(Written() if path is None else read(path), overrides), override(Written(), overrides).places)


def of(written: Written, overridden: Mapping[str, str] | None = None) -> Params:
    """The params of values that were written somewhere. overridden: the places of overrides. Raises as `load` does."""
    whole = _Whole(checked(written), written, overridden or {})
    if not auto.is_open(whole.given):
        _ = whole.settled
    return Params(whole)


@dataclass(frozen=True)
class _Whole:
    """All sections, as given, and with every `auto` settled."""

    given: schema.Sections
    written: Written = field(compare=False)
    overridden: Mapping[str, str] = field(compare=False)

    @cached_property
    def settled(self) -> _Settled:
        """Raises InputError subclasses."""
        sections, written, why = self.given, self.written, ""
        if auto.is_open(sections):
            written, why = auto.settled(written, sections)
            sections = checked(written)
        contradictions = list(methods.contradictions(sections, lambda key: _place(written, key)))
        if contradictions:
            raise MethodError("\n".join(contradictions))
        idle = list(dict.fromkeys(methods.idle(sections, self.overridden)))
        if idle:
            raise ParamsError(idle)
        return _Settled(sections, written, why)


class _Settled(NamedTuple):
    """The sections, where their values were set, and for whom methods were chosen, "" where all were named."""

    sections: schema.Sections
    written: Written
    why: str


@dataclass(frozen=True)
class Params:
    """Every section, typed; `restrict` gives a stage the part that it declares.

    `allowed` holds the dotted keys that may be read (None: all).
    """

    whole: _Whole = field(repr=False)
    allowed: tuple[str, ...] | None = None

    @property
    def sections(self) -> schema.Sections:
        """All of them, with methods in place of every `auto`."""
        return self.whole.settled.sections

    @property
    def dense(self) -> schema.Dense:
        return self._section("dense", schema.Dense)

    @property
    def calibration(self) -> schema.Calibration:
        return self._section("calibration", schema.Calibration)

    @property
    def activations(self) -> schema.Activations:
        return self._section("activations", schema.Activations)

    @property
    def allocation(self) -> schema.Allocation:
        return self._section("allocation", schema.Allocation)

    @property
    def pruning(self) -> schema.Pruning:
        return self._section("pruning", schema.Pruning)

    @property
    def healing(self) -> schema.Healing:
        return self._section("healing", schema.Healing)

    @property
    def evaluation(self) -> schema.Evaluation:
        return self._section("evaluation", schema.Evaluation)

    @property
    def report(self) -> schema.Report:
        return self._section("report", schema.Report)

    @property
    def registration(self) -> schema.Registration:
        return self._section("registration", schema.Registration)

    @property
    def promotion(self) -> schema.Promotion:
        return self._section("promotion", schema.Promotion)

    @property
    def is_digits(self) -> bool:
        """Whether the images are the embedded digits, on which a missing model may be trained."""
        return self.whole.given.calibration.source == "digits"

    @property
    def title(self) -> str:
        """What a run does: "digits-vit: remove 0.5 of neurons by variance, heal by closed_form + starfish"."""
        budget, healers = self.allocation.budget.build(), " + ".join(self.healing.methods)
        removed = f"remove {budget.fraction:g} of {budget.unit} by {self.pruning.method}"
        rounds = f" in {self.healing.rounds} rounds" if self.healing.rounds > 1 else ""
        return f"{self.registration.name}: {removed}, heal by {healers}{rounds}"

    def allocator(self) -> Allocator:
        """The allocator that allocation.method names."""
        self._require("allocation")
        return methods.allocator(self.sections)

    def pruner(self) -> Pruner:
        """The pruner that pruning.method names."""
        self._require("pruning")
        return methods.pruner(self.sections)

    def healers(self) -> tuple[Healer, ...]:
        """The healers that healing.methods names, in order."""
        self._require("healing")
        return tuple(methods.healer(self.sections, name) for name in self.sections.healing.methods)

    def methods(self) -> tuple[Allocator | Pruner | Healer, ...]:
        """All methods, for a stage that reads only their `needs`: it declares the three method names."""
        for section, key in methods.METHOD_KEYS.items():
            self._require(f"{section}.{key}")
        healers = [methods.healer(self.sections, name) for name in self.sections.healing.methods]
        return (methods.allocator(self.sections), methods.pruner(self.sections), *healers)

    def slice(self, keys: Sequence[str]) -> dict[str, Json]:
        """The values under the dotted keys, defaults filled in: what a stage's key is made of.

        Of the methods' params only those of the methods named count. A method's name alone
        (`healing.methods`) stands for the statistics that those methods need, as `needs`.
        """
        # A permission that is not given counts in no section: what was made before there was such a param is found.
        without = PERMISSIONS if self.whole.given.calibration.labels else (*PERMISSIONS, "calibration.labels")
        found: dict[str, Json] = {}
        for key in keys:
            section, _, leaf = key.partition(".")
            if leaf and leaf == methods.METHOD_KEYS.get(section):
                found["needs"] = list(methods.needs(self.sections))
            elif leaf:
                found[section] = {**_mapping(found.get(section)), leaf: self._plain(section)[leaf]}
            else:
                found[section] = self._plain(section, without)
        return found

    def restrict(self, keys: Sequence[str]) -> Params:
        """The same params, of which only the dotted keys may be read."""
        return replace(self, allowed=tuple(keys))

    def method_modules(self, keys: Sequence[str]) -> tuple[str, ...]:
        """The modules of the named methods whose whole section is among the keys."""
        used = [(section, name) for section, name in methods.named(self.sections) if section in keys]
        return tuple(methods.known(section)[name].__module__ for section, name in used)

    def where(self, dotted: str) -> str:
        """Where a key was set: "params.yaml:12", "-S a.b=1", or "default"."""
        is_settled = dotted.partition(".")[0] in methods.METHOD_KEYS
        return _place(self.whole.settled.written if is_settled else self.whole.written, dotted)

    @property
    def chosen(self) -> str:
        """What `auto` stands for, and why; empty where every method was named."""
        why = self.whole.settled.why
        return f"{why}: {', '.join(name for _, name in methods.named(self.sections))}" if why else ""

    def flat(self) -> dict[str, Scalar]:
        """Dotted key -> scalar, for MLflow; lists become comma-separated text."""
        return {
            f"{section}.{key}": value
            for section in schema.Sections.model_fields
            for key, value in _leaves(self._plain(section))
        }

    def _section(self, name: str, kind: type[AnySection]) -> AnySection:
        section: AnySection = self._whole_section(name)
        if self.allowed is None or name in self.allowed:
            return section
        leaves = frozenset(key.partition(".")[2] for key in (*self.allowed, *PERMISSIONS) if key.startswith(f"{name}."))
        return _Partial(section, name, leaves)  # type: ignore[return-value]

    def _whole_section(self, name: str) -> Any:
        """Only sections that name methods need them settled."""
        return getattr(self.sections if name in methods.METHOD_KEYS else self.whole.given, name)

    def _require(self, key: str) -> None:
        if self.allowed is not None and not {key, key.partition(".")[0]} & set(self.allowed):
            raise UndeclaredReadError(f"{key} is read but not declared in the stage's row of table.py")

    def _plain(self, section: str, without: Sequence[str] = ()) -> dict[str, Json]:
        values: dict[str, Json] = self._whole_section(section).model_dump(mode="json")
        others = set[str]()
        if section in methods.METHOD_KEYS:
            others = set(methods.known(section)) - {name for of, name in methods.named(self.sections) if of == section}
        return {key: value for key, value in values.items() if key not in others and f"{section}.{key}" not in without}


def _place(written: Written, dotted: str) -> str:
    return written.place(dotted) or "default"


class _Partial:
    """A section of which only some keys may be read."""

    def __init__(self, section: schema.Section, name: str, leaves: frozenset[str]) -> None:
        self._section, self._name, self._leaves = section, name, leaves

    def __getattr__(self, key: str) -> Any:
        if key not in self._leaves:
            raise UndeclaredReadError(f"{self._name}.{key} is read but not declared in the stage's row of table.py")
        return getattr(self._section, key)


def _leaves(values: Mapping[str, Json]) -> Iterator[tuple[str, Scalar]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{below}", leaf) for below, leaf in _leaves(value))
        elif isinstance(value, list):
            yield key, ", ".join(str(item) for item in value)
        else:
            yield key, value


def _mapping(value: Json) -> dict[str, Json]:
    return value if isinstance(value, dict) else {}
