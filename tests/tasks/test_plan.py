"""The plan: what would run, and why, without running or importing anything heavy."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks import keys
from tasks.plan import PlannedStage, differences, finished, plan
from tasks.runner import Ref, run_stage
from tasks.store import Store
from tests.tasks import toy
from tests.tasks.conftest import forget
from tests.tasks.toy import STAGES, ToyParams

Log = Callable[[], list[str]]


@pytest.fixture
def store(tmp_path: Path, toy_log: Log) -> Store:
    """A store in which the toy pipeline has run once."""
    made = Store(str(tmp_path / "store"))
    run_all(made, ToyParams())
    return made


def run_all(store: Store, params: ToyParams, resolved: dict[str, str] | None = None) -> dict[str, Ref]:
    refs: dict[str, Ref] = {}
    for name, stage in STAGES.items():
        refs[name] = run_stage(stage, params, refs, store, resolve=lambda: resolved or {})
    return refs


def planned(store: Store, params: ToyParams | None = None, word: str = "") -> dict[str, PlannedStage]:
    resolved = {"first.word": word} if word else {}
    return {stage.name: stage for stage in plan(params or ToyParams(), store, resolved, STAGES)}


def why(store: Store, params: ToyParams | None = None, word: str = "") -> dict[str, list[str]]:
    return {name: stage.why for name, stage in planned(store, params, word).items()}


def test_an_empty_store_runs_everything(tmp_path: Path, toy_log: Log) -> None:
    found = planned(Store(str(tmp_path / "empty")))
    assert {name: stage.why for name, stage in found.items()} == {
        "first": ["never run before"],
        "second": ["waits for first"],
        "third": ["waits for second"],
    }
    assert found["first"].key and not found["first"].digest and found["second"].key is None
    assert toy_log() == []


def test_what_is_finished_is_found_whole_or_not_at_all(store: Store, toy_log: Log) -> None:
    ran = toy_log()
    found = finished(ToyParams(), store, {}, STAGES)
    assert found is not None
    assert {name: record.digest for name, record in found.items()} == {
        name: stage.digest for name, stage in planned(store).items()
    }
    shutil.rmtree(Path(store.url) / "artifacts" / found["second"].digest)
    assert finished(ToyParams(), store, {}, STAGES) is None
    assert finished(ToyParams(), store, {"first.word": "new"}, STAGES) is None
    assert toy_log() == ran


def test_a_finished_run_is_all_cached(store: Store) -> None:
    found = planned(store)
    refs = run_all(store, ToyParams())
    assert all(stage.cached and not stage.why for stage in found.values())
    assert {name: (stage.key, stage.digest) for name, stage in found.items()} == {
        name: (ref.key, ref.digest) for name, ref in refs.items()
    }
    assert found["third"].record is not None and found["third"].record.metrics == {"total": 8}


def test_a_changed_param_is_named_with_both_values(store: Store) -> None:
    found = planned(store, ToyParams().but("second", times=3))
    assert found["first"].cached and found["second"].why == ["second.times 2 -> 3"]
    assert found["third"].why == ["waits for second"]


def test_added_and_removed_params_are_named(store: Store) -> None:
    params = ToyParams({"first": {"word": "moth", "lion": {"lr": 6e-4}}, "second": {}, "third": {}})
    assert why(store, params)["first"] == ["first.lion.lr (unset) -> 0.0006"]
    run_all(store, ToyParams().but("first", shade="dark"))
    assert why(store, ToyParams({"first": {"shade": "dark"}, "second": {}, "third": {}}))["first"] == [
        "first.word moth -> (unset)"
    ]


def test_a_changed_file_is_named(store: Store, tmp_path: Path) -> None:
    toy.write(tmp_path, second=toy.FILES["second.py"].replace("word * params", "word + word * params"))
    assert why(store)["second"] == ["code: toy/second.py"]


def test_an_input_with_new_bytes_is_named(store: Store) -> None:
    params = ToyParams().but("first", word="wasp")
    run_stage(STAGES["first"], params, {}, store)
    assert why(store, params)["second"] == ["input first: new digest"]


def test_a_new_package_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "version", lambda name: "99.0")
    (line, other) = why(store)["first"]
    assert line.startswith("timm ") and line.endswith(" -> 99.0") and other.startswith("torch ")


def test_a_name_that_moved_is_named(store: Store) -> None:
    run_all(store, ToyParams(), {"first.word": "abc"})
    assert why(store, word="def")["first"] == ["first.word moth: points to something else"]


def test_the_nearest_earlier_run_is_compared_with(store: Store) -> None:
    run_all(store, ToyParams().but("second", times=5, seed=7))
    assert why(store, ToyParams().but("second", times=6, seed=7))["second"] == ["second.times 5 -> 6"]
    assert why(store, ToyParams().but("second", times=5))["second"] == ["second.seed 7 -> (unset)"], "newest, on ties"


def test_a_lost_artifact_is_a_reason(store: Store) -> None:
    second = planned(store)["second"].digest
    assert second is not None
    shutil.rmtree(store.materialise(second))
    assert why(store)["second"] == ["its artifact is gone or was damaged"]


def test_what_is_gone_outside_the_store_is_a_reason(store: Store, tmp_path: Path) -> None:
    toy.write(tmp_path, first=toy.FILES["first.py"] + "\n\ndef still_valid(output):\n    return False\n")
    forget()
    outside = {"first": replace(STAGES["first"], outside=True)}
    run_stage(outside["first"], ToyParams(), {}, store)
    (stage,) = plan(ToyParams(), store, stages=outside)
    assert not stage.cached and stage.why == ["what it made outside the store is gone"]


def test_a_plan_leaves_no_trace(store: Store, toy_log: Log) -> None:
    before = sorted((entry.name, entry.modified) for entry in store.place.entries("keys"))
    time.sleep(0.01)
    planned(store)
    planned(store, ToyParams().but("second", times=3))
    assert sorted((entry.name, entry.modified) for entry in store.place.entries("keys")) == before
    assert toy_log() == ["first", "second", "third"]


def test_a_plan_works_on_a_bucket(tmp_path: Path, toy_log: Log) -> None:
    remote = Store(f"memory://{tmp_path.name}/plan")
    run_all(remote, ToyParams())
    assert all(stage.cached for stage in planned(remote).values())
    assert why(remote, ToyParams().but("second", times=3))["second"] == ["second.times 2 -> 3"]


def test_code_that_comes_and_goes_is_told_apart() -> None:
    empty: dict[str, Any] = {"params": {}, "resolved": {}, "inputs": {}, "packages": {}, "names": {}}
    before, after = ({**empty, "code": code} for code in ({"a.py": "1", "b.py": "2"}, {"b.py": "3", "c.py": "4"}))
    assert list(differences(before, after)) == ["code: a.py (no longer used)", "code: b.py", "code: c.py (new)"]
