"""A sweep's YAML: models x methods x budgets x seeds, every point's params checked before any of them runs."""

from __future__ import annotations

import copy
import fnmatch
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heal.errors import InputError, MethodError
from heal.naming import nearest
from tasks import keys, methods, params_file, sweep_check
from tasks import params as parameters
from tasks.params import Params, ParamsError
from tasks.params_file import Json, Written
from tasks.sweep_check import BUDGET, SEEDS
from tasks.table import up_to

STAGES = up_to("evaluation")
"""What a point runs: neither registration nor promotion, for a sweep must not flood the registry."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep. `budget` is UNIT=SHARE, such as weights=0.9."""

    model: str
    method: str
    budget: str
    seed: int
    params: Params

    @property
    def name(self) -> str:
        """MODEL/METHOD/BUDGET/SEED."""
        return f"{self.model}/{self.method}/{self.budget}/{self.seed}"

    @property
    def digest(self) -> str:
        """Of all params that the point's stages read: two points with the same digest ask for the same."""
        sections = dict.fromkeys(key.partition(".")[0] for stage in STAGES.values() for key in stage.params)
        return keys.sha256(keys.canonical(self.params.slice(tuple(sections))))


@dataclass(frozen=True)
class Sweep:
    """Points in the order of the file: models, in them methods, in them budgets, in them seeds."""

    name: str
    points: tuple[Point, ...]

    def matching(self, pattern: str | None) -> tuple[Point, ...]:
        """The points whose names match a glob, in which * also stands for slashes (None: all). Raises InputError."""
        if pattern is None:
            return self.points
        found = tuple(point for point in self.points if fnmatch.fnmatchcase(point.name, pattern))
        if not found:
            known = [point.name for point in self.points]
            raise InputError(
                f"--only {pattern}: no point of the sweep {self.name} is called so; names are "
                f"MODEL/METHOD/BUDGET/SEED with * for any part; {nearest(pattern, known)}"
            )
        return found


def load(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep of a file, with `section.key=value` overrides on top of every point.

    A point's params are those of the base file, under `set`, its model's, its method's, the overrides, its budget and
    its seed. Raises ParamsError with one line for each thing to change in the file, the base file or the overrides.
    """
    written = params_file.read(path)
    problems = [*sweep_check.keys(written, path.name), *sweep_check.taken(overrides, path.name)]
    base, points = _base(written, path, problems), []
    broken = list(sweep_check.axes(written))
    for chosen in () if broken else itertools.product(*_axes(written, path.name)):
        try:
            points.append(_point(chosen, base, overrides))
        except ParamsError as error:
            problems += error.problems
        except MethodError as error:
            problems += str(error).splitlines()
    if problems or broken:
        raise ParamsError(list(dict.fromkeys([*problems, *broken])))  # all points of a method share its mistakes
    return Sweep(str(written.values["name"]), tuple(points))


def refuse_idle(points: Sequence[Point], overrides: Sequence[str]) -> None:
    """Raise ParamsError where an override sets a param of a method that none of the points runs."""
    problems = []
    for key, place in params_file.override(Written(), overrides).places.items():
        idle = [list(methods.idle(point.params.sections, {key: place})) for point in points]
        problems += idle[0] if all(idle) else []
    if problems:
        raise ParamsError(list(dict.fromkeys(problems)))


@dataclass(frozen=True)
class _Setting:
    """A param that the file sets, with the places of the value and of what lies in it."""

    key: str
    value: Json
    places: Mapping[str, str]

    def put(self, made: Written) -> list[str]:
        """Set it; gives what stands in the way."""
        return params_file.put(made, self.key, copy.deepcopy(self.value), self.places)


@dataclass(frozen=True)
class _Entry:
    """One entry of an axis: what a point is called after it, and what it sets."""

    name: str
    settings: tuple[_Setting, ...]


def _point(chosen: tuple[_Entry, ...], base: Written, overrides: Sequence[str]) -> Point:
    """The point of a model, a method, a budget and a seed. Raises ParamsError, MethodError."""
    model, method, budget, seed = chosen
    made = copy.deepcopy(base)
    problems = [line for entry in (model, method) for setting in entry.settings for line in setting.put(made)]
    if problems:
        raise ParamsError(problems)
    params_file.override(made, overrides)
    # Last, so that an override of a whole section does not take them away.
    for setting in (*budget.settings, *seed.settings):
        setting.put(made)
    return Point(model.name, method.name, budget.name, int(seed.name), parameters.of(made))


def _axes(written: Written, file: str) -> Iterator[list[_Entry]]:
    """Models (with what `set` sets below what each sets), methods, budgets, seeds."""
    shared = _settings(written, "set", written.values.get("set"))
    models, methods = (_mapping(written.values.get(axis)) for axis in ("models", "methods"))
    yield [_Entry(name, (*shared, *_settings(written, f"models.{name}", sets))) for name, sets in models.items()]
    yield [_Entry(name, _settings(written, f"methods.{name}", sets)) for name, sets in methods.items()]
    for axis, keys_set in (("budgets", (BUDGET,)), ("seeds", SEEDS)):
        listed = written.values.get(axis, [0] if axis == "seeds" else [])
        assert isinstance(listed, list)
        yield [
            _Entry(
                sweep_check.label(item), tuple(_setting(written, f"{axis}.{n}", key, item, file) for key in keys_set)
            )
            for n, item in enumerate(listed)
        ]


def _settings(written: Written, source: str, sets: Json) -> tuple[_Setting, ...]:
    """A mapping of dotted params."""
    return tuple(_setting(written, f"{source}.{key}", key, value) for key, value in _mapping(sets).items())


def _setting(written: Written, source: str, key: str, value: Json, default: str = "default") -> _Setting:
    """The value that the file has under `source`, as the param `key`."""
    places = {key: default}
    for place, where in written.places.items():
        if place == source or place.startswith(f"{source}."):
            places[key + place.removeprefix(source)] = where
    return _Setting(key, value, places)


def _base(written: Written, path: Path, problems: list[str]) -> Written:
    """The base file's values; its path is relative to the sweep's file."""
    named = written.values.get("params")
    if named is None:
        return Written()
    file = path.parent / str(named)
    if not isinstance(named, str) or not file.is_file():
        hint = f"give the path of a params.yaml, relative to {path.name}"
        problems.append(f"{written.place('params')}: params = {named}: there is no such file; {hint}")
        return Written()
    return params_file.read(file)


def _mapping(found: Json) -> dict[str, Json]:
    return found if isinstance(found, dict) else {}
