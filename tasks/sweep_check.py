"""What is wrong with the keys of a sweep's file; the params in it are for the points to check."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from heal.naming import nearest
from tasks import params_file
from tasks.params_file import Json, Written

BUDGET = "allocation.budget"
SEEDS = ("calibration.seed", "healing.seed", "allocation.seed")
"""What `budgets` and `seeds` set."""

EXAMPLES = {
    "name": "name: cifar",
    "params": "params: params.yaml",
    "set": "set: {evaluation.latency_rounds: 0}",
    "models": "models: {digits: {}}",
    "methods": "methods: {erk: {allocation.method: erk}}",
    "budgets": "budgets: [{weights: 0.9}]",
    "seeds": "seeds: [0, 1]",
}
REQUIRED = ("name", "models", "methods", "budgets")
UNITS = ("weights", "neurons", "blocks", "macs")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_NAMED = "at most 64 letters, digits and . _ + -, beginning with a letter or digit"
_DOTTED = re.compile(r"[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*")


def keys(written: Written, file: str) -> Iterator[str]:
    """Keys that are unknown or missing, and the name; one line for each thing to change."""
    values = written.values
    for key in values:
        if key not in EXAMPLES:
            yield f"{written.place(key)}: {key} is not a key of a sweep; {nearest(key, EXAMPLES)}"
    for key in REQUIRED:
        if values.get(key) is None:
            yield f"{written.place(key) or f'{file}:1'}: a sweep needs {key}, such as {EXAMPLES[key]}"
    name = values.get("name")
    if name is not None and not _NAME.fullmatch(str(name)):
        yield f"{written.place('name')}: name = {name} must be {_NAMED}"


def axes(written: Written) -> Iterator[str]:
    """What is not of the form that points can be made of; one line for each thing to change."""
    values = written.values
    yield from _wrong_overrides(values.get("set"), "set", written)
    for axis in ("models", "methods"):
        yield from _wrong_mapping(values.get(axis), axis, written)
    yield from _wrong_list(values.get("budgets"), "budgets", written, _wrong_budget)
    yield from _wrong_list(values.get("seeds", [0]), "seeds", written, _wrong_seed)


def taken(overrides: Sequence[str], file: str) -> Iterator[str]:
    """Overrides that would make points alike which have different names. Raises ParamsError."""
    for key, (place, axis) in _set_by_axes(params_file.override(Written(), overrides).places).items():
        yield f"{place}: in a sweep its {axis} set {key}; change {axis} in {file}, or choose points with --only"


def label(item: Json) -> str:
    """What a point is called after a budget or a seed."""
    return "".join(f"{unit}={share}" for unit, share in item.items()) if isinstance(item, dict) else str(item)


def _wrong_mapping(found: Json, axis: str, written: Written) -> Iterator[str]:
    if found is None:
        return
    if not isinstance(found, dict) or not found:
        yield f"{written.place(axis)}: {axis} must be a mapping of names, such as {EXAMPLES[axis]}"
        return
    for name, overrides in found.items():
        if not _NAME.fullmatch(name):
            yield f"{written.place(f'{axis}.{name}')}: {axis}: {name!r} is no name; it takes {_NAMED}"
        yield from _wrong_overrides(overrides, f"{axis}.{name}", written)


def _wrong_overrides(found: Json, where: str, written: Written) -> Iterator[str]:
    if not isinstance(found, dict | None):
        yield f"{written.place(where)}: {where} must be a mapping of params, such as {{healing.starfish.lr: 3e-4}}"
        return
    for key in found or {}:
        if not _DOTTED.fullmatch(key):
            yield f"{written.place(f'{where}.{key}')}: {where}: {key!r} is no param; write section.key: value"
    below = {key.removeprefix(f"{where}."): line for key, line in written.places.items() if key.startswith(f"{where}.")}
    for key, (line, axis) in _set_by_axes(below).items():
        yield f"{line}: {where} must not set {key}: the {axis} of the sweep do"


Check = Callable[[Json], str | None]


def _wrong_list(found: Json, axis: str, written: Written, wrong: Check) -> Iterator[str]:
    if found is None and axis in REQUIRED:
        return
    if not isinstance(found, list) or not found:
        yield f"{written.place(axis)}: {axis} must be a list of at least one, such as {EXAMPLES[axis]}"
        return
    for number, item in enumerate(found):
        where = f"{written.place(f'{axis}.{number}')}: {axis}"
        if problem := wrong(item):
            yield f"{where}: {problem}"
        elif item in found[:number]:
            yield f"{where}: {label(item)} is given twice; keep one of them"


def _wrong_budget(item: Json) -> str | None:
    if not isinstance(item, dict) or len(item) != 1:
        return "each must be one unit with the share to remove, such as {weights: 0.9}"
    ((unit, share),) = item.items()
    if unit not in UNITS:
        return f"{unit} is not a unit; {nearest(unit, UNITS)}"
    if isinstance(share, bool) or not isinstance(share, int | float):
        return f"{unit}: {share} must be a number, the share to remove in [0, 1)"
    return None


def _wrong_seed(item: Json) -> str | None:
    if isinstance(item, bool) or not isinstance(item, int) or item < 0:
        return f"{item} must be an integer >= 0"
    return None


def _set_by_axes(places: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Of dotted keys those that an axis of the sweep sets, with their place and the axis."""
    found = {key: (place, "seeds") for key, place in places.items() if key in SEEDS}
    budget = {key: (place, "budgets") for key, place in places.items() if key == BUDGET or key.startswith(f"{BUDGET}.")}
    return {**found, **dict(list(budget.items())[:1])}
