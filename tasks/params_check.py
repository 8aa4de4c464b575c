"""Written values against the schema and the methods' dataclasses: every problem found, in one error."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from heal.errors import InputError
from heal.naming import AUTO
from tasks import methods
from tasks import params_schema as schema
from tasks.params_file import Json, ParamsError, Written


def checked(written: Written) -> schema.Sections:
    """The sections with every default filled in. Raises ParamsError with all problems together."""
    problems = [_not_a_key(name, written) for name in written.values if name not in schema.Sections.model_fields]
    parsed = {name: _section(name, written, problems) for name in schema.Sections.model_fields}
    sections = schema.Sections(**{name: section for name, section in parsed.items() if section is not None})
    problems += [*_unknown_methods(sections, written), *_budget(sections, written)]
    if problems:
        raise ParamsError(problems)
    return _with_defaults(sections)


def _section(name: str, written: Written, problems: list[str]) -> Any:
    """One section, or None after adding what is wrong with it."""
    values = written.values.get(name)
    kind: Any = schema.Sections.model_fields[name].annotation
    if isinstance(values, dict) and name in methods.METHOD_KEYS:
        problems += _options(name, values, written)
    try:
        # From JSON, because pydantic is strict about scalars there and still reads a list as a tuple.
        return TypeAdapter(kind).validate_json(json.dumps({} if values is None else values))
    except ValidationError as error:
        problems += _explained(error, name, written)
        return None


def _options(name: str, section: Mapping[str, Json], written: Written) -> Iterator[str]:
    """What is wrong with the keys of a method section that are not its own."""
    for key, options in section.items():
        dotted = f"{name}.{key}"
        if key in _fields(name):
            continue
        if key not in methods.known(name):
            yield _not_a_key(dotted, written)
        elif not isinstance(options, dict | None):
            yield f"{_place(written, dotted)}: {dotted} = {options} must be a mapping of the method's params"
        else:
            yield from _refused(name, key, options or {}, written)


def _refused(name: str, method: str, options: Mapping[str, Json], written: Written) -> list[str]:
    try:
        methods.completed(name, method, options)
    except ValidationError as error:
        return _explained(error, f"{name}.{method}", written)
    except InputError as error:
        return [f"{_place(written, f'{name}.{method}')}: {error}"]
    return []


def _unknown_methods(sections: schema.Sections, written: Written) -> Iterator[str]:
    for name, method in methods.named(sections):
        key, known = f"{name}.{methods.METHOD_KEYS[name]}", methods.known(name)
        if method not in known:
            hint = _hint(method, known) or f"; known: {', '.join(known)}"
            yield f"{_place(written, key)}: {key} = {method} is not a method{hint}"


def _with_defaults(sections: schema.Sections) -> schema.Sections:
    """The sections with the options completed of every method that is named or given."""
    done: dict[str, dict[str, Any]] = {name: dict(getattr(sections, name).model_extra) for name in methods.METHOD_KEYS}
    for name, method in methods.named(sections):
        done[name].setdefault(method, {})
    for name, options in done.items():
        for method, given in options.items():
            options[method] = methods.completed(name, method, given or {})
    return sections.model_copy(
        update={name: getattr(sections, name).model_copy(update=options) for name, options in done.items()}
    )


def _budget(sections: schema.Sections, written: Written) -> Iterator[str]:
    budget, dotted = sections.allocation.budget, "allocation.budget"
    try:
        budget.build()
    except InputError as error:
        given = {unit: share for unit, share in budget if share is not None}
        over = [unit for unit in given if (written.place(f"{dotted}.{unit}") or "").startswith("-S")]
        unit = next(iter([*over, *given]), "weights")
        hint = f"; on the command line: -S '{dotted}={{{unit}: {given.get(unit, 0.9):g}}}'"
        place = _place(written, f"{dotted}.{unit}" if over else dotted)
        yield f"{place}: {dotted}: {error}{hint if 'exactly one' in str(error) else ''}"


def _explained(error: ValidationError, parent: str, written: Written) -> list[str]:
    """One line for each key that pydantic refused (a union reports every branch: these are joined)."""
    found: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False):
        dotted = _key(parent, problem["loc"], written)
        if problem["type"] == "extra_forbidden":
            found[_not_a_key(dotted, written)] = []
        else:
            about = f"{_place(written, dotted)}: {dotted}{_shown(problem['input'])}: "
            found.setdefault(about, []).append(
                _message(problem["type"], problem["msg"], dotted) + _spelled(problem["type"], problem["input"])
            )
    return [
        about + " or ".join(dict.fromkeys(messages)).replace(" or must be", " or") for about, messages in found.items()
    ]


def _key(parent: str, location: tuple[int | str, ...], written: Written) -> str:
    """The dotted key of an error; pydantic adds the branch of a union, which is not a key."""
    dotted = parent
    for part in location:
        below = f"{dotted}.{part}"
        if below not in written.places and _field(below) is None:
            break
        dotted = below
    return dotted


def _message(kind: str, message: str, dotted: str) -> str:
    field = _field(dotted)
    if kind == "string_pattern_mismatch" and field is not None and field.description:
        return f"must be {field.description}"
    return (
        message.removeprefix("Value error, ")
        .replace("Input should be", "must be", 1)
        .replace("an object", "a mapping of keys")
        .replace("a valid array", "a list")
    )


def _spelled(kind: str, value: object) -> str:
    """How to write a single value where a list is wanted."""
    return f", such as [{value}]" if kind == "tuple_type" and isinstance(value, (str, int, float)) else ""


def _shown(value: object) -> str:
    return f" = {value}" if isinstance(value, (str, int, float)) else ""


def _place(written: Written, dotted: str) -> str:
    """Where to look: what set the key, or the section around it, or something else in that section."""
    place, beside = written.place(dotted), dotted
    while place is None and beside:
        place = next((at for key, at in written.places.items() if key.startswith(f"{beside}.")), None)
        beside = beside.rpartition(".")[0]
    return place or "default"


def _not_a_key(dotted: str, written: Written) -> str:
    return f"{_place(written, dotted)}: {dotted} is not a key{_nearest_key(dotted, written)}"


def _nearest_key(dotted: str, written: Written) -> str:
    """The nearest key: beside the wrong one, then of the same name elsewhere, a named method's first, then anywhere."""
    known = list(_all_keys())
    parent, _, last = dotted.rpartition(".")
    # By their own names: a parent that all share would make any two look alike.
    beside = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    close = difflib.get_close_matches(last, list(beside), n=1, cutoff=0.7)
    if close:
        return f"; did you mean {beside[close[0]]}?"
    elsewhere = [key for key in known if key.rpartition(".")[2] == last]
    here = [key for key in elsewhere if key.startswith(f"{parent}.")]
    here.sort(key=lambda key: key.split(".")[1] not in _named(parent, written))
    return next((f"; did you mean {key}?" for key in here + elsewhere), _hint(dotted, known))


