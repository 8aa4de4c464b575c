"""A key changes with what is computed, and with nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from heal.errors import InputError
from tasks import code, keys, resolve
from tasks.keys import canonical, flatten, key_of, stage_key
from tasks.params import load
from tasks.table import STAGES, Stage
from tests.tasks import toy
from tests.tasks.pictures import folder
from tests.tasks.toy import ToyParams

ROOT = Path(__file__).parents[2]
METHODS = ("toy.methods.lion",)

MORE = {
    "toy/methods/__init__.py": "from toy.methods.lion import Lion\nMETHODS = {'lion': Lion}\n",
    "toy/methods/lion.py": "import toy.mane\nclass Lion:\n    '''Roars.'''\n    volume = 3\n",
    "toy/methods/tiger.py": "class Tiger:\n    volume = 4\n",
    "toy/mane.py": "LENGTH = 30\n",
    "toy/listed/__init__.py": "from toy.listed.entry import VALUE\n",
    "toy/listed/entry.py": "VALUE = 1\n",
    "toy/stage.py": (
        "from typing import TYPE_CHECKING\n"
        "from toy.listed import VALUE\n"
        "from toy.shared import shout\n"
        "from tasks.progress import Progress\n"
        "if TYPE_CHECKING:\n    from toy.methods import tiger\n"
        "def run(params, inputs, output, progress):\n"
        '    """Says\n    things."""\n'
        "    # loudly\n"
        "    return {'length': shout(f'{VALUE!r:>3}')}\n"
    ),
    "toy/unused.py": "X = 1\n",
}


@pytest.fixture
def package(tmp_path: Path, toy_log: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy package with a stage that uses methods and more."""
    for name, text in MORE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(code, "REGISTRIES", code.REGISTRIES | {"toy.methods"})
    return tmp_path


def digest() -> str:
    return canonical(code.hashes("toy.stage", METHODS))


WEIGHTY = {
    "a line of the stage": ("toy/stage.py", "return {", "return {'height': 1, "),
    "a constant inside a formatted text": ("toy/stage.py", "!r:>3", "!s:>3"),
    "a function that it calls": ("toy/shared.py", "word.upper()", "word.title()"),
    "the method that the params name": ("toy/methods/lion.py", "volume = 3", "volume = 5"),
    "what that method imports": ("toy/mane.py", "30", "31"),
    "what it reaches through a package": ("toy/listed/entry.py", "VALUE = 1", "VALUE = 2"),
}

WEIGHTLESS = {
    "a comment": ("toy/stage.py", "# loudly", "# quietly\n    # and so on"),
    "a docstring": ("toy/stage.py", "Says\n    things.", "Keeps silent."),
    "the docstring of a method": ("toy/methods/lion.py", "'''Roars.'''", "pass"),
    "formatting": ("toy/stage.py", "{'length': shout", "{\n        'length' :  shout"),
    "a package __init__": ("toy/methods/__init__.py", "METHODS", "from toy.methods import tiger\nMETHODS"),
    "a method that is not named": ("toy/methods/tiger.py", "4", "5"),
    "a module that nobody imports": ("toy/unused.py", "1", "2"),
}


def edit(package: Path, name: str, before: str, after: str) -> None:
    text = (package / name).read_text()
    assert before in text
    (package / name).write_text(text.replace(before, after))


@pytest.mark.parametrize("change", WEIGHTY.values(), ids=WEIGHTY.keys())
def test_what_is_computed_with_changes_the_digest(change: tuple[str, str, str], package: Path) -> None:
    before = digest()
    edit(package, *change)
    assert digest() != before


@pytest.mark.parametrize("change", WEIGHTLESS.values(), ids=WEIGHTLESS.keys())
def test_what_computes_nothing_leaves_the_digest(change: tuple[str, str, str], package: Path) -> None:
    before = digest()
    edit(package, *change)
    assert digest() == before


def test_a_new_method_leaves_the_digest(package: Path) -> None:
    before = digest()
    (package / "toy/methods/puma.py").write_text("class Puma:\n    volume = 6\n")
    edit(package, "toy/methods/__init__.py", "METHODS", "from toy.methods.puma import Puma\nMETHODS")
    assert digest() == before


