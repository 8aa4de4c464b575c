"""The healing stage: a healer that moves the mask is followed by all that comes after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from heal import bundle, masking
from heal.surgery import widths
from heal.values import ChannelCut, Mask
from tasks import activations, allocation, artifacts, calibration, evaluation, healing, healing_reports, plots, pruning
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


IN_ROUNDS = [
    "calibration={source: digits, count: 16}",
    "allocation={method: global_variance, budget: {neurons: 0.5}}",
    "pruning={method: variance, variance: {fold_mean: false}}",
    "healing={methods: [closed_form, starfish], rounds: 2, starfish: {epochs: 1, batch_size: 8}}",
]


def _road(root: Path, overrides: list[str]) -> dict[str, Path]:
    """The folder of every stage, from a tiny ViT's weights to healing by two healers."""
    folders = {
        name: root / name for name in ("dense", "calibration", "activations", "allocation", "pruning", "healing")
    }
    bundle.save(nets.build("vit"), folders["dense"] / "bundle", metadata={"preprocessing": PREPROCESSING})
    for stage in (calibration, activations, allocation, pruning, healing):
        name = stage.__name__.rpartition(".")[2]
        folders[name].mkdir()
        params = load(None, overrides).restrict(STAGES[name].params)
        inputs = {upstream: folders[upstream] for upstream in STAGES[name].upstream}
        stage.run(params, inputs, folders[name], Progress(root / "work" / name / "checkpoints"))
    return folders


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _road(tmp_path_factory.mktemp("road"), OVERRIDES)


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


def test_a_cut_at_once_says_nothing_of_rounds(healed: dict[str, Path]) -> None:
    assert "round" not in (healed["healing"] / "healing.json").read_text()
    assert "rounds" not in bundle.read(healed["healing"] / "bundle")["method"]


@pytest.mark.parametrize(("budget", "rounds", "ran"), [("blocks: 0.4", 2, [1]), ("neurons: 0.0", 3, [3])])
def test_the_bundle_is_that_of_the_last_round_in_which_anything_goes(
    budget: str, rounds: int, ran: list[int], tmp_path: Path
) -> None:
    cut = "depth" if "blocks" in budget else "auto"
    folders = _road(
        tmp_path,
        [
            "calibration={source: digits, count: 16}",
            f"allocation={{method: {cut}, budget: {{{budget}}}}}",
            f"pruning={{method: {cut}}}",
            f"healing={{methods: [variance_matching, starfish], rounds: {rounds}, starfish: {{epochs: 1}}}}",
        ],
    )
    reports = json.loads((folders["healing"] / "healing.json").read_text())
    assert [report["round"] for report in reports if report["method"] == "starfish"] == ran
    assert healing_reports.rounds(reports) == 1 and bundle.read(folders["healing"] / "bundle")["method"]["rounds"] > 1
    assert (artifacts.read_json(folders["pruning"] / "pruned.json")["removed"] > 0) == ("blocks" in budget)
    healed, pruned = (bundle.load(folders[stage] / "bundle") for stage in ("healing", "pruning"))
    assert widths(healed) == widths(pruned)
    assert list(evaluation.candidates(folders)) == ["dense", "pruned", "after variance_matching", "healed"]


def test_what_a_pruner_leaves_in_place_counts_as_kept(tmp_path: Path) -> None:
    """The allocation's budget is a plan."""
    told = ["calibration={source: digits, count: 4}", "allocation={method: uniform, budget: {weights: 0.5}}"]
    folders = _road(tmp_path, [*told, "pruning={method: none}", "healing={methods: [none]}"])
    budget = evaluation._budget(folders)
    assert (budget["asked"], budget["got"]) == (budget["total"] // 2, budget["total"])


def test_of_rounds_all_are_reported_and_the_last_leaves_bundles(tmp_path: Path) -> None:
    folders = _road(tmp_path, IN_ROUNDS)
    reports = json.loads((folders["healing"] / "healing.json").read_text())
    ran = [(report["method"], report["round"]) for report in reports]
    assert ran == [("closed_form", 1), ("starfish", 1), ("closed_form", 2), ("starfish", 2)]
    cut = artifacts.load_pruned(folders["pruning"])
    assert isinstance(cut, ChannelCut)
    for folder in (folders["healing"], folders["healing"] / "after" / "closed_form"):
        assert widths(bundle.load(folder / "bundle")) | cut.kept == widths(bundle.load(folder / "bundle"))
    made = bundle.read(folders["healing"] / "bundle")["method"]
    assert made["healers"] == ["closed_form", "starfish"] and made["rounds"] == 2
    assert list(evaluation.candidates(folders)) == ["dense", "pruned", "after closed_form", "healed"]
    kept = tmp_path / "work" / "healing" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["1-starfish", "3-starfish"]
    names = [row[2] for row in plots.PLOTS["healing"].rows(folders["healing"])]
    assert list(dict.fromkeys(names)) == ["starfish round 1", "starfish round 2"]
