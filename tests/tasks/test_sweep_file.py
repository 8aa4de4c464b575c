"""A sweep's file: every point with its own params, every mistake with its place, before anything runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from heal.errors import InputError
from heal.values import Budget
from tasks import sweep_file
from tasks.params import ParamsError, load
from tasks.sweep_file import STAGES, Sweep

TEXT = """\
name: digits
params: base.yaml
set: {evaluation.latency_rounds: 0, healing.starfish.epochs: 1}
models:
  small: {}
  large:
    calibration.count: 99
methods:
  uniform: {allocation.method: uniform, healing.methods: [none]}
  erk+starfish:
    allocation.method: erk
    healing.methods: [starfish]
    healing.starfish.epochs: 2
budgets: [{weights: 0.9}, {weights: 0.95}]
seeds: [0, 7]
"""
BASE = """\
calibration: {count: 32, seed: 5}
pruning: {method: magnitude}
healing: {starfish: {epochs: 9}}
"""


def written(folder: Path, text: str = TEXT, base: str = BASE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "base.yaml").write_text(base)
    (folder / "sweep.yaml").write_text(text)
    return folder / "sweep.yaml"


def refusal(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ParamsError) as caught:
        sweep_file.load(path, overrides)
    return list(caught.value.problems)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return sweep_file.load(written(tmp_path))


def test_every_combination_is_a_point_with_a_name_of_its_own(sweep: Sweep) -> None:
    axes = (("small", "large"), ("uniform", "erk+starfish"), ("weights=0.9", "weights=0.95"), (0, 7))
    assert [point.name for point in sweep.points] == ["/".join(map(str, one)) for one in itertools.product(*axes)]
    assert len({point.digest for point in sweep.points}) == len(sweep.points)


def test_a_points_params_are_those_of_the_same_overrides_of_a_run(sweep: Sweep, tmp_path: Path) -> None:
    (point,) = sweep.matching("large/erk+starfish/weights=0.95/7")
    seeds = [f"{section}.seed=7" for section in ("calibration", "healing", "allocation")]
    overrides = ["evaluation.latency_rounds=0", "calibration.count=99", "allocation.method=erk", *seeds]
    overrides += ["healing.methods=[starfish]", "healing.starfish.epochs=2", "allocation.budget={weights: 0.95}"]
    assert point.params == load(tmp_path / "base.yaml", overrides)
    assert point.params.allocation.budget.build() == Budget(weights=0.95)


def test_the_method_wins_over_the_model_and_the_command_line_over_both(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT.replace("calibration.count: 99", "healing.starfish.epochs: 5"))
    (point,) = sweep_file.load(path).matching("large/erk*/weights=0.9/0")
    assert point.params.healing.options("starfish")["epochs"] == 2
    (point,) = sweep_file.load(path, ["healing.starfish.epochs=3"]).matching("large/erk*/weights=0.9/0")
    assert point.params.healing.options("starfish")["epochs"] == 3


def test_replacing_a_section_does_not_take_budget_and_seed_away(tmp_path: Path) -> None:
    overrides = ["calibration={count: 8}", "allocation={method: lamp}"]
    for point in sweep_file.load(written(tmp_path), overrides).points:
        assert point.params.allocation.method == "lamp"
        assert (point.params.calibration.count, point.params.calibration.seed) == (8, point.seed)
        assert point.params.allocation.budget.weights == float(point.budget.removeprefix("weights="))


def test_a_value_keeps_its_place_in_either_file(sweep: Sweep) -> None:
    (point,) = sweep.matching("large/uniform/weights=0.95/7")
    places = {
        "pruning.method": "base.yaml:2",
        "evaluation.latency_rounds": "sweep.yaml:3",
        "calibration.count": "sweep.yaml:7",
        "allocation.method": "sweep.yaml:9",
        "allocation.budget": "sweep.yaml:14",
        "calibration.seed": "sweep.yaml:15",
    }
    assert {key: point.params.where(key) for key in places} == places


def test_without_seeds_there_is_one_and_without_a_base_the_defaults(tmp_path: Path) -> None:
    text = "name: a\nmodels: {m: }\nmethods: {v: {}}\nbudgets: [{neurons: 0.5}]\n"
    (point,) = sweep_file.load(written(tmp_path, text)).points
    assert point.name == "m/v/neurons=0.5/0"
    assert point.params == load(None)


def test_only_what_the_stages_read_counts_in_a_points_digest(tmp_path: Path) -> None:
    before = sweep_file.load(written(tmp_path)).points[0].digest
    assert sweep_file.load(tmp_path / "sweep.yaml", ["registration.name=other"]).points[0].digest == before
    assert sweep_file.load(tmp_path / "sweep.yaml", ["healing.starfish.lr=1e-3"]).points[0].digest == before
    assert sweep_file.load(tmp_path / "sweep.yaml", ["activations.batch_size=8"]).points[0].digest != before
    assert list(STAGES)[-1] == "evaluation" and "registration" not in STAGES


def test_points_are_chosen_by_their_name(sweep: Sweep) -> None:
    assert [point.name for point in sweep.matching("small/*/weights=0.9/0")] == [
        "small/uniform/weights=0.9/0",
        "small/erk+starfish/weights=0.9/0",
    ]
    assert sweep.matching(None) == sweep.points
    with pytest.raises(InputError, match=r"--only smal/.*: no point .* did you mean 'small/uniform"):
        sweep.matching("smal/uniform/weights=0.9/0")


def test_all_mistakes_come_together_each_once_with_place_and_advice(tmp_path: Path) -> None:
    text = TEXT.replace("name:", "nmae:").replace("calibration.count", "calibration.cuont").replace("erk\n", "errk\n")
    assert refusal(written(tmp_path, text, BASE.replace("magnitude", "magnitud")), "healing.starfihs.lr=1") == [
        "sweep.yaml:1: nmae is not a key of a sweep; did you mean 'name'?",
        "sweep.yaml:1: a sweep needs name, such as name: cifar",
        "-S healing.starfihs.lr=1: healing.starfihs is not a key; did you mean healing.starfish?",
        "base.yaml:2: pruning.method = magnitud is not a method; did you mean magnitude?",
        "sweep.yaml:11: allocation.method = errk is not a method; did you mean erk?",
        "sweep.yaml:7: calibration.cuont is not a key; did you mean calibration.count?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: digits", "name: a/b", "sweep.yaml:1: name = a/b must be at most 64 letters"),
        ("params: base.yaml", "params: bsae.yaml", "sweep.yaml:2: params = bsae.yaml: there is no such file"),
        ("params: base.yaml", "params: [1]", "sweep.yaml:2: params = [1]: there is no such file"),
        ("set: {", "set: [3] #", "sweep.yaml:3: set must be a mapping of params"),
        ("evaluation.latency_rounds", "evaluation latency", "sweep.yaml:3: set: 'evaluation latency' is no param"),
        ("small: {}", "a/b: {}", "sweep.yaml:5: models: 'a/b' is no name"),
        ("small: {}", "large: {}", "sweep.yaml:7: models.large is given twice"),
        ("small: {}", "small: 3", "sweep.yaml:5: models.small must be a mapping of params"),
        ("calibration.count: 99", "calibration.seed: 1", "sweep.yaml:7: models.large must not set calibration.seed"),
        ("calibration.count: 99", "calibration: {seed: 1}", "sweep.yaml:7: models.large must not set calibration.seed"),
        ("calibration.count: 99", "allocation.budget.macs: 0.1", "the budgets of the sweep do"),
        ("budgets: [{weights: 0.9}", "budgets: [{wieghts: 0.9}", "sweep.yaml:14: budgets: wieghts is not a unit; did"),
        ("{weights: 0.9}", "0.9", "sweep.yaml:14: budgets: each must be one unit with the share to remove"),
        ("{weights: 0.9}", "{weights: a}", "sweep.yaml:14: budgets: weights: a must be a number"),
        ("{weights: 0.9}", "{weights: 0.95}", "sweep.yaml:14: budgets: weights=0.95 is given twice"),
        ("{weights: 0.9}", "{weights: 90}", "sweep.yaml:14: allocation.budget: budget weights = 90 is not a fraction"),
        ("seeds: [0, 7]", "seeds: 3", "sweep.yaml:15: seeds must be a list of at least one, such as seeds: [0, 1]"),
        ("seeds: [0, 7]", "seeds: []", "sweep.yaml:15: seeds must be a list of at least one"),
        ("seeds: [0, 7]", "seeds: [0, true]", "sweep.yaml:15: seeds: True must be an integer >= 0"),
        ("seeds: [0, 7]", "seeds: [0, -1]", "sweep.yaml:15: seeds: -1 must be an integer >= 0"),
        ("seeds: [0, 7]", "seeds: [7, 7]", "sweep.yaml:15: seeds: 7 is given twice"),
        ("seeds: [0, 7]", "seedz: [0, 7]", "sweep.yaml:15: seedz is not a key of a sweep; did you mean 'seeds'?"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(old: str, new: str, expected: str, tmp_path: Path) -> None:
    assert old in TEXT
    lines = refusal(written(tmp_path, TEXT.replace(old, new, 1)))
    assert any(line.startswith(expected) or expected in line for line in lines), lines


@pytest.mark.parametrize("axis", ["models", "methods", "budgets"])
def test_an_axis_that_is_not_there_is_asked_for(axis: str, tmp_path: Path) -> None:
    kept = [line for line in TEXT.splitlines() if not line.startswith((" ", *("models", "methods", "budgets")))]
    others = "".join(f"{other}: {{a: {{}}}}\n" for other in ("models", "methods") if other != axis)
    lines = refusal(written(tmp_path, "\n".join(kept) + f"\n{others}"))
    assert any(f"a sweep needs {axis}, such as {axis}: " in line for line in lines), lines


@pytest.mark.parametrize(
    "override", ["calibration.seed=3", "healing={seed: 3, methods: [none]}", "allocation.budget={neurons: 0.5}"]
)
def test_the_command_line_must_not_make_points_alike(override: str, tmp_path: Path) -> None:
    (line,) = refusal(written(tmp_path), override)
    assert line.startswith(f"-S {override}: in a sweep its ") and "in sweep.yaml" in line


def test_a_method_that_contradicts_a_budget_is_refused_with_both_places(tmp_path: Path) -> None:
    lines = refusal(written(tmp_path, TEXT.replace("{weights: 0.95}", "{neurons: 0.5}")))
    assert lines[0].startswith("sweep.yaml:9: allocation.method = uniform works on weights")
    assert "allocation.budget is in neurons (sweep.yaml:14)" in lines[0]
