"""The healing stage: a healer that moves the mask is followed by all that comes after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heal import bundle, masking
from heal.values import Mask
from tasks import activations, allocation, artifacts, calibration, healing, pruning
from tasks.params import load
from tasks.progress import Progress
from tasks.table import STAGES
from tests.flows.workplace import PREPROCESSING
from tests.heal import nets

OVERRIDES = [
    "calibration={source: digits, count: 16}",
    "allocation={method: uniform, budget: {weights: 0.7}}",
    "pruning={method: magnitude}",
    "healing={methods: [unipts, starfish], unipts: {epochs: 3, batch_size: 8, lr: 0.1}, starfish: {epochs: 1}}",
]


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of every stage, from a tiny ViT's weights to healing by two healers."""
    root = tmp_path_factory.mktemp("road")
    folders = {
        name: root / name for name in ("dense", "calibration", "activations", "allocation", "pruning", "healing")
    }
    bundle.save(nets.build("vit"), folders["dense"] / "bundle", metadata={"preprocessing": PREPROCESSING})
    for stage in (calibration, activations, allocation, pruning, healing):
        name = stage.__name__.rpartition(".")[2]
        folders[name].mkdir()
        params = load(None, OVERRIDES).restrict(STAGES[name].params)
        inputs = {upstream: folders[upstream] for upstream in STAGES[name].upstream}
        stage.run(params, inputs, folders[name], Progress(root / "work" / name / "checkpoints"))
    return folders


def _stays(folder: Path, mask: Mask) -> dict[str, Tensor]:
    model = bundle.load(folder / "bundle")
    return {layer: model.get_parameter(f"{layer}.weight") != 0 for layer in mask.keep}


def test_the_bundles_are_saved_with_the_mask_that_was_moved(healed: dict[str, Path]) -> None:
    mask = artifacts.load_pruned(healed["pruning"])
    assert isinstance(mask, Mask)
    first, last = _stays(healed["healing"] / "after" / "unipts", mask), _stays(healed["healing"], mask)
    assert any(not torch.equal(first[layer], keep) for layer, keep in mask.keep.items()), "unipts moved the mask"
    assert all(int(first[layer].sum()) == int(keep.sum()) for layer, keep in mask.keep.items())
    assert masking.holds(bundle.load(healed["healing"] / "bundle"), Mask(first)), "starfish trained under it"
    assert all(torch.equal(last[layer], first[layer]) for layer in first)


def test_masks_are_the_bundles_and_not_the_reports(healed: dict[str, Path]) -> None:
    text = (healed["healing"] / "healing.json").read_text()
    reports = json.loads(text)
    assert [report["method"] for report in reports] == ["unipts", "starfish"]
    assert all("pruned" not in report and "seconds" not in report for report in reports)
    assert len(reports[0]["losses"]) == 6 and reports[0]["params"]["lr"] == 0.1
