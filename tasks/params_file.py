"""params.yaml and `-S` overrides as plain values that remember where each was written.

Scalars are read as YAML 1.2 reads them, which is also how DVC does: `6e-4` is a number, and only
true/false are booleans. Duplicate keys, aliases and tags are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import yaml

from heal.errors import InputError

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

MAXIMUM_BYTES = 2**20
_SHOWN = 5


class ParamsError(InputError):
    """Params that cannot be used; one line for each thing to change, at most five."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        shown = self.problems if len(problems) <= _SHOWN else self.problems[: _SHOWN - 1]
        more = [f"... and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        super().__init__("\n".join([*shown, *more]))


@dataclass(frozen=True)
class Written:
    """Nested values, and for every dotted key the place that set it ("params.yaml:12", "-S a.b=1")."""

    values: dict[str, Json] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def place(self, dotted: str) -> str | None:
        """Where a key was set: its own place, or that of the nearest section around it."""
        while dotted and dotted not in self.places:
            dotted = dotted.rpartition(".")[0]
        return self.places.get(dotted)


def read(path: Path) -> Written:
    """The file's values. Raises ParamsError."""
    try:
        if path.stat().st_size > MAXIMUM_BYTES:
            raise ParamsError([f"{path}: larger than {MAXIMUM_BYTES} bytes; this is not a params file"])
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ParamsError([f"{path}: cannot be read ({error.strerror}); give the path of a params.yaml"]) from error
    except UnicodeDecodeError as error:
        raise ParamsError([f"{path}: is not UTF-8 text; save it as UTF-8"]) from error
    node, written = _compose(text, path.name), Written()
    if node is None:
        return written
    if not isinstance(node, yaml.MappingNode):
        raise ParamsError([f"{path.name}:1: must hold `section:` lines, not a single value or a list"])
    problems: list[str] = []
    written.values.update(_Reading(path.name, written.places, problems).mapping(node, ""))
    if problems:
        raise ParamsError(problems)
    return written


def override(written: Written, overrides: Sequence[str]) -> Written:
    """The values with every `a.b=value` applied in order. Raises ParamsError."""
    problems: list[str] = []
    for text in overrides:
        problems += _set(written, text)
    if problems:
        raise ParamsError(problems)
    return written


def put(written: Written, dotted: str, value: Json, places: Mapping[str, str]) -> list[str]:
    """Set one value in place of what was there; gives what stands in the way, if anything does.

    places: where the value was written, under its dotted key, and what lies in it.
    """
    parent = written.values
    *sections, last = dotted.split(".")
    for depth, section in enumerate(sections, start=1):
        if section not in parent:
            written.places[".".join(sections[:depth])] = places[dotted]
        below = parent.setdefault(section, {})
        if below is None:
            parent[section] = below = {}
        if not isinstance(below, dict):
            return [f"{places[dotted]}: {section} is a value, not a section; set it as a whole"]
        parent = below
    parent[last] = value
    for key in [key for key in written.places if key.startswith(f"{dotted}.")]:
        del written.places[key]
    written.places.update(places)
    return []


_OVERRIDE = re.compile(r"([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)=(.*)", re.DOTALL)


def _set(written: Written, text: str) -> list[str]:
    match = _OVERRIDE.fullmatch(text.strip())
    if match is None:
        return [f"-S {text}: must read section.key=value, for example -S healing.seed=1"]
    dotted, source = match.groups()
    place = f"-S {text.strip()}"
    problems: list[str] = []
    node = _compose(source, place)
    places: dict[str, str] = {dotted: place}
    value = None if node is None else _Reading(place, places, problems, numbered=False).value(node, dotted)
    return [*put(written, dotted, value, places), *problems]


def _compose(text: str, place: str) -> yaml.Node | None:
    try:
        return _CoreLoader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark and not place.startswith("-S") else ""
        raise ParamsError([f"{place}{line}: is not YAML: {error.problem}"]) from error
    except (yaml.YAMLError, RecursionError) as error:
        first = str(error).partition("\n")[0]
        raise ParamsError([f"{place}: is not YAML that can be read: {first}"]) from error


class _CoreLoader(yaml.SafeLoader):
    """Resolves YAML 1.2 core scalars; PyYAML's own table is YAML 1.1 (`6e-4` text, `no` false)."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's way to start an empty table)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read; write the value out", problem_mark=mark)
        return super().compose_node(parent, index)


# At most 18 digits: longer ones stay text and are refused as such, instead of stalling int().
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]{1,18}", list("-+0123456789")),
    "float": (
        r"[-+]?(?:(?:\.[0-9]{1,40}|[0-9]{1,40}\.[0-9]{0,40})(?:[eE][-+]?[0-9]{1,4})?|[0-9]{1,18}[eE][-+]?[0-9]{1,4})",
        list("-+.0123456789"),
    ),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first)


@dataclass(frozen=True)
class _Reading:
    """Turns nodes into values, noting places and problems."""

    place: str
    places: dict[str, str]
    problems: list[str]
    numbered: bool = True

    def value(self, node: yaml.Node, dotted: str) -> Json:
        self.places[dotted] = self._at(node)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, f"{dotted}.")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, f"{dotted}.{index}") for index, item in enumerate(node.value)]
        return self._scalar(node)

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Json]:
        found: dict[str, Json] = {}
        for key, item in self._pairs(node):
            if key in found:
                self.problems.append(f"{self._at(item)}: {prefix}{key} is given twice; keep one of them")
            found[key] = self.value(item, prefix + key)
        return found

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
        for key, item in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key.value, item
            else:
                self.problems.append(f"{self._at(key)}: a key must be a name")

    def _scalar(self, node: yaml.Node) -> Json:
        kind, text = node.tag.rpartition(":")[2], node.value
        if kind not in (*_SCALARS, "str"):
            self.problems.append(f"{self._at(node)}: the tag {node.tag} is not read; write a plain value")
        if kind == "null":
            return None
        if kind == "bool":
            return bool(text.lower() == "true")
        return int(text) if kind == "int" else float(text) if kind == "float" else str(text)

    def _at(self, node: yaml.Node) -> str:
        return f"{self.place}:{node.start_mark.line + 1}" if self.numbered else self.place
