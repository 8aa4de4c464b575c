"""The runner: a stage runs once for a key, survives a kill, and publishes only what is sound."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heal.errors import NumericalError
from tasks import progress, state
from tasks.manifest import Manifest
from tasks.progress import Bar, Lines, Progress
from tasks.runner import MovedError, Ref, run_stage
from tasks.store import ArtifactGoneError, Store, StoreError
from tests.tasks import toy
from tests.tasks.conftest import forget
from tests.tasks.toy import STAGES, ToyParams

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def run_all(store: Store, params: ToyParams | None = None, **options: Any) -> dict[str, Ref]:
    refs: dict[str, Ref] = {}
    for name, stage in STAGES.items():
        refs[name] = run_stage(stage, params or ToyParams(), refs, store, **options)
    return refs


def run_first(store: Store, **options: Any) -> Ref:
    return run_stage(STAGES["first"], ToyParams(), {}, store, **options)


Log = Callable[[], list[str]]


def test_the_second_run_finds_what_the_first_made(store: Store, toy_log: Log) -> None:
    made, found = run_all(store), run_all(store)
    assert toy_log() == ["first", "second", "third"]
    assert [ref.cached for ref in made.values()] == [False] * 3
    assert {name: replace(ref, cached=True) for name, ref in made.items()} == found
    assert (store.materialise(found["third"].digest) / "all.txt").read_text() == "MOTHMOTHMOTH"
    assert found["third"].metrics == {"total": 8}
    assert not list((state.home() / "work").glob("*/*")), "no work is left lying about"


def test_a_change_runs_only_what_it_concerns(store: Store, toy_log: Log) -> None:
    run_all(store)
    refs = run_all(store, ToyParams().but("second", times=3))
    assert toy_log() == ["first", "second", "third", "second", "third"] and refs["first"].cached


def test_an_input_recomputed_to_the_same_bytes_changes_nothing_downstream(store: Store, toy_log: Log) -> None:
    run_all(store)
    refs = run_all(store, ToyParams().but("first", seed=1))
    assert toy_log() == ["first", "second", "third", "first"]
    assert not refs["first"].cached and refs["second"].cached and refs["third"].cached


def test_a_changed_line_of_code_runs_its_stage_again(store: Store, toy_log: Log, tmp_path: Path) -> None:
    run_all(store)
    second = tmp_path / "toy" / "second.py"
    second.write_text(second.read_text().replace("word * params", '"so " + word * params'))
    forget()
    assert (store.materialise(run_all(store)["third"].digest) / "all.txt").read_text() == "MOTHso MOTHMOTH"
    assert toy_log()[3:] == ["second", "third"]


def test_the_manifest_says_all_that_went_into_it(store: Store, toy_log: Log) -> None:
    refs = run_all(store, resolve=lambda: {"first.word": "abc"})
    folder = store.materialise(refs["first"].digest)
    made = Manifest.load((folder / "manifest.json").read_bytes(), refs["first"].digest)
    about = made.record
    assert about.key == refs["first"].key and about.metrics == {"letters": 4.0} and about.seconds >= 0
    assert about.ingredients["names"] == {"first.word": "moth"} and about.ingredients["resolved"] == {
        "first.word": "abc"
    }
    assert about.ingredients["code"].keys() == {"toy/first.py", "toy/shared.py"}
    assert about.host.keys() == {"machine", "cores", "device"} and "torch" in about.versions
    assert store.manifest(refs["second"].digest).record.ingredients["inputs"] == {"first": refs["first"].digest}


def test_a_name_that_moves_under_its_stage_publishes_nothing(store: Store, toy_log: Log) -> None:
    pointed = iter(["old", "new", "new", "new"])
    with pytest.raises(MovedError, match=r"first\.word changed while stage first was reading it"):
        run_first(store, resolve=lambda: {"first.word": next(pointed)})
    assert not store.records("first")
    assert not run_first(store, resolve=lambda: {"first.word": next(pointed)}).cached
    assert toy_log() == ["first", "first"]


def test_a_damaged_artifact_is_computed_again(store: Store, toy_log: Log, caplog: pytest.LogCaptureFixture) -> None:
    path = store.materialise(run_all(store)["second"].digest) / "deep" / "words.txt"
    path.chmod(0o644)
    path.write_text("MOTHMOTS")
    refs = run_all(store)
    assert toy_log()[3:] == ["second"] and "is damaged" in caplog.text
    assert refs["third"].cached, "the bytes came out the same"


def test_a_missing_input_is_named_before_anything_runs(store: Store, toy_log: Log) -> None:
    refs = run_all(store)
    shutil.rmtree(store.materialise(refs["first"].digest))
    with pytest.raises(ArtifactGoneError, match="run the stage that made it again") as caught:
        run_stage(STAGES["second"], ToyParams().but("second", times=9), refs, store)
    assert caught.value.digest == refs["first"].digest and len(toy_log()) == 3


def test_a_stage_is_handed_only_what_it_declares(store: Store, toy_log: Log, tmp_path: Path) -> None:
    toy.write(tmp_path, first="def run(params, inputs, output, progress):\n    params.values['second']\n")
    with pytest.raises(KeyError, match="second"):
        run_first(store)


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "None", "'3'", "True"])
def test_metrics_that_are_no_finite_numbers_are_not_published(
    value: str, store: Store, toy_log: Log, tmp_path: Path
) -> None:
    text = f"def run(params, inputs, output, progress):\n    (output / 'x').touch()\n    return {{'loss': {value}}}\n"
    toy.write(tmp_path, first=text)
    with pytest.raises(NumericalError, match=r"stage first gave metrics that are no finite numbers: loss = "):
        run_first(store)
    assert not store.records() and not store.place.entries("artifacts")


def test_a_stage_that_writes_nothing_is_refused(store: Store, toy_log: Log, tmp_path: Path) -> None:
    toy.write(tmp_path, first="def run(params, inputs, output, progress):\n    return {}\n")
    with pytest.raises(StoreError, match="stage first left no file"):
        run_first(store)


FAILS_ONCE = """
def run(params, inputs, output, progress):
    assert not list(output.iterdir())
    (output / "half").touch()
    mark = progress.checkpoints / "mark"
    if not mark.exists():
        mark.touch()
        raise RuntimeError("no luck")
    progress.fallback("used the slow way")
    (output / "whole").touch()
    return {}
