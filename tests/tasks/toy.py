"""A pipeline of three small stages in a package of its own, for tests of what runs stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.keys import sha256
from tasks.manifest import Record
from tasks.table import Stage

KEY = sha256("key")

STAGES = {
    stage.name: stage
    for stage in (
        Stage("first", "toy.first", (), ("first",)),
        Stage("second", "toy.second", ("first",), ("second",)),
        Stage("third", "toy.third", ("first", "second"), ("third",)),
    )
}

FILES = {
    "__init__.py": "",
    "first.py": '''
"""Writes its word."""
from toy.shared import note, shout


def run(params, inputs, output, progress):
    note("first")
    (output / "word.txt").write_text(shout(params.values["first"]["word"]))
    return {"letters": float(len(params.values["first"]["word"]))}
''',
    "second.py": '''
"""Repeats the word that it reads."""
from toy.shared import note


def run(params, inputs, output, progress):
    note("second")
    (output / "deep").mkdir()
    word = (inputs["first"] / "word.txt").read_text()
    (output / "deep" / "words.txt").write_text(word * params.values["second"]["times"])
    return {}
''',
    "third.py": '''
"""Puts both together."""
from toy.shared import note


def run(params, inputs, output, progress):
    note("third")
    words = (inputs["second"] / "deep" / "words.txt").read_text()
    (output / "all.txt").write_text((inputs["first"] / "word.txt").read_text() + words)
    return {"total": len(words)}
''',
    "shared.py": """
import os
import pathlib


def shout(word):
    return word.upper()


def note(name):
    with open(pathlib.Path(os.environ["TOY_LOG"]), "a") as log:
        print(name, file=log)
""",
}


@dataclass(frozen=True)
class ToyParams:
    """What the runner asks of params, without pydantic. methods: modules by section."""

    values: Mapping[str, Any] = field(
        default_factory=lambda: {"first": {"word": "moth"}, "second": {"times": 2}, "third": {}}
    )
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def slice(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """The sections named."""
        return {key: self.values[key] for key in keys}

    def restrict(self, keys: tuple[str, ...]) -> ToyParams:
        """The sections named, and no others."""
        return ToyParams(self.slice(keys), self.methods)

    def method_modules(self, keys: tuple[str, ...]) -> tuple[str, ...]:
        """The modules of those sections."""
        return tuple(module for key in keys for module in self.methods.get(key, ()))

    def but(self, section: str, **changes: Any) -> ToyParams:
        """The same with changes in one section."""
        return ToyParams({**self.values, section: {**self.values[section], **changes}}, self.methods)


def write(folder: Path, **changed: str) -> Path:
    """The package `toy` in a folder; `changed` are other texts of its modules."""
    package = folder / "toy"
    package.mkdir(exist_ok=True)
    for name, text in (FILES | {f"{module}.py": text for module, text in changed.items()}).items():
        (package / name).write_text(text)
    return package


def record(key: str = KEY, stage: str = "pruning", inputs: dict[str, str] | None = None) -> Record:
    """A finished computation, but for its digest."""
    ingredients: dict[str, Any] = {"stage": stage, "inputs": inputs or {}}
    return Record(stage, key, "", ingredients, {"kept": 3.0}, {"torch": "2"}, {"cores": 2}, 1.5, "2026-01-01", ("a",))


def fill(folder: Path, text: str = "weights") -> Path:
    """An output folder with two files."""
    (folder / "deep").mkdir(parents=True)
    (folder / "a.bin").write_text(text)
    (folder / "deep" / "b.json").write_text("{}")
    return folder
