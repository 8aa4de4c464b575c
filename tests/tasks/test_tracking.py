"""The record of a run: opened once, written without doubling, closed when its process died."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tasks import liveness, mlflow_client, state, tracking
from tests.tasks.processes import process

pytest_plugins = ["tests.tasks.registries"]


def test_a_flow_run_has_one_run(home: Path) -> None:
    run = tracking.open_run("flow-1", {"a": 1}, {"kind": "test"})
    tracking.close_run(run, "FAILED")
    assert tracking.open_run("flow-1", {"a": 1, "b": 2}) == run
    assert tracking.open_run("flow-2") != run
    found = mlflow_client.client().get_run(run)
    assert found.info.status == "RUNNING"
    assert found.data.params == {"a": "1", "b": "2"}
    assert found.data.tags["kind"] == "test"


def test_the_first_value_of_a_param_stays(home: Path) -> None:
    run = tracking.open_run("flow-1", {"a": 1})
    tracking.log_params(run, {"a": 2})
    assert mlflow_client.client().get_run(run).data.params == {"a": "1"}


def test_more_params_than_a_request_takes_are_all_written(home: Path) -> None:
    run = tracking.open_run("flow-1", {f"p{number}": number for number in range(250)})
    assert len(mlflow_client.client().get_run(run).data.params) == 250


def test_a_param_that_would_be_cut_is_kept_in_a_file(home: Path) -> None:
    value = list(range(5000))
    run = tracking.open_run("flow-1", {"long": value})
    assert mlflow_client.client().get_run(run).data.params["long"].startswith("sha256:")
    (file,) = state.mlflow_artifacts().rglob("params/long.txt")
    assert json.loads(file.read_text()) == value


def test_a_long_curve_is_written_in_order_and_once(home: Path) -> None:
    run, values = tracking.open_run("flow-1"), [1 / step for step in range(1, 2100)]
    tracking.log_curve(run, "loss", values[:1500])
    tracking.log_curve(run, "loss", values)
    points = mlflow_client.client().get_metric_history(run, "loss")
    assert sorted((point.step, point.value) for point in points) == list(enumerate(values))


def test_a_stage_leaves_its_ending_and_its_metrics_once(home: Path) -> None:
    run = tracking.open_run("flow-1")
    for _ in range(2):
        tracking.log_stage(run, "healing", cached=False, metrics={"alignment_after": 0.9})
    tracking.log_stage(run, "pruning", cached=True, metrics={})
    data = mlflow_client.client().get_run(run).data
    assert (data.tags["regrow.stage.healing"], data.tags["regrow.stage.pruning"]) == ("computed", "cached")
    assert data.metrics == {"healing/alignment_after": 0.9}
    assert len(mlflow_client.client().get_metric_history(run, "healing/alignment_after")) == 1


def test_files_and_data_sets_stay_with_the_run(home: Path, tmp_path: Path) -> None:
    run, digest = tracking.open_run("flow-1"), "0123456789abcdef" * 4
    (tmp_path / "report.html").write_text("<p>")
    tracking.log_artifact(run, tmp_path / "report.html")
    tracking.log_dataset(run, "digits", digest, "calibration")
    read = mlflow_client.client().get_run(run).inputs
    assert read is not None
    (found,) = read.dataset_inputs
    assert digest.startswith(found.dataset.digest)
    assert json.loads(found.dataset.source) == {"digest": digest}
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "calibration")]
    assert [path.read_text() for path in state.mlflow_artifacts().rglob("report.html")] == ["<p>"]


def test_a_joined_run_stays_open_and_an_own_one_ends(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def status(run: str) -> str:
        return str(mlflow_client.client().get_run(run).info.status)

    with tracking.joined_run("own") as own:
        assert status(own) == "RUNNING"
    assert status(own) == "FINISHED"
    with pytest.raises(KeyError), tracking.joined_run("own") as again:
        raise KeyError
    assert (again, status(own)) == (own, "FAILED")
    flow = tracking.open_run("flow-1")
    monkeypatch.setenv("MLFLOW_RUN_ID", flow)
    with tracking.joined_run("own") as joined:
        assert joined == flow
    assert status(flow) == "RUNNING"


def test_the_run_of_a_killed_process_is_closed(home: Path) -> None:
    code = """
import time
from tasks import tracking
print(tracking.open_run("flow-killed"), flush=True)
time.sleep(600)
"""
    killed = process(code)
    assert killed.stdout is not None
    run = killed.stdout.readline().strip()
    assert tracking.dead_runs() == []
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    alive = tracking.open_run("flow-alive")
    assert mlflow_client.client().get_run(run).info.status == "RUNNING"
    assert [(dead.run_id, dead.identity, dead.pid) for dead in tracking.close_dead_runs()] == [
        (run, "flow-killed", killed.pid)
    ]
    assert mlflow_client.client().get_run(run).info.status == "KILLED"
    assert mlflow_client.client().get_run(alive).info.status == "RUNNING"
    assert tracking.close_dead_runs() == []


def test_runs_of_other_hosts_are_not_judged(home: Path) -> None:
    run = tracking.open_run("flow-1")
    mlflow_client.write(run, tags={liveness.HOST: "another-host", liveness.PID: "1"})
    assert tracking.dead_runs() == []


def test_a_process_id_that_was_given_again_is_not_the_same_process(home: Path) -> None:
    mine = liveness.identity()
    assert not liveness.is_dead(mine)
    assert liveness.is_dead({**mine, liveness.STARTED: "12345.00"})
    assert not liveness.is_dead({})


def test_without_a_registry_no_run_is_dead() -> None:
    assert tracking.close_dead_runs() == []
    assert not state.home().exists()
