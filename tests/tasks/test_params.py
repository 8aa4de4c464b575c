"""Params: read as YAML 1.2, checked as a whole, refused with place and advice, handed out by section."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heal.errors import InputError, MethodError
from heal.values import Budget
from tasks.params import Params, ParamsError, UndeclaredReadError, load
from tasks.params_file import Written, override
from tasks.params_schema import Sections
from tasks.table import STAGES

CANONICAL = Path(__file__).parents[2] / "params.yaml"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return path


def refusal(path: Path | None, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        _ = load(path, overrides).sections
    return str(caught.value).splitlines()


def test_the_canonical_file_says_the_defaults_but_for_what_it_cuts() -> None:
    given, defaults = load(CANONICAL).flat(), load(None).flat()
    # presets rank otherwise than a method that is named
    ranked = {"allocation.global_variance.statistic", "pruning.variance.statistic"}
    others = {"allocation.global_variance.multiple", "allocation.budget.neurons"}
    assert {key for key in given if given[key] != defaults.get(key)} == others | ranked
    assert given.keys() == defaults.keys()


def test_reading_the_module_costs_no_torch() -> None:
    code = "import tasks.params, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CANONICAL.parent).returncode == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("6e-4", 6e-4), ("6.0e-4", 6e-4), ("1E-3", 1e-3), (".5", 0.5), ("1", 1.0), ("+0.25", 0.25)],
)
def test_numbers_read_as_written(text: str, value: float) -> None:
    params = load(None, [f"healing.starfish.lr={text}", "healing.starfish.min_lr=0"])
    assert params.healing.options("starfish")["lr"] == value


@pytest.mark.parametrize("text", ["no", "on", "1:30", "2026-01-01", "0x10", "1_000", "nan", ".inf", "1" * 30])
def test_what_only_yaml_1_1_converts_stays_text(text: str) -> None:
    assert override(Written(), [f"report.title={text}"]).values == {"report": {"title": text}}


def test_a_later_override_wins_and_a_section_can_be_replaced() -> None:
    params = load(
        None, ["healing.seed=1", "healing.seed=2", "allocation.budget.neurons=0.1", "allocation.budget={neurons: 0.25}"]
    )
    assert params.healing.seed == 2
    assert params.allocation.budget.build() == Budget(neurons=0.25)


def test_every_value_knows_where_it_was_set(tmp_path: Path) -> None:
    path = written(tmp_path, "healing:\n  seed: 3\ncalibration:\n  count: 9\n")
    params = load(path, ["calibration.count=10"])
    assert params.where("healing.seed") == "params.yaml:2"
    assert params.where("calibration.count") == "-S calibration.count=10"
    assert params.where("evaluation.source") == "default"


def test_a_section_that_only_an_override_has_is_the_overrides(tmp_path: Path) -> None:
    (line,) = refusal(written(tmp_path, "healing:\n  seed: 3\n"), "healing.starfihs.lr=1e-3")
    assert line.startswith("-S healing.starfihs.lr=1e-3: healing.starfihs is not a key")


def test_all_problems_come_together_with_place_and_advice(tmp_path: Path) -> None:
    path = written(tmp_path, "healing:\n  starfish: {epoch: 3}\n  lr: 1\ncalibration:\n  cout: 4\n")
    assert refusal(path, "calibration.count=-3") == [
        "-S calibration.count=-3: calibration.count = -3: must be greater than or equal to 1",
        "params.yaml:5: calibration.cout is not a key; did you mean calibration.count?",
        "params.yaml:2: healing.starfish.epoch is not a key; did you mean healing.starfish.epochs?",
        "params.yaml:3: healing.lr is not a key; did you mean healing.starfish.lr?",
    ]


def test_a_budget_in_two_units_is_refused_with_the_way_to_replace_it() -> None:
    (line,) = refusal(CANONICAL, "allocation.budget.macs=0.5")
    assert line.startswith("-S allocation.budget.macs=0.5: ") and "exactly one unit" in line
    assert line.endswith("-S 'allocation.budget={macs: 0.5}'")


def test_a_budget_of_an_override_is_refused_where_it_was_given() -> None:
    (line,) = refusal(CANONICAL, "allocation.budget.neurons=1.5")
    assert line.startswith("-S allocation.budget.neurons=1.5: allocation.budget: budget neurons = 1.5 is not")


def test_at_most_five_lines_are_shown() -> None:
    lines = refusal(None, *(f"calibration.x{number}=1" for number in range(9)))
    assert len(lines) == 5
    assert lines[-1] == "... and 5 more"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["allocation.budget.neurons=50"], "did you mean 0.5?"),
        (["heling.seed=1"], "did you mean healing?"),
        (["healing.methods=[starfsh]"], "did you mean starfish?"),
        (["healing.methods=[]"], "healing.methods"),
        (["healing.methods=[starfish, starfish]"], "named twice"),
        (["healing.methods=[none, starfish]"], "none stands alone"),
        (["healing.closed_form.damping=-1"], "must be greater than 0"),
        (["healing.closed_form=3"], "must be a mapping"),
        (["healing.starfish.epochs=ten"], "valid integer"),
        (["healing.starfish.epochs=true"], "valid integer"),
        (["healing.starfish.epochs=3.5"], "valid integer"),
        (["healing.blockwise.steps=3", "healing.methods=[starfish]"], "blockwise does not run, as healing.methods"),
        (["calibration.count='8'"], "valid integer"),
        (["calibration.max_skipped=1e999"], "finite"),
        (["dense.source=resnet18"], "timm:NAME"),
        (["dense.source=file:a.pt"], "name their architecture"),
        (["dense.source=adapter:a.b:c"], "dense.adapter_allow: ['a.b:c']"),
        (["calibration.source=hf:a/b@main"], "40 hex digits"),
        (["healing.device=gpu"], "one of auto, cpu"),
        (["registration.name=../x"], "letters, digits"),
        (["seed"], "must read section.key=value"),
        (["calibration.count.x=1"], "valid integer"),
        (["calibration=1", "calibration.count=1"], "is a value, not a section"),
        (["report.title=[1"], "is not YAML"),
        (["report.title=!!python/name:os.system"], "tag"),
        (["report.title={a: 1, a: 2}"], "given twice"),
    ],
)
def test_what_cannot_be_used_is_refused_with_advice(overrides: list[str], expected: str) -> None:
    lines = refusal(None, *overrides)
    assert expected in "\n".join(lines)
    assert all(line.startswith("-S ") for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("healing:\n  seed: 1\n  seed: 2\n", "params.yaml:3: healing.seed is given twice"),
        ("a: &x 1\nb: *x\n", "params.yaml:2: is not YAML: aliases"),
        ("- 1\n", "params.yaml:1: must hold `section:` lines"),
        ("healing: {\n", "is not YAML"),
        ("? [a]\n: 1\n", "a key must be a name"),
        ("a: " + "[" * 5000, "is not YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "a is not a key"),
    ],
)
def test_broken_files_are_refused_with_their_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in "\n".join(refusal(written(tmp_path, text)))


def test_files_that_are_not_there_or_not_text_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "none.yaml")[0]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(tmp_path / "binary.yaml")[0]
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    assert "not a params file" in refusal(tmp_path / "large.yaml")[0]


def test_an_empty_file_and_empty_sections_mean_the_defaults(tmp_path: Path) -> None:
    assert load(written(tmp_path, "")) == load(None)
    assert load(written(tmp_path, "report:\nhealing:\n  starfish:\n")).sections == load(None).sections


def test_methods_that_contradict_the_budget_are_refused_before_anything_runs() -> None:
    with pytest.raises(MethodError) as caught:
        load(CANONICAL, ["allocation.budget={weights: 0.5}", "allocation.method=uniform"])
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[2].split(" works on ")[0] for line in lines] == [
        "pruning.method = variance",
        "healing.methods = closed_form",
    ]
    assert "choose one of: magnitude, none" in lines[0]
    assert "-S allocation.budget={weights: 0.5}" in lines[0]


def test_a_mask_experiment_is_accepted() -> None:
    overrides = ["allocation.budget={weights: 0.5}", "allocation.method=uniform", "pruning.method=magnitude"]
    params = load(None, [*overrides, "healing.methods=[starfish]"])
    assert params.allocator().unit == params.pruner().unit == "weights"


def test_methods_are_built_with_their_params() -> None:
    params = load(None, ["healing.starfish.epochs=3", "allocation.global_variance.statistic=pre"])
    assert [vars(healer).get("epochs") for healer in params.healers()] == [None, 3]
    assert vars(params.allocator())["statistic"] == "pre"
    assert len(params.methods()) == 4


def test_only_the_methods_named_count_in_a_slice(tmp_path: Path) -> None:
    text = "healing:\n  methods: [closed_form]\n"
    waiting = written(tmp_path, text + "  starfish: {lr: 1e-3}\n")
    assert load(waiting).slice(["healing"]) == load(None, ["healing.methods=[closed_form]"]).slice(["healing"])
    assert load(None, ["healing.closed_form.damping=1e-2"]).slice(["healing"]) != load(None).slice(["healing"])


def test_defaults_written_out_change_no_slice() -> None:
    explicit = load(None, ["healing.starfish.epochs=10", "healing.starfish={lr: 0.0006}", "calibration.count=512"])
    assert explicit.slice(list(Sections.model_fields)) == load(None).slice(list(Sections.model_fields))


def test_a_method_name_stands_for_what_the_methods_need() -> None:
    keys = STAGES["activations"].params
    before = load(None).slice(keys)
    assert load(None, ["healing.starfish.lr=1e-3"]).slice(keys) == before
    assert load(None, ["allocation.global_variance.statistic=pre"]).slice(keys) != before
    assert load(None).method_modules(keys) == ()


def test_the_modules_of_named_methods_are_told() -> None:
    assert load(None).method_modules(["healing"]) == ("heal.healers.closed_form", "heal.healers.starfish")


def test_permissions_are_part_of_no_key() -> None:
    assert load(None, ["dense.adapter_allow=[a.b:c]"]).slice(["dense"]) == load(None).slice(["dense"])


def test_labels_count_in_a_key_only_where_they_may_be_read() -> None:
    without, explicit = load(None), load(None, ["calibration.labels=false"])
    assert without.slice(["calibration"]) == explicit.slice(["calibration"])
    assert "labels" not in without.slice(["calibration"])["calibration"]  # type: ignore[operator]
    assert load(None, ["calibration.labels=true"]).slice(["calibration"])["calibration"]["labels"] is True  # type: ignore[index,call-overload]
    assert without.flat()["calibration.labels"] is False, "but it is told"


def test_a_search_by_labels_is_refused_until_they_may_be_read(tmp_path: Path) -> None:
    mask = ["allocation.budget={weights: 0.5}", "pruning.method=magnitude", "healing.methods=[none]"]
    by_labels = [*mask, "allocation.method=evolutionary", "allocation.evolutionary.fitness=labels"]
    (line,) = refusal(None, *by_labels)
    assert line == (
        "-S allocation.evolutionary.fitness=labels: allocation.evolutionary.fitness = labels reads the labels of the "
        "calibration images, but calibration.labels is false (default); set it to true, or choose a fitness that reads "
        "none"
    )
    (line,) = refusal(written(tmp_path, "calibration:\n  labels: false\n"), *by_labels)
    assert "is false (params.yaml:2)" in line
    allowed = load(None, [*by_labels, "calibration.labels=true"])
    assert allowed.allocator().needs == {"images", "labels"}
    assert allowed.slice(STAGES["activations"].params)["needs"] == ["images"], "labels are no statistic"
    (line,) = refusal(None, *mask, "allocation.method=sequence", "allocation.sequence.fitness=labels")
    assert "allocation.sequence.fitness = labels: must be 'agreement' or 'kl'" in line


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_a_stage_reads_only_what_it_declares(stage: Any) -> None:
    params = load(None).restrict(stage.params)
    declared = {key.partition(".")[0] for key in stage.params}
    for section in Sections.model_fields:
        first = next(iter(Sections.model_fields[section].annotation.model_fields))  # type: ignore[union-attr]
        if section in stage.params:
            getattr(getattr(params, section), first)
        elif section not in declared:
            with pytest.raises(UndeclaredReadError, match=section):
                getattr(getattr(params, section), first)
    assert params.dense.adapter_allow == ()


def test_a_stage_that_declares_a_key_gets_that_key_alone() -> None:
    params = load(None).restrict(["calibration", "evaluation.source"])
    assert params.evaluation.source == "digits"
    with pytest.raises(UndeclaredReadError, match=r"evaluation\.labels"):
        _ = params.evaluation.labels
    with pytest.raises(UndeclaredReadError, match="allocation"):
        params.allocator()


def test_flat_params_are_scalars_and_hold_only_the_methods_named() -> None:
    flat = load(None, ["healing.methods=[starfish]"]).flat()
    assert flat["healing.methods"] == "starfish"
    assert flat["evaluation.latency_batches"] == "1, 32"
    assert not any(key.startswith("healing.closed_form") for key in flat)
    assert all(isinstance(value, str | int | float | bool | None) for value in flat.values())


def test_params_are_frozen() -> None:
    params: Any = load(None)
    with pytest.raises(ValueError, match="frozen"):
        params.healing.seed = 3
    with pytest.raises(AttributeError):
        params.allowed = ()


@given(st.text(max_size=40))
def test_any_text_is_a_value_or_a_refusal(text: str) -> None:
    try:
        params = load(None, [f"report.title={text}"])
    except ParamsError as error:
        assert str(error)
    else:
        assert isinstance(params, Params)


def test_a_single_value_where_a_list_is_wanted_says_how_to_write_it() -> None:
    with pytest.raises(InputError, match=r"healing\.methods = starfish: must be a list, such as \[starfish\]"):
        load(None, ["healing.methods=starfish"])
