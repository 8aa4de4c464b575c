"""A sweep as a user starts it: real processes, Prefect's server, a real SQLite registry, points that fail."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import signal
import sqlite3
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.flows.test_bad_input import Command, regrow, workplace
from tests.flows.workplace import REGROW, Workplace
from tests.tasks.page import Page
from tests.tasks.pictures import table
from tests.test_docs import ROOT, blocks, commands

__all__ = ["regrow", "workplace"]  # fixtures

DIVERGES = "{lr: 1e30, min_lr: 0, epochs: 4, batch_size: 4}"
SWEEP = f"""\
name: tiny
params: params.yaml
set:
  calibration.count: 16
  pruning.method: magnitude
  promotion: {{max_drop_dense: null, max_drop_champion: null, min_agreement: null}}  # nothing is promoted
models: {{vit: {{}}}}
methods:
  uniform: {{allocation.method: uniform, healing.methods: [none]}}
  lost:
    allocation.method: uniform
    healing.methods: [starfish]
    healing.starfish: {DIVERGES}
budgets: [{{weights: 0.5}}]
seeds: [0, 1]
"""
GOOD, LOST = (
    ["vit/uniform/weights=0.5/0", "vit/uniform/weights=0.5/1"],
    ["vit/lost/weights=0.5/0", "vit/lost/weights=0.5/1"],
)


def place(folder: Path, text: str = SWEEP) -> Workplace:
    made = Workplace.make(folder)
    (folder / "sweep.yaml").write_text(text)
    return made


def rows(workplace: Workplace, folder: str = "sweeps/tiny") -> dict[str, dict[str, str]]:
    """points.csv by point."""
    with (workplace.folder / folder / "points.csv").open(newline="") as file:
        return {row["point"]: row for row in csv.DictReader(file)}


def database(workplace: Workplace, name: str, query: str) -> list[tuple[str, ...]]:
    with sqlite3.connect(workplace.home / name) as opened:
        return opened.execute(query).fetchall()


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, int, str]:
    """A workplace in which the sweep has run once, its exit code, and what it printed."""
    made = place(tmp_path_factory.mktemp("swept"))
    finished = made.run("sweep", "sweep.yaml")
    return made, finished.code, finished.output + finished.errors


def test_a_point_that_fails_stops_no_other_and_is_a_row_with_its_error(swept: tuple[Workplace, int, str]) -> None:
    made, code, said = swept
    assert code == 1, said
    assert "Traceback" not in said
    found = rows(made)
    assert list(found) == [*GOOD, *LOST]
    for name in GOOD:
        assert found[name]["status"] == "finished" and 0 <= float(found[name]["top1"]) <= 1
        assert int(found[name]["bytes"]) < int(found[name]["dense_bytes"])
    for name in LOST:
        assert found[name]["status"] == "failed" and found[name]["top1"] == ""
        assert found[name]["error"].startswith("healing: starfish: the loss is ")
    assert [line.split()[1] for line in said.splitlines() if "/4 vit/" in line] == [*GOOD, *LOST]
    assert "2 of 4 points finished, 2 failed." in said
    assert f"failed   {LOST[0]} and 1 more: healing: starfish: the loss is " in said


def test_the_csv_says_what_the_artifacts_say(swept: tuple[Workplace, int, str]) -> None:
    made, _, _ = swept
    for name in GOOD:
        row = rows(made)[name]
        store = made.home / "store" / "artifacts"
        evaluation = json.loads((store / row["evaluation"] / "evaluation.json").read_text())
        healed, dense = evaluation["models"]["healed"], evaluation["models"]["dense"]
        assert float(row["top1"]) == healed["top1"] and float(row["dense_top1"]) == dense["top1"]
        assert float(row["agreement"]) == healed["agreement"]
        assert {key: int(row[key]) for key in ("bytes", "macs", "nonzeros")} == {
            key: healed[key] for key in ("bytes", "macs", "nonzeros")
        }
        manifest = json.loads((store / row["healing"] / "manifest.json").read_text())
        assert manifest["stage"] == "healing" and manifest["ingredients"]["params"]["healing.seed"] == int(row["seed"])


def test_nothing_is_registered_and_every_point_has_a_run_below_the_sweeps(swept: tuple[Workplace, int, str]) -> None:
    made, _, _ = swept
    assert database(made, "mlflow.db", "select name from registered_models") == []
    runs = dict(database(made, "mlflow.db", "select name, status from runs"))
    assert runs == {"tiny": "FAILED", **dict.fromkeys(GOOD, "FINISHED"), **dict.fromkeys(LOST, "FAILED")}
    (parent,) = database(made, "mlflow.db", "select run_uuid from runs where name = 'tiny'")
    parents = database(made, "mlflow.db", "select value from tags where key = 'mlflow.parentRunId'")
    assert parents == [parent] * 4
    (folder,) = (made.home / "mlartifacts").glob(f"{parent[0]}/artifacts")
    assert {file.name for file in folder.iterdir()} == {"points.csv", "sweep.html", "sweep.md"}


def test_points_share_what_they_have_in_common(swept: tuple[Workplace, int, str]) -> None:
    made, _, _ = swept
    query = "select key, count(*) from tags where value = 'computed' group by key"
    computed = dict(database(made, "mlflow.db", query))
    # Each seed draws other images; dense is one, and a method does not change what lies above its stage.
    assert computed["regrow.stage.dense"] == 1
    assert computed["regrow.stage.calibration"] == computed["regrow.stage.healing"] == 2
    # Uniform sparsities do not depend on the images, so the second seed finds the first one's masks.
    assert computed["regrow.stage.allocation"] == 2 and computed["regrow.stage.pruning"] == 1


def test_prefect_saw_a_flow_for_each_point_and_a_task_for_each_stage(swept: tuple[Workplace, int, str]) -> None:
    made, _, _ = swept
    flows = dict(database(made, "prefect/prefect.db", "select name, state_type from flow_run"))
    assert {name: flows[name] for name in GOOD} == dict.fromkeys(GOOD, "COMPLETED")
    assert {name: flows[name] for name in LOST} == dict.fromkeys(LOST, "FAILED")
    tasks = database(made, "prefect/prefect.db", "select name, state_name from task_run where cache_key is not null")
    assert tasks == []
    states = set(database(made, "prefect/prefect.db", "select name, state_name from task_run"))
    assert {("dense", "Completed"), ("dense", "Cached"), ("healing", "Failed")} <= states
    assert not {"registration", "promotion"} & {name for name, _ in states}


def test_the_page_shows_the_means_and_what_failed(swept: tuple[Workplace, int, str]) -> None:
    made, _, _ = swept
    page = Page((made.folder / "sweeps/tiny/sweep.html").read_text())
    assert "Top-1 over weights file" in page.text and "uniform, weights=0.5" in page.text
    assert f"{LOST[1]} : healing: starfish: the loss is" in page.text


def test_finished_points_run_nothing_and_start_no_server(swept: tuple[Workplace, int, str]) -> None:
    made, _, _ = swept
    before = (made.home / "prefect" / "prefect.db").stat().st_mtime_ns
    runs = database(made, "mlflow.db", "select run_uuid, end_time from runs where name != 'tiny' order by 1")
    began = time.time()
    finished = made.run("sweep", "sweep.yaml", "--only", "*/uniform/*", "--json", "-o", "again")
    assert finished.code == 0, finished.errors
    assert len(made.used_since(began)) > len(GOOD), "what they found counts as used"
    assert finished.facts["ended"] == dict.fromkeys(GOOD, "cached")
    assert (made.home / "prefect" / "prefect.db").stat().st_mtime_ns == before
    assert database(made, "mlflow.db", "select run_uuid, end_time from runs where name != 'tiny' order by 1") == runs
    assert set(finished.facts["points"]) == {*GOOD, *LOST}, "the tables have what MLflow has"


def test_a_cached_point_gets_its_run_where_mlflow_has_none(swept: tuple[Workplace, int, str], tmp_path: Path) -> None:
    made, _, _ = swept
    elsewhere = made.start(
        REGROW, "sweep", "sweep.yaml", "--only", GOOD[0], "--json", "-o", "elsewhere",
        MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'mlflow.db'}",
    )  # fmt: skip
    output, errors = elsewhere.communicate(timeout=400)
    assert elsewhere.returncode == 0, errors
    facts = json.loads(output)
    assert facts["ended"] == {GOOD[0]: "cached"} and list(facts["points"]) == [GOOD[0]]
    assert facts["points"][GOOD[0]]["top1"] == float(rows(made)[GOOD[0]]["top1"])
    assert facts["standing"] == "1 of 4 points finished, 3 not run yet."


def test_the_tables_are_drawn_again_from_mlflow_alone(swept: tuple[Workplace, int, str]) -> None:
    made, _, _ = swept
    first = made.folder / "sweeps" / "tiny"
    store = made.home / "store"
    store.rename(made.home / "hidden")
    try:
        drawn = made.run("sweep", "sweep.yaml", "--table", "-o", "drawn")
    finally:
        (made.home / "hidden").rename(store)
    assert drawn.code == 0, drawn.errors
    for name in ("points.csv", "sweep.md", "sweep.html"):
        assert (made.folder / "drawn" / name).read_bytes() == (first / name).read_bytes()


def test_a_terminal_gets_one_bar_over_the_points(swept: tuple[Workplace, int, str]) -> None:
    made, _, _ = swept
    ours, theirs = pty.openpty()
    environment = {**os.environ, "REGROW_HOME": str(made.home), "PYTHONPATH": os.getcwd(), "TERM": "xterm"}
    command = [REGROW, "sweep", "sweep.yaml", "--only", "*/uniform/*", "-o", "barred"]
    with subprocess.Popen(command, cwd=made.folder, env=environment, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = _all_of(ours)
        output = process.stdout.read().decode() if process.stdout else ""
    assert process.returncode == 0, shown
    assert "points" in shown and "2/2" in shown
    assert "vit/uniform" not in output and "2 of 4 points finished" in output


def _all_of(terminal: int) -> str:
    """What was written until the other end closed, which Linux tells by an error."""
    shown = b""
    with contextlib.suppress(OSError):
        while read := os.read(terminal, 4096):
            shown += read
    os.close(terminal)
    return shown.decode(errors="replace")


def test_a_failed_point_that_is_mended_counts_as_finished(swept: tuple[Workplace, int, str]) -> None:
    made, _, _ = swept
    mended = made.run("sweep", "sweep.yaml", "-S", "healing.starfish.lr=1e-3", "--json", "-o", "mended")
    assert mended.code == 0, mended.errors
    assert mended.facts["ended"] == {**dict.fromkeys(GOOD, "cached"), **dict.fromkeys(LOST, "computed")}
    assert {row["status"] for row in rows(made, "mended").values()} == {"finished"}
    again = made.run("sweep", "sweep.yaml", "--table", "-o", "drawn")
    assert again.code == 0 and rows(made, "drawn") == rows(made), "other params are another experiment"


SLOW = (
    SWEEP.replace("  lost:", "  healed:")
    .replace(DIVERGES, "{epochs: 100, batch_size: 4}")
    .replace("seeds: [0, 1]", "seeds: [0]")
)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_in_the_same_artifacts(tmp_path: Path) -> None:
    undisturbed, killed = place(tmp_path / "a", SLOW), place(tmp_path / "b", SLOW)
    assert undisturbed.run("sweep", "sweep.yaml").code == 0
    process = killed.start(REGROW, "sweep", "sweep.yaml")
    _wait_for_checkpoint(killed)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = killed.run("sweep", "sweep.yaml")
    assert again.code == 0, again.errors
    assert "2 points, 1 of them cached" in again.output and "goes on from the checkpoint" in again.errors
    assert _same(rows(killed)) == _same(rows(undisturbed)) and len(rows(killed)) == 2
    runs = database(killed, "mlflow.db", "select name, status from runs order by name")
    assert runs == [(name, "FINISHED") for name in sorted(["tiny", *rows(killed)])], "no run is doubled or left open"


@pytest.mark.slow
def test_an_interrupted_sweep_says_so_and_leaves_no_run_open(tmp_path: Path) -> None:
    made = place(tmp_path, SLOW)
    process = made.start(REGROW, "sweep", "sweep.yaml")
    _wait_for_checkpoint(made)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    states = dict(database(made, "mlflow.db", "select name, status from runs"))
    names = ("tiny", "vit/healed/weights=0.5/0", "vit/uniform/weights=0.5/0")
    assert states == dict(zip(names, ("FAILED", "KILLED", "FINISHED"), strict=True))


@pytest.mark.slow
def test_the_example_of_the_documents_runs(tmp_path: Path) -> None:
    (text,) = blocks(ROOT / "docs" / "sweeps.md", "yaml")
    (tmp_path / "sweep.yaml").write_text(text)
    (words,) = (words for words in commands(ROOT / "docs" / "sweeps.md", "regrow") if words == ["sweep", "sweep.yaml"])
    made = Workplace(tmp_path)
    finished = made.run(*words)
    assert finished.code == 0, finished.errors
    found = rows(made, "sweeps/digits")
    assert len(found) == 8 and {row["status"] for row in found.values()} == {"finished"}

    def mean(setting: str) -> float:
        return sum(float(row["top1"]) for name, row in found.items() if setting in name) / 2

    assert mean("lamp+starfish/weights=0.9") > mean("uniform/weights=0.9") + 0.1, "healing heals"
    page = Page((tmp_path / "sweeps" / "digits" / "sweep.html").read_text())
    assert "Top-1 over latency, batch of 32" in page.text


def _same(found: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(row[key] for key in ("allocation", "healing", "evaluation", "top1")) for name, row in found.items()
    }


def _wait_for_checkpoint(workplace: Workplace, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if list(workplace.home.glob("work/*/checkpoints/0-starfish/starfish.safetensors")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint in {workplace.home} after {seconds} s")


MISTAKES = {
    "a misspelled param": (
        "methods:",
        "methods:\n  typo: {healing.starfihs.lr: 1}",
        ("sweep.yaml:9", "starfihs", "starfish"),
    ),
    "a budget of fifty": ("{weights: 0.5}", "{weights: 50}", ("sweep.yaml:14", "50", "0.5")),
    "a method on the wrong unit": ("{weights: 0.5}", "{neurons: 0.5}", ("sweep.yaml:9", "uniform", "neurons")),
    "a model that is not there": ("vit: {}", "vit: {dense.source: 'bundle:lost'}", ("lost", "bundle.json")),
    "images that are not there": ("vit: {}", "vit: {calibration.source: 'imagefolder:nowhere'}", ("nowhere",)),
    "a device that is not there": ("vit: {}", "vit: {healing.device: 'cuda:7'}", ("cuda:7",)),
    "an axis without entries": ("models: {vit: {}}", "models: {}", ("sweep.yaml:7", "models")),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_in_the_file_gets_its_place_and_writes_nothing(
    mistake: tuple[str, str, tuple[str, ...]], workplace: Workplace, regrow: Command
) -> None:
    old, new, words = mistake
    assert old in SWEEP
    (workplace.folder / "sweep.yaml").write_text(SWEEP.replace(old, new, 1))
    code, errors = regrow("sweep", "sweep.yaml")
    assert code == 2, errors
    assert errors.startswith("error: ") and len(errors.splitlines()) <= 5 and "Traceback" not in errors
    assert all(word in errors for word in words), errors
    assert not workplace.home.exists() and not (workplace.folder / "sweeps").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--only", "vit/unifrom/*"), ("vit/unifrom/*", "no point")),
        (("-S", "calibration.seed=3"), ("calibration.seed", "seeds")),
        (("-S", "healing.blockwise.steps=3"), ("healing.blockwise.steps=3", "blockwise does not run")),
        (("--only", "vit/uniform/*", "-S", "healing.starfish.lr=1"), ("starfish does not run", "none")),
        (("-o", "params.yaml"), ("params.yaml cannot be written to", "-o")),
        (("--table",), ("no point of the sweep tiny", "regrow sweep sweep.yaml")),
        (("--table", "--only", "*"), ("--only", "--table")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_mistake_on_the_command_line_says_what_to_do(
    words: tuple[str, ...], expected: tuple[str, ...], workplace: Workplace, regrow: Command
) -> None:
    (workplace.folder / "sweep.yaml").write_text(SWEEP)
    code, errors = regrow("sweep", "sweep.yaml", *words)
    assert code == 2 and all(word in errors for word in expected), errors
    assert not workplace.home.exists()


def test_a_file_that_is_not_there_is_named(workplace: Workplace, regrow: Command) -> None:
    code, errors = regrow("sweep", "nowhere.yaml")
    assert code == 2 and "nowhere.yaml" in errors


def test_images_whose_labels_a_point_may_read_are_others_than_without(workplace: Workplace) -> None:
    from flows.points import Planner
    from tasks import sweep_file

    table(workplace.folder / "pictures.parquet", 8, {"label": [0, 1] * 4})
    methods = "  allowed: {allocation.method: uniform, calibration.labels: true, healing.methods: [none]}\n"
    text = SWEEP[: SWEEP.index("  lost:")] + methods + SWEEP[SWEEP.index("budgets:") :]
    (workplace.folder / "sweep.yaml").write_text(text)
    sweep = sweep_file.load(workplace.folder / "sweep.yaml", ["calibration.source=parquet:pictures.parquet"])
    planner = Planner()
    found = [planner.resolved(point)["calibration.source"] for point in sweep.points]  # two methods, two seeds each
    assert found[0] == found[1] != found[2] == found[3]
