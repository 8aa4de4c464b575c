"""The house holds: three floors, what each may import, and how long a file and a function may be."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("heal", "tasks", "flows")
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BLIND = [p for p in SOURCES if p.is_relative_to(ROOT / "heal") and not p.is_relative_to(ROOT / "heal" / "families")]
LIBRARY = {"torch", "torchvision", "timm", "safetensors"}
UNPICKLERS = "pickle|dill|cloudpickle|joblib|shelve|marshal"


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*FLOORS, include_external_packages=True, cache_dir=None)


def test_every_floor_is_a_package() -> None:
    assert [floor for floor in FLOORS if not (ROOT / floor / "__init__.py").is_file()] == []


def test_import_linter_holds() -> None:
    """As a process of its own: it switches off the loggers of the one it runs in."""
    command = [str(Path(sys.executable).with_name("lint-imports"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_library_needs_only_torch_timm_and_safetensors(graph: grimp.ImportGraph) -> None:
    assert _third_party(graph, "heal") <= LIBRARY


def test_one_file_speaks_mlflow_and_one_is_run_by_it() -> None:
    running = grimp.build_graph(
        *FLOORS, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    assert running.find_modules_that_directly_import("mlflow") == {"tasks.mlflow_client", "tasks.served_model"}


def test_what_the_code_imports_is_declared(graph: grimp.ImportGraph) -> None:
    imported = {name for floor in FLOORS for name in _third_party(graph, floor)}
    providers = metadata.packages_distributions()
    undeclared = {name for name in imported if not {_plain(d) for d in providers[name]} & _declared()}
    assert undeclared == set()


def test_importing_heal_brings_no_server_and_no_pipeline() -> None:
    code = "import sys, json, heal; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"prefect", "mlflow", "dvc", "datasets", "pydantic", "pandas", "sklearn", "matplotlib", "tasks", "flows"}
    assert heavy & set(json.loads(done.stdout)) == set()


def test_the_public_names_of_heal_stay_what_they_are() -> None:
    code = "import heal; print([n for n in 2 * heal.__all__ if type(getattr(heal, n)).__name__ == 'module'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", "a lazy name and the submodule that defines it must not be spelled alike"


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_holds_one_idea_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400
    assert [f"{node.name}: {length}" for node, length in _functions(tree) if length > 60] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_in_its_first_line_what_it_is(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and docstring.splitlines()[0].strip()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    for call in (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        assert not re.match(rf"({UNPICKLERS})\.(loads?|open|Unpickler)$", called)  # their error types may be named
        if called == "torch.load":
            assert [ast.unparse(k.value) for k in call.keywords if k.arg == "weights_only"] == ["True"]


@pytest.mark.parametrize("path", BLIND, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_families_know_what_an_architecture_calls_its_parts(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | set(_strings(tree))
    assert [word for word in sorted(said) if re.search(r"\bfc[12]\b|\bqkv\b|\bblocks\.|\blayer[1-4]\b", word)] == []


def _third_party(graph: grimp.ImportGraph, floor: str) -> set[str]:
    """Top names that the floor imports, without the standard library and our own."""
    modules = {floor} | graph.find_descendants(floor)
    imported = {name.split(".")[0] for module in modules for name in graph.find_modules_directly_imported_by(module)}
    return imported - set(sys.stdlib_module_names) - set(FLOORS)


def _declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["pipeline"], *extras["s3"]]
    return {_plain(re.split(r"[<>=!~ \[;]", requirement)[0]) for requirement in requirements}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _functions(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, (node.end_lineno or node.lineno) - node.lineno + 1


def _strings(tree: ast.AST) -> Iterator[str]:
    """Every string that is not a docstring or a bare note."""
    notes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in notes:
            yield node.value
