"""The record of a flow run in MLflow: params, stages, curves, files, and the end of runs whose process died.

Like the registry, imported only where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks import liveness, mlflow_client, mlflow_store, state

if TYPE_CHECKING:
    from mlflow.entities import Run

FLOW_RUN = "regrow.flow_run"
STAGE = "regrow.stage"
LONGEST_PARAM = 6000  # characters; MLflow cuts the rest off

Ending = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class DeadRun:
    """A run that MLflow shows as running although its process is gone."""

    run_id: str
    identity: str
    pid: int


def current_run() -> str | None:
    """The run that this process should write into: MLFLOW_RUN_ID."""
    return os.environ.get("MLFLOW_RUN_ID") or None


def open_run(
    identity: str, params: Mapping[str, Any] | None = None, tags: Mapping[str, str] | None = None, name: str = ""
) -> str:
    """The id of the run of this flow run: found again if it was opened before, so never doubled.

    `params` are flat (see log_params); `name` is what people see (its identity by default). The run
    names this process, so that `close_dead_runs` can tell when it died.
    """
    if "'" in identity or not identity:
        raise ValueError(f"identity {identity!r} of a run must be non-empty and without quotes")
    client, wanted = mlflow_client.client(), {**(tags or {}), **liveness.identity()}
    with mlflow_store.locked(state.home() / "locks" / "runs.lock"):
        found = client.search_runs([mlflow_client.experiment()], f"tags.`{FLOW_RUN}` = '{identity}'", max_results=1)
        if found:
            run_id = str(found[0].info.run_id)
            client.update_run(run_id, "RUNNING")
            mlflow_client.write(run_id, tags=wanted)
        else:
            marks = {FLOW_RUN: identity, "mlflow.source.name": "regrow", **wanted}
            made = client.create_run(mlflow_client.experiment(), tags=marks, run_name=name or identity)
            run_id = str(made.info.run_id)
    log_params(run_id, params or {})
    return run_id


def close_run(run_id: str, status: Ending = "FINISHED") -> None:
    """End a run."""
    mlflow_client.client().set_terminated(run_id, status)


@contextmanager
def joined_run(identity: str, tags: Mapping[str, str] | None = None) -> Iterator[str]:
    """The current run, left open; without one, the run of `identity`, which is ended."""
    run_id = current_run()
    if run_id is not None:
        yield run_id
        return
    run_id = open_run(identity, tags=tags)
    ending: Ending = "FAILED"
    try:
        yield run_id
        ending = "FINISHED"
    finally:
        close_run(run_id, ending)


def log_params(run_id: str, params: Mapping[str, Any]) -> None:
    """Write params, flat; the first value of a param stays. One that MLflow would cut goes into a file."""
    known = mlflow_client.client().get_run(run_id).data.params
    short: dict[str, str] = {}
    for name, value in params.items():
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
        if name in known:
            continue
        if len(text) > LONGEST_PARAM:
            mlflow_client.client().log_text(run_id, text, f"params/{name}.txt")
            text = f"sha256:{hashlib.sha256(text.encode()).hexdigest()} (params/{name}.txt)"
        short[name] = text
    mlflow_client.write(run_id, params=short)


def log_stage(run_id: str, stage: str, cached: bool, metrics: Mapping[str, float]) -> None:
    """Say how a stage ended: the tag regrow.stage.STAGE, and its metrics as STAGE/METRIC."""
    log_metrics(run_id, {f"{stage}/{name}": value for name, value in metrics.items()})
    mlflow_client.write(run_id, tags={f"{STAGE}.{stage}": "cached" if cached else "computed"})


def log_metrics(run_id: str, metrics: Mapping[str, float]) -> None:
    """Write single numbers; one that the run already has is not written again."""
    known = mlflow_client.client().get_run(run_id).data.metrics
    mlflow_client.write(run_id, [(name, float(v), 0) for name, v in metrics.items() if known.get(name) != float(v)])


def log_curve(run_id: str, name: str, values: Sequence[float]) -> None:
    """Write a curve, one value a step; steps that the run already has are not written again."""
    known = {point.step for point in mlflow_client.client().get_metric_history(run_id, name)}
    mlflow_client.write(run_id, [(name, float(value), step) for step, value in enumerate(values) if step not in known])


def log_artifact(run_id: str, path: Path, folder: str | None = None) -> None:
    """Keep a file with the run."""
    mlflow_client.client().log_artifact(run_id, str(path), folder)


def log_dataset(run_id: str, name: str, digest: str, context: str) -> None:
    """Say which images a run read, and what for (`calibration`, `evaluation`)."""
    mlflow_client.write_dataset(run_id, name, digest, context)


def dead_runs() -> list[DeadRun]:
    """Runs that a process of this host left open when it died; those of other hosts cannot be judged."""
    if not mlflow_store.exists(mlflow_store.tracking_uri()):
        return []
    return [
        DeadRun(run.info.run_id, run.data.tags.get(FLOW_RUN, ""), int(run.data.tags[liveness.PID]))
        for run in search("attributes.status = 'RUNNING'")
        if liveness.is_dead(run.data.tags)
    ]


def close_dead_runs() -> list[DeadRun]:
    """Mark them KILLED; gives what was closed."""
    dead = dead_runs()
    for run in dead:
        close_run(run.run_id, "KILLED")
    return dead


def search(wanted: str) -> Iterator[Run]:
    """Every run of the experiment that MLflow's filter finds, the newest first."""
    token = None
    while True:
        page = mlflow_client.client().search_runs([mlflow_client.experiment()], wanted, page_token=token)
        yield from page
        if not (token := page.token):
            return
