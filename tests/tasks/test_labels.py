"""No label is read on the way to a healed model: with -1 in place of every label the bits are the same."""

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
from tasks import activations, allocation, calibration, healing, manifest, pruning
from tasks.params import load
from tasks.progress import Progress
from tasks.table import STAGES
from tests.flows.workplace import PREPROCESSING
from tests.heal import nets
from tests.tasks.pictures import table

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
    for budget, pruner, text in (
        (Budget(weights=0.6), "magnitude", "{weights: 0.6}"),
        (Budget(neurons=0.5), "variance", "{neurons: 0.5}"),
    ):
        try:
            check(nets.build(net), budget, ALLOCATORS[allocator](), PRUNERS[pruner](), [HEALERS[healer]()])
        except InputError:
            continue
        quick = [QUICK[name] for name in (allocator, healer) if name in QUICK]
        budgets = [f"allocation.method={allocator}", f"allocation.budget={text}"]
        return [*budgets, f"pruning.method={pruner}", f"healing.methods=[{healer}]", *quick]
    return None


def _healed(
    net: str, labels: list[int], overrides: list[str], root: Path, preset: Path | None = None
) -> dict[str, object]:
    """Every file of the healed artifact with its digest."""
    path = table(root / "pictures.parquet", PICTURES, {"id": [f"x{n}" for n in range(PICTURES)], "label": labels})
    other = table(root / "other.parquet", 2, {"id": ["y0", "y1"]}, first=500)
    sources = [f"calibration.source=parquet:{path}", f"evaluation.source=parquet:{other}", "calibration.count=10"]
    stages = (calibration, activations, allocation, pruning, healing)
    folders = {name: root / name for name in ("dense", *(s.__name__.rpartition(".")[2] for s in stages))}
    bundle.save(nets.build(net), folders["dense"] / "bundle", metadata={"preprocessing": PREPROCESSING})
    for stage in stages:
        name = stage.__name__.rpartition(".")[2]
        folders[name].mkdir()
        params = load(preset, [*sources, *overrides]).restrict(STAGES[name].params)
        inputs = {upstream: folders[upstream] for upstream in STAGES[name].upstream}
        stage.run(params, inputs, folders[name], Progress(root / "work" / name / "checkpoints"))
    return dict(manifest.scan(folders["healing"]))


QUICKLY = [("relative_repairability", "variance_matching"), ("uniform", "unipts"), ("global_variance", "closed_form")]
SLOWLY = [
    *((name, "none") for name in ALLOCATORS),
    *(("uniform", name) for name in HEALERS if name not in ("closed_form", "unipts")),
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
