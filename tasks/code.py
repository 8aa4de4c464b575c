"""What code a stage computes with: the modules it imports on our floors, each as a hash of what it says.

Comments, docstrings and formatting carry no weight, and neither do package `__init__` files, which
only list names: a new healer must not invalidate anybody's healing. So the registries of methods are
not followed; the methods that params name are handed in. Other packages are looked through, for
nothing else says which of their modules count (a model's family is known only when it is there).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import grimp

from heal.errors import InputError

FLOORS = ("heal", "tasks")

REGISTRIES = frozenset({"heal.allocators", "heal.pruners", "heal.healers"})

# These say how a stage is run and shown, not what it computes. Stages name Progress and Params in
# annotations, and tasks.params imports every method there is: following it would tie all keys to all methods.
MACHINERY = frozenset(
    f"tasks.{name}"
    for name in (
        *(
            "atomic",
            "checkpoints",
            "code",
            "dvcfile",
            "gc",
            "keys",
            "manifest",
            "methods",
            "places",
            "plan",
            "plots",
            "progress",
            "references",
            "remembered",
        ),
        *("params", "params_check", "params_file", "params_schema", "resolve", "runner", "state", "store", "table"),
    )
)


def closure(module: str, methods: Iterable[str] = ()) -> dict[str, Path]:
    """The modules that `module` and `methods` reach on our floors, with their files; sorted by name.

    Raises InputError for a module that does not exist.
    """
    start = [module, *methods]
    roots = _roots(start)
    graph = _graph(tuple(roots), _fingerprint(roots))
    reached: dict[str, Path] = {}
    while start:
        name = start.pop()
        if name in reached or name in MACHINERY:
            continue
        if name not in graph.modules:
            raise InputError(f"module {name} is not there; a stage or a method names it (searched {', '.join(roots)})")
        reached[name] = _file(roots, name)
        if name not in REGISTRIES:
            start += graph.find_modules_directly_imported_by(name)
    return {name: file for name, file in sorted(reached.items()) if file.name != "__init__.py"}


def hashes(module: str, methods: Iterable[str] = (), files: Iterable[str] = ()) -> dict[str, str]:
    """Path from the root of our floors -> SHA-256 of what it says, for the closure and for files beside the module."""
    said = {f"{name.replace('.', '/')}.py": hash_file(file) for name, file in closure(module, methods).items()}
    return said | {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in _beside(module, files)}


def locate(module: str) -> Path:
    """The file of a module, found without importing anything. Raises InputError."""
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []  # several for a namespace package
    places = [_file({package: Path(folder)}, module) for folder in folders]
    if spec is not None and module == package:
        places.append(Path(spec.origin or ""))
    found = next((place for place in places if place.is_file()), None)
    if found is not None:
        return found
    raise InputError(f"there is no module {module}; install its package or set PYTHONPATH")


def modules_in(package: str) -> list[str]:
    """The modules directly in a package, without its `__init__`; sorted."""
    folder = _file(_roots([package]), package).parent
    return sorted(f"{package}.{file.stem}" for file in folder.glob("*.py") if file.stem != "__init__")


def hash_file(file: Path) -> str:
    """SHA-256 of a Python file without comments, docstrings, `pass` and formatting."""
    stat = file.stat()
    return _hash(file, stat.st_mtime_ns, stat.st_size)


def _beside(module: str, files: Iterable[str]) -> Iterator[tuple[str, Path]]:
    package, _, _ = module.rpartition(".")
    folder = _file(_roots([package]), package).parent
    for name in files:
        found = [folder / name] if (folder / name).is_file() else sorted(folder.joinpath(name).rglob("*"))
        inside = [file for file in found if file.is_file()]
        if not inside:
            raise InputError(f"{folder / name} is not there; the stage table says that {module} computes with it")
        yield from ((f"{package.replace('.', '/')}/{file.relative_to(folder).as_posix()}", file) for file in inside)


@lru_cache(maxsize=1024)
def _hash(file: Path, modified: int, size: int) -> str:
    tree = ast.parse(file.read_bytes(), filename=str(file))
    said: list[str] = []
    _say(tree, said)
    return hashlib.sha256("".join(said).encode()).hexdigest()


def _say(node: ast.AST, said: list[str]) -> None:
    """The tree as text. Not ast.unparse or ast.dump: both print the same code differently from one Python to the next
    (f-string quotes since 3.12, empty lists and type_params in 3.13), and a key must survive that."""
    said.append(f"{type(node).__name__}(")
    for field, value in ast.iter_fields(node):
        if field not in ("kind", "type_comment") and value is not None and value != []:
            said.append(f"{field}=")
            _say_value(value, said)
    said.append(")")


def _say_value(value: object, said: list[str]) -> None:
    if isinstance(value, ast.AST):
        _say(value, said)
    elif isinstance(value, list):
        for item in value:
            if not _weightless(item):
                _say_value(item, said)
        said.append(";")
    else:
        said.append(f"{value!r},")


def _weightless(node: object) -> bool:
    """A docstring (any string that stands alone), or `pass`."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return isinstance(node, ast.Pass)


def _roots(modules: Iterable[str]) -> dict[str, Path]:
    """Top-level package -> its folder: our floors, and those of a stage or method that lives elsewhere."""
    names = sorted({*FLOORS, *(module.partition(".")[0] for module in modules)})
    return {name: _folder(name) for name in names}


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"package {package} cannot be found; it must be importable from where regrow runs")
    return Path(next(iter(spec.submodule_search_locations)))


def _file(roots: dict[str, Path], module: str) -> Path:
    """Found by path: importlib would import the parent packages, and torch with them."""
    package, *rest = module.split(".")
    path = roots[package].joinpath(*rest)
    return path / "__init__.py" if path.is_dir() else path.with_name(path.name + ".py")


def _fingerprint(roots: dict[str, Path]) -> tuple[tuple[str, int, int], ...]:
    """Changes when a Python file does, so that a long-lived process sees new code."""
    files = sorted(file for root in roots.values() for file in root.rglob("*.py"))
    return tuple((str(file), stat.st_mtime_ns, stat.st_size) for file in files for stat in [file.stat()])


@lru_cache(maxsize=4)
def _graph(packages: tuple[str, ...], fingerprint: tuple[tuple[str, int, int], ...]) -> grimp.ImportGraph:
    # No cache folder: it would appear in the user's working directory.
    return grimp.build_graph(packages[0], *packages[1:], cache_dir=None, exclude_type_checking_imports=True)
