"""What the documents say is true: blocks run, commands and targets exist, links lead somewhere, params load."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import heal
from heal.allocators import ALLOCATORS
from heal.compat import timm
from heal.healers import HEALERS
from heal.masking import is_n_of_m
from heal.presets import TABLES
from heal.pruners import PRUNERS
from tasks import params, sweep_file

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
PRESETS = sorted([ROOT / "params.yaml", *(ROOT / "benchmarks" / "presets").glob("*.yaml")])
METHODS = [
    (heading, name, method)
    for heading, methods in (("Allocators", ALLOCATORS), ("Pruners", PRUNERS), ("Healers", HEALERS))
    for name, method in methods.items()
]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """The words of every line in the page's shell blocks that calls the program."""
    for line in "".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == program:
            yield words[1:]


def cases(program: str) -> list[Any]:
    found = {shlex.join(words): words for page in PAGES for words in commands(page, program)}
    return [pytest.param(words, id=text or program) for text, words in found.items()]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, from which modules can be imported; they are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def tiny_vit(size: int = 32) -> torch.nn.Module:
    shape = {"img_size": size, "patch_size": size // 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model: torch.nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=10, **shape)
    return model.eval()


def execute(page: Path, namespace: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run the page's Python blocks in order; one that begins with `# name.py` becomes that file instead."""
    for block in blocks(page, "python"):
        file = re.match(r"# (\w+\.py)\n", block)
        if file:
            (folder / file[1]).write_text(block, encoding="utf-8")
            importlib.invalidate_caches()
        else:
            exec(compile(block, str(page), "exec"), namespace)
    return namespace


def test_the_readme_compresses_a_network(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "photos").mkdir()
    for index in range(8):
        noise = torch.randint(0, 256, (240, 240, 3), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(workplace / "photos" / f"{index}.jpg")
    monkeypatch.setattr(timm, "create_model", _without_download(timm.create_model))
    names = execute(ROOT / "README.md", {}, workplace)
    again = heal.load(workplace / "bundle")
    assert torch.equal(again(names["images"]), names["result"].model(names["images"]))
    widths = [names["result"].model.get_submodule(f"blocks.{index}.mlp.fc1").out_features for index in range(2)]
    assert sum(widths) == 2 * 128 // 2


def test_the_readmes_python_needs_no_pipeline(workplace: Path) -> None:
    """The same text in an interpreter in which nothing of the pipeline can be imported."""
    (workplace / "photos").mkdir()
    for index in range(4):
        Image.new("RGB", (240, 240), (60 * index, 100, 200 - 30 * index)).save(workplace / "photos" / f"{index}.jpg")
    blocked = ["prefect", "mlflow", "dvc", "datasets", "pydantic", "pandas", "sklearn", "typer", "tasks", "flows"]
    readme = "\n".join(blocks(ROOT / "README.md", "python"))
    published = '"deit_tiny_patch16_224", pretrained=True'
    assert published in readme
    small = '"deit_tiny_patch16_224", embed_dim=32, depth=2, num_heads=2, num_classes=10'
    text = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n{readme.replace(published, small)}"
    text += "\nassert heal.load('bundle/')(images).shape == (4, 10)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=workplace, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _without_download(make: Any) -> Any:
    """The published weights need a network; the road is the same for a small model of the family."""

    def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
        small = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
        model: torch.nn.Module = make(name, **(small if pretrained else kwargs))
        return model

    return create_model


def test_the_bundle_page_reads_a_bundle_with_numpy(workplace: Path) -> None:
    names = execute(
        ROOT / "docs" / "bundle-format.md",
        {"heal": heal, "model": tiny_vit(), "images": torch.randn(16, 3, 32, 32)},
        workplace,
    )
    assert names["packed"]
    page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    written = json.loads((workplace / "bundle" / "bundle.json").read_text(encoding="utf-8"))
    assert [key for key in written if f"`{key}`" not in page] == []
    assert [file.name for file in (workplace / "bundle").iterdir() if f"`{file.name}`" not in page] == []


def test_a_network_of_ones_own_is_cut_saved_and_loaded(workplace: Path) -> None:
    names = execute(ROOT / "docs" / "bring-your-own-model.md", {}, workplace)
    widths = [step.up.out_features for step in names["again"].steps]
    assert sum(widths) == 3 * 128 // 2


def test_the_worked_example_is_a_pruner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(block for block in blocks(ROOT / "CONTRIBUTING.md", "python") if block.startswith("# heal/pruners/"))
    path = tmp_path / Path(block.splitlines()[0].removeprefix("# ")).name
    path.write_text(block, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"heal.pruners.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(PRUNERS, path.stem, module.RandomWeights)

    overrides = ["allocation.method=uniform", "allocation.budget={weights: 0.7}", "healing.methods=[none]"]
    loaded = params.load(None, [*overrides, f"pruning.method={path.stem}", f"pruning.{path.stem}.seed=3"])
    assert loaded.pruning.options(path.stem) == {"seed": 3}

    def prune() -> heal.Mask | heal.ChannelCut:
        budget = heal.Budget(weights=0.7)
        return heal.recompress(tiny_vit(), torch.randn(4, 3, 32, 32), budget, "uniform", path.stem, ["none"]).pruned

    first, second = prune(), prune()
    assert isinstance(first, heal.Mask) and isinstance(second, heal.Mask)
    assert first.total - first.zeros == heal.Budget(weights=0.7).kept(first.total)
    assert all(torch.equal(first.keep[layer], second.keep[layer]) for layer in first.keep)
    images, half = torch.randn(4, 3, 32, 32), heal.Budget(weights=0.5)
    patterned = heal.recompress(tiny_vit(), images, half, "n_of_m", path.stem, ["none"]).pruned
    assert isinstance(patterned, heal.Mask) and patterned.pattern is not None
    assert all(is_n_of_m(keep, patterned.pattern) for keep in patterned.keep.values())


@pytest.mark.parametrize("heading, name, method", METHODS, ids=[f"{kind}-{name}" for kind, name, _ in METHODS])
def test_the_methods_page_has_every_method_with_its_params(heading: str, name: str, method: type[Any]) -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    kind = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    assert kind is not None
    section = re.search(rf"^### `{name}`\n(.*?)(?=^### |\Z)", kind[1], re.DOTALL | re.MULTILINE)
    assert section is not None, f"{heading}: {name} has no section"
    for field in dataclasses.fields(method):
        default = json.dumps(field.default).strip('"')
        stated = re.search(rf"`{field.name}` \(`?([^)`]*)`?\)", section[1])
        assert stated is not None, f"{name}.{field.name} is not described"
        assert stated[1] == default or float(stated[1]) == field.default


@pytest.mark.parametrize("path", PRESETS, ids=name_of)
def test_every_committed_params_file_loads(path: Path) -> None:
    params.load(path, [])


@pytest.mark.parametrize("text", [b for page in PAGES for b in blocks(page, "yaml")], ids=lambda t: t.splitlines()[0])
def test_params_in_the_documents_load(text: str, tmp_path: Path) -> None:
    name, load = ("sweep.yaml", sweep_file.load) if text.startswith("# sweep.yaml") else ("params.yaml", params.load)
    (tmp_path / name).write_text(text, encoding="utf-8")
    load(tmp_path / name, [])


@pytest.mark.parametrize("words", cases("regrow"))
def test_every_command_of_the_documents_parses(words: list[str]) -> None:
    import typer

    from flows import cli

    group = typer.main.get_command(cli.app)
    command, context, rest = group, group.make_context("regrow", [], resilient_parsing=True), words
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
        context = command.context_class(command, info_name=name, parent=context, resilient_parsing=True)
    command.make_context(command.name, rest)
    params.load(None, [rest[index + 1] for index, word in enumerate(rest) if word == "-S"])


@pytest.mark.parametrize("words", cases("make"))
def test_every_make_target_of_the_documents_exists(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(words) <= targets


@pytest.mark.parametrize("words", cases("dvc"))
def test_params_that_dvc_is_given_load(words: list[str]) -> None:
    assert (ROOT / "dvc.yaml").is_file()
    params.load(None, [words[index + 1] for index, word in enumerate(words) if word == "-S"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


def test_the_readme_says_what_auto_takes() -> None:
    section = (ROOT / "README.md").read_text().partition("## Which method when")[2].partition("\n## ")[0]
    for what, table in TABLES.items():
        for kind, (allocator, pruner, healers) in table.items():
            names = ", ".join(f"`{method.name}`" for method in (allocator, pruner, *healers))
            assert what == "weights in a pattern" or names in section, (what, kind)