def test_a_renamed_file_or_a_moved_line_changes_the_digest(package: Path) -> None:
    before = digest()
    edit(package, "toy/mane.py", "LENGTH = 30", "B = 1\nLENGTH = 30")
    middle = digest()
    edit(package, "toy/mane.py", "B = 1\nLENGTH = 30", "LENGTH = 30\nB = 1")
    assert len({before, middle, digest()}) == 3


def test_the_machinery_weighs_nothing(package: Path) -> None:
    assert "tasks.progress" not in code.closure("toy.stage") and "tasks.params" not in code.closure("tasks.__main__")


def test_the_digest_is_the_same_in_another_process_and_folder(package: Path, tmp_path: Path) -> None:
    command = "from tests.tasks import test_keys; from tasks import code; code.REGISTRIES |= {'toy.methods'};"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (package / "toy").rename(elsewhere / "toy")
    found = subprocess.run(
        [sys.executable, "-c", f"{command} print(test_keys.digest())"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{elsewhere}:{ROOT}", "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (elsewhere / "toy").rename(package / "toy")
    assert found == digest()


def test_a_module_that_is_not_there_is_named(package: Path) -> None:
    with pytest.raises(InputError, match=r"module toy\.nothing is not there"):
        code.hashes("toy.nothing")
    with pytest.raises(InputError, match="package nowhere cannot be found"):
        code.hashes("nowhere.stage")


def test_files_beside_the_module_count(package: Path) -> None:
    def said() -> dict[str, str]:
        return code.hashes("toy.stage", files=("pages", "mane.py"))

    with pytest.raises(InputError, match="pages is not there"):
        said()
    (package / "toy/pages").mkdir()
    (package / "toy/pages/page.html").write_text("<p>")
    before = said()
    assert {"toy/pages/page.html", "toy/mane.py", "toy/stage.py"} <= before.keys()
    (package / "toy/pages/page.html").write_text("<b>")
    assert {name for name, hashed in said().items() if hashed != before[name]} == {"toy/pages/page.html"}


SECOND = toy.STAGES["second"]


def key(stage: Stage = SECOND, params: ToyParams | None = None, **inputs: str) -> str:
    return stage_key(stage, params or ToyParams(), {"first": "digest", **inputs})[0]


@pytest.mark.usefixtures("package")
def test_a_key_changes_with_stage_params_inputs_and_methods() -> None:
    params = ToyParams()
    assert key() == key(params=ToyParams())
    others = [
        key(replace(SECOND, name="other")),
        key(params=params.but("second", times=3)),
        key(params=params.but("second", seed=0)),
        key(first="other digest"),
        key(params=replace(params, methods={"second": METHODS})),
    ]
    assert len({key(), *others}) == 6


@pytest.mark.usefixtures("package")
def test_a_key_does_not_change_with_params_of_other_stages_or_their_order() -> None:
    params = ToyParams({"third": {"x": 1}, "second": {"b": [1, 2], "times": 2}, "first": {"word": "other"}})
    assert key(params=params) == key(params=ToyParams().but("second", b=[1, 2]))
    assert key(params=params) != key(params=params.but("second", b=[2, 1]))


@pytest.mark.usefixtures("package")
def test_a_new_version_of_torch_changes_the_key_but_not_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(torch: str) -> str:
        monkeypatch.setattr(keys, "version", lambda name: torch if name == "torch" else "1.0.31")
        return key()

    assert installed("2.13.0+cpu") == installed("2.13.0+cu130") != installed("2.13.1+cpu")


@pytest.mark.usefixtures("package")
def test_the_digest_stands_in_for_a_moving_name() -> None:
    stage = replace(SECOND, params=("second", "third.source"))
    params = ToyParams({"second": {"times": 2, "source": "models:/a@dense"}, "third.source": "imagefolder:/here"})
    renamed = params.but("second", source="models:/a/7")
    pointed = {"second.source": "abc", "third.source": "def", "elsewhere.source": "ghi"}
    found, ingredients = stage_key(stage, params, {"first": "digest"}, pointed)
    assert stage_key(stage, renamed, {"first": "digest"}, pointed)[0] == found
    assert stage_key(stage, params, {"first": "digest"}, {**pointed, "elsewhere.source": "new"})[0] == found
    assert stage_key(stage, params, {"first": "digest"}, {**pointed, "third.source": "new"})[0] != found
    assert stage_key(stage, params, {"first": "digest"})[0] != found
    assert ingredients["resolved"] == {"second.source": "abc", "third.source": "def"}
    assert ingredients["names"] == {"second.source": "models:/a@dense", "third.source": "imagefolder:/here"}
    assert key_of(ingredients) == found


@pytest.mark.usefixtures("package")
def test_a_digest_for_a_whole_section_stands_beside_it() -> None:
    keyed = [stage_key(SECOND, ToyParams(), {"first": "d"}, {"second": digest})[0] for digest in ("a", "b")]
    assert len({*keyed, key(first="d")}) == 3


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("/x"), {1, 2}, object()])
def test_what_has_no_canonical_form_is_refused_by_name(value: object) -> None:
    with pytest.raises(InputError, match=r"params second\.times = .* cannot be part of a key"):
        key(params=ToyParams().but("second", times=value))