def _named(section: str, written: Written) -> list[str]:
    """The methods that a section names, or may stand for by default."""
    values, key = written.values.get(section), methods.METHOD_KEYS.get(section, "")
    default = getattr(getattr(schema.Sections(), section, None), key, ())
    named = values.get(key, default) if isinstance(values, dict) else default
    listed = [str(name) for name in named] if isinstance(named, (list, tuple)) else [str(named)]
    return sorted(methods.chosen_by_presets()) if listed == [AUTO] else listed


def _hint(wanted: str, known: Mapping[str, Any] | list[str]) -> str:
    close = difflib.get_close_matches(wanted, list(known), n=1, cutoff=0.75)
    return f"; did you mean {close[0]}?" if close else ""


def _all_keys() -> Iterator[str]:
    for section in schema.Sections.model_fields:
        yield section
        yield from _keys_below(section)
        if section in methods.METHOD_KEYS:
            for method in methods.known(section):
                yield f"{section}.{method}"
                yield from (f"{section}.{method}.{key}" for key in methods.keys(section, method))


def _keys_below(dotted: str) -> Iterator[str]:
    for name in _fields(dotted):
        yield f"{dotted}.{name}"
        yield from _keys_below(f"{dotted}.{name}")


def _fields(dotted: str) -> Mapping[str, FieldInfo]:
    """The keys of a section by its dotted name; none for a key that is a value."""
    fields: Mapping[str, FieldInfo] = schema.Sections.model_fields
    for part in dotted.split("."):
        kind: Any = fields[part].annotation if part in fields else None
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, schema.Section) else {}
    return fields


def _field(dotted: str) -> FieldInfo | None:
    parent, _, last = dotted.rpartition(".")
    return _fields(parent).get(last) if parent else None
