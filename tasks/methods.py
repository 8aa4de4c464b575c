"""The methods that params name: their own dataclasses check their params, their units the combination.

heal is imported when a function is called, so that reading params costs no torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import BaseModel, Field, JsonValue, create_model

from heal.naming import AUTO
from tasks.params_schema import Section, Sections

if TYPE_CHECKING:
    from heal.method import Allocator, Healer, Pruner

METHOD_KEYS = {"allocation": "method", "pruning": "method", "healing": "methods"}


def known(section: str) -> Mapping[str, Any]:
    """The dictionary of a section's methods: name -> dataclass."""
    if section == "allocation":
        from heal.allocators import ALLOCATORS

        return ALLOCATORS
    if section == "pruning":
        from heal.pruners import PRUNERS

        return PRUNERS
    from heal.healers import HEALERS

    return HEALERS


def chosen_by_presets() -> set[str]:
    """The names of all methods that `auto` may stand for."""
    from heal.presets import taken

    return taken()


def named(sections: Sections) -> Iterator[tuple[str, str]]:
    """(section, method) of every method that the params name, in the order of the road; what is `auto` names none."""
    asked = {
        "allocation": (sections.allocation.method,),
        "pruning": (sections.pruning.method,),
        "healing": sections.healing.methods,
    }
    yield from ((section, method) for section, names in asked.items() for method in names if method != AUTO)


def idle(sections: Sections, overrides: Mapping[str, str]) -> Iterator[str]:
    """The overrides (dotted key to place) that set a param of a method which does not run; one line each.

    In the file such a param waits for its method; on the command line it is a mistake.
    """
    running = list(named(sections))
    for dotted, place in overrides.items():
        section, _, rest = dotted.partition(".")
        method = rest.partition(".")[0]
        if section in METHOD_KEYS and method in known(section) and (section, method) not in running:
            key = f"{section}.{METHOD_KEYS[section]}"
            names = ", ".join(name for where, name in running if where == section)
            yield f"{place}: {method} does not run, as {key} is {names}; name it there, or leave the override out"


def allocator(sections: Sections) -> Allocator:
    """The allocator with its params."""
    made: Allocator = _build("allocation", sections.allocation.method, sections)
    return made


def pruner(sections: Sections) -> Pruner:
    """The pruner with its params."""
    made: Pruner = _build("pruning", sections.pruning.method, sections)
    return made


def healer(sections: Sections, method: str) -> Healer:
    """One healer with its params."""
    made: Healer = _build("healing", method, sections)
    return made


def needs(sections: Sections) -> list[str]:
    """The union of the statistics that the named methods read, sorted; labels are none."""
    made = (_build(section, method, sections) for section, method in named(sections))
    return sorted(frozenset().union(*(method.needs for method in made)) - {"labels"})


def completed(section: str, method: str, options: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The options with the dataclass's defaults filled in. Raises ValidationError, InputError."""
    checked = _checked(section, method, options)
    known(section)[method](**_values(checked))
    return checked.model_dump(mode="json")


def keys(section: str, method: str) -> list[str]:
    """The names of a method's params."""
    return [field.name for field in dataclasses.fields(known(section)[method]) if field.init]


def contradictions(sections: Sections, place: Callable[[str], str]) -> Iterator[str]:
    """Why the named methods cannot work on this budget, or without labels, if they cannot; one line each."""
    yield from _other_units(sections, place)
    yield from _labels_forbidden(sections, place)
    yield from _undivided(sections, place)


def _other_units(sections: Sections, place: Callable[[str], str]) -> Iterator[str]:
    budget = sections.allocation.budget.build()
    unit = budget.removes(_unit("allocation", sections.allocation.method))
    for section, method in named(sections):
        works_on = _unit(section, method)
        if works_on in ("any", unit):
            continue
        key = f"{section}.{METHOD_KEYS[section]}"
        others = [name for name in known(section) if _unit(section, name) in ("any", unit)]
        yield (
            f"{place(key)}: {key} = {method} works on {works_on}, but allocation.budget is in {budget.unit} "
            f"({place('allocation.budget')}); give a budget in {works_on}, or choose one of: {', '.join(others)}"
        )


def _labels_forbidden(sections: Sections, place: Callable[[str], str]) -> Iterator[str]:
    for section, method in named(sections):
        if "labels" in _build(section, method, sections).needs and not sections.calibration.labels:
            key = f"{section}.{method}.fitness"
            yield (
                f"{place(key)}: {key} = labels reads the labels of the calibration images, but calibration.labels is "
                f"false ({place('calibration.labels')}); set it to true, or choose a fitness that reads none"
            )


def _undivided(sections: Sections, place: Callable[[str], str]) -> Iterator[str]:
    from heal.errors import MethodError
    from heal.healer_rules import refuse_rounds

    writes = bool(getattr(pruner(sections), "writes_weights", False))
    patterned = getattr(allocator(sections), "pattern", None) is not None
    try:
        refuse_rounds(sections.healing.rounds, sections.healing.methods, writes, patterned)
    except MethodError as error:
        yield f"{place('healing.rounds')}: healing.rounds: {error}"


def _unit(section: str, method: str) -> str:
    return str(getattr(known(section)[method], "unit", "any"))


def _build(section: str, method: str, sections: Sections) -> Any:
    options = getattr(sections, section).options(method)
    return known(section)[method](**_values(_checked(section, method, options)))


def _checked(section: str, method: str, options: Mapping[str, JsonValue]) -> BaseModel:
    # From JSON, because pydantic is strict about scalars there and still reads a list as a tuple.
    return _model(known(section)[method]).model_validate_json(json.dumps(options))


def _values(checked: BaseModel) -> dict[str, Any]:
    return {name: getattr(checked, name) for name in type(checked).model_fields}


@cache
def _model(method: Any) -> type[BaseModel]:
    """A pydantic twin of the method's dataclass: pydantic cannot forbid unknown keys on a plain one."""
    hints = get_type_hints(method)
    fields = {field.name: (hints[field.name], _default(field)) for field in dataclasses.fields(method) if field.init}
    return create_model(method.__name__, __base__=Section, **fields)  # type: ignore[call-overload, no-any-return]


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return Field() if field.default is dataclasses.MISSING else Field(default=field.default)
