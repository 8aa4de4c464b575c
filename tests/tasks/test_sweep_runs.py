"""A sweep in MLflow's own database: one run a point, found again and not doubled, and read back as it was written."""

from __future__ import annotations

import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tasks import mlflow_client, params_file, sweep_file, sweep_results, sweep_runs, tracking
from tasks.params import of
from tasks.summary import rows
from tasks.sweep_file import Point, Sweep
from tasks.sweep_results import Result
from tests.tasks.processes import process

pytest_plugins = ["tests.tasks.registries"]

RESOLVED = {"dense.source": "ab" * 32}
ARTIFACTS = {stage: f"{number:064x}" for number, stage in enumerate(sweep_file.STAGES)}


def model(top1: float | None, bytes: int) -> dict[str, Any]:
    spread = {"median": 0.004, "low": 0.0031, "high": 0.0057, "runs": 30}
    counts = {"parameters": 100, "nonzeros": 90, "macs": 12345, "bytes": bytes, "bytes_unpacked": 408}
    return {"top1": top1, "agreement": 0.75, **counts, "latency": {"1": spread, "32": {**spread, "median": 0.05}}}


EVALUATION: dict[str, Any] = {
    "images": 402,
    "classes": 10,
    "ids_digest": "ef" * 32,
    "models": {"dense": model(0.9, 420), "pruned": model(0.1, 300), "after repair": model(0.2, 300)}
    | {"healed": model(1 / 3, 300)},
}


def point(seed: int = 0, *overrides: str) -> Point:
    params = of(params_file.override(params_file.Written(), [*overrides, f"calibration.seed={seed}"]))
    return Point("vit", "erk+bn", "neurons=0.5", seed, params)


def finish(one: Point, parent: str, sweep: str = "digits", seconds: float = 9.5) -> str:
    run = sweep_runs.open_point(sweep, one, sweep_runs.identity_of(sweep, one, RESOLVED), parent)
    tracking.log_stage(run, "healing", False, {"repair_seconds": 1.5, "starfish_seconds": 2.0, "alignment_after": 0.9})
    sweep_runs.finish_point(run, EVALUATION, ARTIFACTS, seconds)
    return run


def only(*points: Point, name: str = "digits") -> Result:
    (found,) = sweep_runs.results(Sweep(name, points)).values()
    return found


def test_what_is_read_back_is_what_was_measured(home: Path) -> None:
    run = finish(point(), sweep_runs.open_sweep("digits"))
    found = only(point())
    measured = {row.name: row for row in rows(EVALUATION)}
    assert (found.dense, found.pruned, found.healed) == tuple(measured[name] for name in sweep_results.MODELS)
    assert (found.point, found.model, found.method) == ("vit/erk+bn/neurons=0.5/0", "vit", "erk+bn")
    assert (found.status, found.seed, found.run_id, found.error) == ("finished", 0, run, "")
    assert (found.images, found.classes, found.images_digest) == (402, 10, "ef" * 32)
    assert found.artifacts == ARTIFACTS
    assert (found.healing_seconds, found.seconds) == (3.5, 9.5)


def test_what_was_not_measured_stays_unmeasured(home: Path) -> None:
    models = {name: {**model(None, 300), "latency": {}} for name in ("dense", "pruned", "healed")}
    run = sweep_runs.open_point("digits", point(), "sweep digits x", sweep_runs.open_sweep("digits"))
    sweep_runs.finish_point(run, EVALUATION | {"models": models}, ARTIFACTS, 1.0)
    healed = only(point()).healed
    assert healed is not None and asdict(healed)["top1"] is None and healed.latency == {}


def test_a_points_run_lies_below_the_sweeps_and_says_what_it_is(home: Path) -> None:
    parent = sweep_runs.open_sweep("digits")
    run = mlflow_client.client().get_run(finish(point(), parent))
    wanted = {"mlflow.parentRunId": parent, "regrow.sweep": "digits", "regrow.point": "vit/erk+bn/neurons=0.5/0"}
    wanted |= {"model": "vit", "method": "erk+bn", "budget": "neurons=0.5", "seed": "0"}
    assert wanted.items() <= run.data.tags.items()
    assert run.data.params["allocation.budget.neurons"] == "0.5"
    assert run.info.status == "FINISHED" and run.info.run_name == "vit/erk+bn/neurons=0.5/0"