def test_flat_params_are_dotted() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": []}, "e": {}}) == {"a.b.c": 1, "a.d": [], "e": {}}
    assert canonical({"b": 1, "a": "ü"}) == '{"a":"\\u00fc","b":1}'


def test_versions_are_read_without_importing() -> None:
    assert keys.packages() == {name: version(name).partition("+")[0] for name in ("torch", "timm")}


def modules() -> list[str]:
    return [stage.module for stage in STAGES.values() if (ROOT / f"{stage.module.replace('.', '/')}.py").is_file()]


@pytest.mark.parametrize("module", modules())
def test_no_stage_reaches_code_that_its_key_does_not_see(module: str) -> None:
    # `import heal` offers names lazily; what a stage takes from it there, the import graph cannot see.
    methods = [name for registry in sorted(code.REGISTRIES) for name in code.modules_in(registry)]
    graph = code._graph(code.FLOORS, code._fingerprint(code._roots([])))
    for name in code.closure(module, methods).keys() - {"tasks.mlflow_client"}:  # it only asks where heal lies
        assert "heal" not in graph.find_modules_directly_imported_by(name), f"{name} imports from `heal` itself"


def test_every_module_of_the_library_weighs_on_some_key() -> None:
    methods = [name for registry in sorted(code.REGISTRIES) for name in code.modules_in(registry)]
    reached = {name for module in modules() for name in code.closure(module, methods)}
    graph = code._graph(code.FLOORS, code._fingerprint(code._roots([])))
    library = {name for name in graph.modules if (ROOT / f"{name.replace('.', '/')}.py").is_file() and "heal." in name}
    # What recompresses in one call, or walks over sparsities, is for notebooks; stages call one verb at a time. And
    # what `auto` stands for counts in a key by the names and params of the methods that it chose.
    assert library - reached <= {"heal.recompression", "heal.transition", "heal.presets"}


def test_what_names_the_evaluation_follows_its_images_and_labels(tmp_path: Path) -> None:
    def named(root: Path, labels: str, shared: bool = False) -> str:
        overrides = [f"evaluation.source=imagefolder:{root}", f"evaluation.labels={labels}"]
        return resolve.evaluation(load(None, overrides), shared)

    images, table = folder(tmp_path / "images", ["0/a.png", "1/b.png"]), tmp_path / "labels.csv"
    table.write_text("file,label\n0/a.png,0\n1/b.png,1\n")
    before = named(images, str(table))
    moved = images.rename(tmp_path / "elsewhere")
    assert named(moved, str(table.rename(tmp_path / "other.csv"))) == before
    others = [named(moved, "true"), named(moved, "false"), named(moved, "true", shared=True)]
    (tmp_path / "other.csv").write_text("file,label\n0/a.png,1\n1/b.png,1\n")
    others.append(named(moved, str(tmp_path / "other.csv")))
    folder(moved, ["1/c.png"])
    others.append(named(moved, "true"))
    assert len({before, *others}) == 1 + len(others)
