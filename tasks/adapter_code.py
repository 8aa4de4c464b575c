"""The code that an adapter may run, as one digest; a network that it builds is its weights and this."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tasks import code

INSTALLED = ("site-packages", "dist-packages")

UNREADABLE = (SyntaxError, RecursionError)
"""A template, a file for another Python, or one that a machine wrote."""


def digest(adapter: str) -> str:
    """SHA-256 over the code of `package.module:function`, found without importing anything.

    That is the whole package (or the module, if it lies alone), and whatever lies beside it and is
    imported from there. Comments and formatting carry no weight. Raises InputError when it is not there.
    """
    module = adapter.partition(":")[0]
    code.locate(module)
    said = {path: _said(file) for path, file in _reached(module.partition(".")[0])}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _reached(name: str) -> Iterator[tuple[str, Path]]:
    """Path from where the package lies -> file, for each file of it and of its neighbours that it imports."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and (spec.submodule_search_locations or spec.origin)
    wanted = [Path(place) for place in spec.submodule_search_locations or [str(spec.origin)]]
    seen: set[Path] = set()
    while wanted:
        place = wanted.pop()  # a package's folder, or a module's file
        if place in seen:
            continue
        seen.add(place)
        for file in _python_files(place):
            yield file.relative_to(place.parent).as_posix(), file
            wanted += _neighbours(place.parent, file)


def _python_files(place: Path) -> Iterator[Path]:
    """A file itself; of a folder all Python files, through links, but not what tools keep in dotted folders."""
    if place.is_file():
        yield place
    seen = set()
    for folder, below, names in os.walk(place, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or "pyvenv.cfg" in names:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        files = (Path(folder, name) for name in sorted(names) if name.endswith(".py") and not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _neighbours(folder: Path, file: Path) -> Iterator[Path]:
    """The packages and modules in a folder that a file imports; what was installed there is nobody's neighbour."""
    if folder.name in INSTALLED or str(folder) in sysconfig.get_paths().values():
        return
    for name in _imported(file):
        if any(_python_files(folder / name)):
            yield folder / name
        elif (folder / f"{name}.py").is_file():
            yield folder / f"{name}.py"


def _imported(file: Path) -> Iterator[str]:
    """The top-level names that a file imports, anywhere in it."""
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except UNREADABLE:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _said(file: Path) -> str:
    try:
        return code.hash_file(file)
    except UNREADABLE:  # its bytes count
        return hashlib.sha256(file.read_bytes()).hexdigest()