def test_the_same_point_again_writes_into_the_same_run(home: Path) -> None:
    parent = sweep_runs.open_sweep("digits")
    run = finish(point(), parent)
    assert sweep_runs.open_sweep("digits") == parent
    assert finish(point(), parent) == run
    assert finish(point(1), parent) != run
    assert finish(point(), parent, sweep="other") != run
    assert len(list(tracking.search("tags.`regrow.point` != ''"))) == 3
    history = mlflow_client.client().get_metric_history(run, "evaluation/healed_bytes")
    assert [metric.value for metric in history] == [300.0]


def test_of_two_sets_of_params_each_finds_its_own_run(home: Path) -> None:
    parent, other = sweep_runs.open_sweep("digits"), point(0, "calibration.count=8")
    first, second = finish(point(), parent), finish(other, parent)
    assert first != second
    assert (only(point()).run_id, only(other).run_id) == (first, second)
    assert sweep_runs.results(Sweep("digits", (point(5),))) == {}


def test_of_two_runs_of_the_same_params_the_last_counts(home: Path) -> None:
    """As when the code changed in between, and was changed back."""
    parent = sweep_runs.open_sweep("digits")
    first = finish(point(), parent)
    moved = sweep_runs.identity_of("digits", point(), {"dense.source": "cd" * 32})
    second = sweep_runs.open_point("digits", point(), moved, parent)
    sweep_runs.finish_point(second, EVALUATION, ARTIFACTS, 1.0)
    assert first != second and only(point()).run_id == second
    assert finish(point(), parent) == first
    assert only(point()).run_id == first


def test_a_point_that_would_run_otherwise_today_is_older(home: Path) -> None:
    finish(point(), sweep_runs.open_sweep("digits"))
    sweep = Sweep("digits", (point(),))
    now = sweep_runs.identity_of("digits", point(), RESOLVED)
    moved = sweep_runs.identity_of("digits", point(), {"dense.source": "cd" * 32})
    for identities, expected in (({point().name: now}, False), ({point().name: moved}, True), ({}, False)):
        (found,) = sweep_runs.results(sweep, identities).values()
        assert found.is_older is expected


def test_an_error_stays_until_the_point_is_tried_again(home: Path) -> None:
    parent = sweep_runs.open_sweep("digits")
    identity = sweep_runs.identity_of("digits", point(), RESOLVED)
    run = sweep_runs.open_point("digits", point(), identity, parent)
    sweep_runs.fail_point(run, "healing: the loss is nan\n" + "x" * 9000)
    failed = only(point())
    assert (
        failed.status == "failed" and failed.error.startswith("healing: the loss is nan\nx") and failed.healed is None
    )
    assert mlflow_client.client().get_run(run).info.status == "FAILED"
    assert finish(point(), parent) == run
    assert (only(point()).status, only(point()).error) == ("finished", "")


def test_results_come_in_the_order_of_the_sweep(home: Path) -> None:
    parent = sweep_runs.open_sweep("digits")
    for seed in (2, 0, 1):
        finish(point(seed), parent)
    assert [r.seed for r in sweep_runs.results(Sweep("digits", (point(1), point(0), point(7), point(2)))).values()] == [
        1,
        0,
        2,
    ]


def test_the_run_of_a_killed_process_is_interrupted_and_goes_on(home: Path) -> None:
    code = """
import time
from tasks import sweep_runs
from tests.tasks.test_sweep_runs import RESOLVED, point
parent = sweep_runs.open_sweep("digits")
print(sweep_runs.open_point("digits", point(), sweep_runs.identity_of("digits", point(), RESOLVED), parent), flush=True)
time.sleep(600)
"""
    killed = process(code)
    assert killed.stdout is not None
    run = killed.stdout.readline().strip()
    assert only(point()).status == "running"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert only(point()).status == "interrupted"
    assert finish(point(), sweep_runs.open_sweep("digits")) == run
    assert only(point()).status == "finished"


def test_reading_makes_no_registry(tmp_path: Path) -> None:
    assert sweep_runs.results(Sweep("digits", (point(),))) == {}
    assert not (tmp_path / ".regrow").exists()


@pytest.mark.parametrize("override", ["registration.name=other", "healing.closed_form.damping=1e-2"])
def test_an_identity_is_of_what_the_stages_compute(override: str) -> None:
    same = sweep_runs.identity_of("digits", point(), RESOLVED) == sweep_runs.identity_of(
        "digits", point(0, override), RESOLVED
    )
    assert same == override.startswith("registration")