"""


def test_checkpoints_outlive_an_error_and_the_output_does_not(store: Store, toy_log: Log, tmp_path: Path) -> None:
    toy.write(tmp_path, first=FAILS_ONCE)
    with pytest.raises(RuntimeError, match="no luck"):
        run_first(store)
    assert store.manifest(run_first(store).digest).files.keys() == {"half", "whole"}
    assert store.records()[0].fallbacks == ("used the slow way",)
    assert not list((state.home() / "work").glob("*/*"))


def test_another_machine_goes_on_from_the_checkpoints_of_a_remote_store(
    toy_log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Store(f"memory://{tmp_path.name}/shared")
    toy.write(tmp_path, first=FAILS_ONCE.replace("mark.touch()", "mark.touch(); progress.checkpoint_saved()"))
    with pytest.raises(RuntimeError, match="no luck"):
        run_first(remote)
    monkeypatch.setenv("REGROW_HOME", str(tmp_path / "another machine"))
    assert not run_first(remote).cached
    assert not remote.place.sizes("work")


def test_what_a_stage_made_outside_the_store_is_asked_for_on_a_hit(store: Store, toy_log: Log, tmp_path: Path) -> None:
    valid = """
import pathlib

def still_valid(output):
    return (output / "word.txt").read_text() == "MOTH" and pathlib.Path(__file__).with_name("registered").exists()
"""
    toy.write(tmp_path, first=toy.FILES["first.py"] + valid)
    outside = replace(STAGES["first"], outside=True)
    registered = tmp_path / "toy" / "registered"
    for _ in range(2):
        assert not run_stage(outside, ToyParams(), {}, store).cached
    registered.touch()
    assert run_stage(outside, ToyParams(), {}, store).cached
    registered.unlink()
    assert run_first(store).cached, "a stage whose effect is inside the store is not asked"


WORKER = """
import pathlib, sys
from tasks.runner import run_stage
from tasks.store import Store
from tests.tasks.toy import STAGES, ToyParams
print("started", flush=True)
ref = run_stage(STAGES["first"], ToyParams(), {}, Store(sys.argv[1]))
print(ref.digest, ref.cached, flush=True)
"""

SLOW = """
import os, pathlib, time
from toy.shared import note

def run(params, inputs, output, progress):
    note("first")
    steps = progress.checkpoints / "steps"
    done = int(steps.read_text()) if steps.exists() else 0
    for step in range(done, 4):
        (output / f"{step}.txt").touch()
        steps.write_text(str(step + 1))
        note(f"step{step}")
        while step == 2 and not pathlib.Path(os.environ["TOY_LOG"]).with_name("go").exists():
            time.sleep(0.01)
    (output / "sum.txt").write_text("0123")
    for path in output.glob("?.txt"):
        path.unlink()
    return {"resumed_at": done}
