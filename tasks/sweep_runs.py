"""A sweep in MLflow: one run for the whole, one below it for every point, found again by what they are.

Like the registry, imported only where it is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tasks import keys, liveness, mlflow_client, mlflow_store, sweep_results, tracking
from tasks.sweep_file import STAGES, Point, Sweep
from tasks.sweep_results import ERROR, POINT, Result, Status

if TYPE_CHECKING:
    from mlflow.entities import Run

SWEEP, PARAMS, RECORDED = "regrow.sweep", "regrow.params", "regrow.recorded"
LONGEST_ERROR = 4000  # characters; MLflow cuts a tag at 8000
STATUS: Mapping[str, Status] = {"FINISHED": "finished", "FAILED": "failed", "RUNNING": "running"}


def identity_of(sweep: str, point: Point, resolved: Mapping[str, str]) -> str:
    """What a point's run is found by: the point, and the keys of its stages but for what lies upstream."""
    own = (
        keys.stage_key(stage, point.params, dict.fromkeys(stage.upstream, ""), resolved)[0] for stage in STAGES.values()
    )
    return f"sweep {sweep} {point.name} {keys.sha256(' '.join(own))[:16]}"


def open_sweep(name: str) -> str:
    """The id of the sweep's own run, the same for every time that it is started."""
    return tracking.open_run(f"sweep {name}", tags={SWEEP: name}, name=name)


def open_point(sweep: str, point: Point, identity: str, parent: str) -> str:
    """The id of the point's run, below the sweep's. It is opened again, not doubled, by the same identity."""
    tags = {
        SWEEP: sweep,
        POINT: point.name,
        PARAMS: point.digest,
        ERROR: "",
        RECORDED: _now(),
        "model": point.model,
        "method": point.method,
        "budget": point.budget,
        "seed": str(point.seed),
        "mlflow.parentRunId": parent,
    }
    return tracking.open_run(identity, point.params.flat(), tags, point.name)


def finish_point(run_id: str, evaluation: Mapping[str, Any], artifacts: Mapping[str, str], seconds: float) -> None:
    """Write what an evaluation.json says, and end the run."""
    tracking.log_metrics(run_id, sweep_results.metrics(evaluation, seconds))
    mlflow_client.write(run_id, tags={**sweep_results.tags(evaluation, artifacts), RECORDED: _now()})
    tracking.close_run(run_id)


def fail_point(run_id: str, error: str) -> None:
    """Keep why the point failed, and end the run."""
    mlflow_client.write(run_id, tags={ERROR: error[:LONGEST_ERROR], RECORDED: _now()})
    tracking.close_run(run_id, "FAILED")


def results(sweep: Sweep, identities: Mapping[str, str] | None = None) -> dict[str, Result]:
    """What is recorded of the sweep's points, by name, in their order: of several runs with a point's params the last.

    A point that never ran with these params is left out. identities: of the points as they would run today, which
    tells those that are older.
    """
    if not mlflow_store.exists(mlflow_store.tracking_uri()):
        return {}
    wanted = {(point.name, point.digest) for point in sweep.points}
    last: dict[str, Run] = {}
    for run in sorted(tracking.search(f"tags.`{SWEEP}` = '{sweep.name}'"), key=_recorded):
        if (run.data.tags.get(POINT), run.data.tags.get(PARAMS)) in wanted:
            last[run.data.tags[POINT]] = run
    found = {point.name: _result(last[point.name]) for point in sweep.points if point.name in last}
    today = identities or {}
    return {
        name: replace(result, is_older=today.get(name, result.identity) != result.identity)
        for name, result in found.items()
    }


def _recorded(run: Run) -> str:
    """When it was last begun or ended, in UTC; the sweep's own run has no such time."""
    return str(run.data.tags.get(RECORDED, ""))


def _result(run: Run) -> Result:
    tags = run.data.tags
    status = STATUS.get(run.info.status, "interrupted")
    if status == "running" and liveness.is_dead(tags):
        status = "interrupted"
    return sweep_results.result(run.info.run_id, tags[tracking.FLOW_RUN], status, tags, run.data.metrics)


def _now() -> str:
    return datetime.now(UTC).isoformat()
