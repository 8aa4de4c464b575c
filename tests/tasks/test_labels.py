"""No label is read on the way to a healed model, unless params allow it: with -1 in place of every label the bits are
the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from heal import bundle
from heal.allocators import ALLOCATORS
from heal.errors import InputError
from heal.healers import HEALERS
from heal.method import check
from heal.pruners import PRUNERS
from heal.values import Budget
from tasks import activations, allocation, artifacts, calibration, healing, manifest, pruning, resolve
from tasks.params import load
from tasks.progress import Progress
from tasks.table import STAGES
from tests.flows.workplace import PREPROCESSING
from tests.heal import nets
from tests.tasks.pictures import table
from tests.tasks.test_images import Heard

PICTURES = 12
ROOT = Path(__file__).parents[2]
PRESETS = [ROOT / "params.yaml", *sorted((ROOT / "benchmarks" / "presets").glob("*.yaml"))]
QUICK = {
    "evolutionary": "allocation.evolutionary={population: 3, parents: 2, generations: 1}",
    "layerwise": "healing.layerwise={iterations: 1}",
    "starfish": "healing.starfish={epochs: 1}",
    "unipts": "healing.unipts={epochs: 2, batch_size: 4}",
}


def _road(net: str, allocator: str, healer: str) -> list[str] | None:
    """Overrides of a road that makes sense for this network, or None."""
    options = {"kinds": ("qk",)} if healer == "qk_compensation" else {}
    for budget, pruner, text in (
        (Budget(weights=0.5), "magnitude", "{weights: 0.5}"),
        (Budget(neurons=0.5), "variance", "{neurons: 0.5}"),
        (Budget(blocks=0.75), "depth", "{blocks: 0.75}"),
    ):
        try:
            check(nets.build(net), budget, ALLOCATORS[allocator](**options), PRUNERS[pruner](), [HEALERS[healer]()])
        except InputError:
            continue
        quick = [QUICK[name] for name in (allocator, healer) if name in QUICK]
        budgets = [f"allocation.method={allocator}", f"allocation.budget={text}"]
        budgets += [f"allocation.{allocator}={{kinds: [qk]}}"] if options else []
        return [*budgets, f"pruning.method={pruner}", f"healing.methods=[{healer}]", *quick]
    return None


def _healed(
    net: str, labels: list[int], overrides: list[str], root: Path, preset: Path | None = None
) -> dict[str, object]:
    """Every file of the healed artifact with its digest."""
    return dict(manifest.scan(_walked(net, labels, overrides, root, Heard(), preset)["healing"]))


def _walked(
    net: str, labels: list[int], overrides: list[str], root: Path, heard: Heard, preset: Path | None = None
) -> dict[str, Path]:
    """The artifacts of the road, by stage."""
    path = table(root / "pictures.parquet", PICTURES, {"id": [f"x{n}" for n in range(PICTURES)], "label": labels})
    other = table(root / "other.parquet", 2, {"id": ["y0", "y1"]}, first=500)
    sources = [f"calibration.source=parquet:{path}", f"evaluation.source=parquet:{other}", "calibration.count=10"]
    stages = (calibration, activations, allocation, pruning, healing)
    folders = {name: root / name for name in ("dense", *(s.__name__.rpartition(".")[2] for s in stages))}
    bundle.save(nets.build(net), folders["dense"] / "bundle", metadata={"preprocessing": PREPROCESSING})
    artifacts.write_json(folders["dense"] / "dense.json", {"classes": nets.CLASSES})
    for stage in stages:
        name = stage.__name__.rpartition(".")[2]
        folders[name].mkdir()
        params = load(preset, [*sources, *overrides]).restrict(STAGES[name].params)
        inputs = {upstream: folders[upstream] for upstream in STAGES[name].upstream}
        stage.run(params, inputs, folders[name], Progress(root / "work" / name / "checkpoints", heard))
    return folders


QUICKLY = [
    ("relative_repairability", "variance_matching"),
    ("uniform", "unipts"),
    ("global_variance", "closed_form"),
    ("global_variance", "qk_compensation"),
]
SLOWLY = [
    *((name, "none") for name in ALLOCATORS),
    *(
        ("global_variance" if healer.unit == "neurons" else "uniform", name)
        for name, healer in HEALERS.items()
        if name not in dict(QUICKLY).values()
    ),
    ("global_variance", "starfish"),
]


@pytest.mark.parametrize(
    ("allocator", "healer"),
    [*QUICKLY, *(pytest.param(*methods, marks=pytest.mark.slow) for methods in SLOWLY)],
)
def test_labels_change_no_bit(allocator: str, healer: str, tmp_path: Path) -> None:
    net = next(net for net in ("resnet", "vit") if _road(net, allocator, healer))
    overrides = _road(net, allocator, healer)
    assert overrides is not None
    true = _healed(net, [n % 3 for n in range(PICTURES)], overrides, tmp_path / "true")
    none = _healed(net, [-1] * PICTURES, overrides, tmp_path / "none")
    assert true == none


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_labels_change_no_bit_of_a_preset(preset: Path, tmp_path: Path) -> None:
    """Its methods and params, on a small network; one epoch shows as well as ten what is read."""
    params = load(preset, [])
    methods = [params.allocation.method, *params.healing.methods]
    overrides = [QUICK[name] for name in methods if name in QUICK]
    overrides += [] if preset.name != "params.yaml" else ["allocation.budget={neurons: 0.5}"]
    net = "resnet" if "variance_matching" in methods else "vit"
    found = [
        _healed(net, labels, overrides, tmp_path / name, preset)
        for name, labels in (("true", [n % 3 for n in range(PICTURES)]), ("none", [-1] * PICTURES))
    ]
    assert found[0] == found[1]


ALLOWED = "calibration.labels=true"
BY_LABELS = [
    "allocation.method=evolutionary",
    "allocation.budget={weights: 0.1}",
    "allocation.evolutionary={population: 3, parents: 2, generations: 1, fitness: labels}",
    "pruning.method=magnitude",
    "healing.methods=[none]",
]


def test_labels_that_are_allowed_judge_a_search_by_them_and_the_log_says_so(tmp_path: Path) -> None:
    labels = [1] * 6 + [6] * 6  # what the network mostly says of the first, and of a few others
    heard, said, evidence, images = Heard(), list[list[str]](), [], []
    for name, drawn in (("true", labels), ("again", labels), ("shuffled", labels[::-1])):
        heard.lines.clear()
        folders = _walked("resnet", drawn, [*BY_LABELS, ALLOWED], tmp_path / name, heard)
        said.append([line for line in heard.lines if "labels" in line and "are read" in line])
        evidence.append(artifacts.load_allocation(folders["allocation"]).evidence)
        images.append((folders["calibration"] / "images.parquet").read_bytes())
    assert said[0] == [
        "draws 10 of 12 images of parquet:pictures.parquet; labels are read (calibration.labels)",
        "labels of 10 calibration images are read (evolutionary.fitness)",
    ]
    assert evidence[0] == evidence[1] and evidence[0]["fitness"] > evidence[2]["fitness"], "labels judge"
    assert all(found["labels"] is True for found in evidence)
    assert images[0] == images[2], "and no other draw"


def test_labels_that_are_allowed_change_no_bit_of_what_does_not_read_them(tmp_path: Path) -> None:
    overrides = _road("resnet", "uniform", "variance_matching")
    assert overrides is not None
    labels = [n % 3 for n in range(PICTURES)]
    allowed = _healed("resnet", labels, [*overrides, ALLOWED], tmp_path / "allowed")
    assert allowed == _healed("resnet", labels, overrides, tmp_path / "not")


def test_a_relabelled_source_is_another_one_where_its_labels_may_be_read(tmp_path: Path) -> None:
    def resolved(labels: list[int], *overrides: str) -> str:
        path = table(tmp_path / "pictures.parquet", PICTURES, {"label": labels})
        params = load(None, ["dense.source=timm:resnet18", f"calibration.source=parquet:{path}", *overrides])
        return resolve.resolve_images(params)["calibration.source"]

    one, other = [n % 3 for n in range(PICTURES)], [n % 2 for n in range(PICTURES)]
    assert resolved(one) == resolved(other) != resolved(one, ALLOWED) != resolved(other, ALLOWED)