"""


def worker(store: Store) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, store.url]
    environment = {"PYTHONPATH": f"{Path(store.url).parent}:{ROOT}", "REGROW_HOME": str(state.home())}
    environment["TOY_LOG"] = str(Path(store.url).parent / "ran.log")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.01)


def test_after_a_kill_the_next_attempt_goes_on_from_the_checkpoint(store: Store, toy_log: Log, tmp_path: Path) -> None:
    toy.write(tmp_path, first=SLOW)
    with worker(store) as process:
        wait_for(lambda: "step2" in toy_log())
        process.send_signal(signal.SIGKILL)
    assert not store.place.entries("artifacts") and not store.place.entries("keys")
    (tmp_path / "go").touch()
    killed = run_first(store)
    assert killed.metrics == {"resumed_at": 3} and not killed.cached
    assert toy_log() == ["first", "step0", "step1", "step2", "first", "step3"]
    undisturbed = run_first(Store(str(tmp_path / "other store")))
    assert undisturbed.digest == killed.digest and undisturbed.metrics == {"resumed_at": 0}


def test_of_two_processes_one_computes_and_the_other_waits(store: Store, toy_log: Log, tmp_path: Path) -> None:
    toy.write(tmp_path, first=SLOW)
    processes = [worker(store), worker(store)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
    wait_for(lambda: "step2" in toy_log())
    (tmp_path / "go").touch()
    answers = [process.communicate()[0].split() for process in processes]
    assert toy_log().count("first") == 1
    assert answers[0][0] == answers[1][0] and sorted(answer[1] for answer in answers) == ["False", "True"]


def test_what_a_process_killed_after_publishing_left_behind_goes_with_the_next_hit(store: Store, toy_log: Log) -> None:
    ref = run_first(store)
    (state.work(ref.key) / "output").mkdir(parents=True)
    assert run_first(store).cached and not state.work(ref.key).exists()


def test_a_hit_imports_no_stage(store: Store, toy_log: Log) -> None:
    run_all(store)
    forget()
    run_all(store)
    assert "toy.first" not in sys.modules


def test_the_road_to_a_hit_needs_no_heavy_library(store: Store, toy_log: Log) -> None:
    run_first(store)
    check = (
        WORKER + "print([m for m in ('torch', 'prefect', 'mlflow', 'fsspec', 'pydantic', 'rich') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": f"{Path(store.url).parent}:{ROOT}", "REGROW_HOME": str(state.home())}
    command = [sys.executable, "-c", check, store.url]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.split("\n")[1].endswith("True") and found.split("\n")[2] == "[]"


def test_a_reference_is_plain_json(store: Store, toy_log: Log) -> None:
    ref = run_first(store)
    assert Ref(**json.loads(json.dumps(ref.dump()))) == ref


TALKS = """
def run(params, inputs, output, progress):
    progress.log("begins")
    progress.fallback("takes another way")
    with progress.track("images", 4) as advance:
        advance(1)
        advance(3)
    progress.report("steps", 1, 2)
    (output / "x").touch()
    return {}
"""


def test_plain_progress_writes_few_lines_on_stderr(
    store: Store, toy_log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write(tmp_path, first=TALKS)
    run_first(store, progress_factory=lambda stage, folder: Progress(folder, Lines(stage, seconds=0)))
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().err.splitlines()]
    said = ("takes another way", "images 0/4", "images 1/4", "images 4/4", "steps 1/2")
    assert lines == [["first", line] for line in said]


def test_details_are_for_those_who_ask(
    store: Store, toy_log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write(tmp_path, first=TALKS)
    run_first(store, progress_factory=progress.detailed)
    assert capsys.readouterr().err.splitlines() == [f"{'first':<12} begins", f"{'first':<12} takes another way"]


def test_a_terminal_shows_a_bar_that_is_taken_down(
    store: Store, toy_log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.write(tmp_path, first=TALKS)
    made: list[Progress] = []

    def factory(stage: str, checkpoints: Path) -> Progress:
        made.append(Progress(checkpoints, Bar(stage)))
        return made[0]

    run_first(store, progress_factory=factory)
    assert isinstance(made[0].display, Bar) and made[0].display._rich is None
    said = capsys.readouterr().err
    assert "takes another way" in said and "begins" not in said
    assert isinstance(progress.fitting("first", tmp_path).display, Lines), "stderr is no terminal here"


def test_quiet_progress_says_nothing(
    store: Store, toy_log: Log, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    toy.write(tmp_path, first=TALKS)
    run_first(store)
    assert capfd.readouterr() == ("", "")
