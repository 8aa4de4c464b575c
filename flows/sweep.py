"""The flow of a sweep: every point a flow of its own, so that one that fails ends alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.points import Attempt, Planner, Points, Tally
from flows.screen import Output, Screen
from flows.stage_task import run_as_task
from tasks import sweep_file
from tasks.sweep_file import STAGES


@flow(name="sweep", persist_result=False, validate_parameters=True)
def sweep(file: str, overrides: list[str] | None = None, only: str | None = None, output: Output = "auto") -> Tally:
    """Run the points of a sweep's file, or those whose names match `only`; what is finished costs no task."""
    found = sweep_file.load(Path(file), overrides or [])
    chosen, planner = found.matching(only), Planner()
    with Points.open(found, len(chosen), Screen(output), planner) as points:
        for point in chosen:
            finished = planner.find(point)
            if finished is not None:
                points.confirm(point, finished)
            else:
                with points.attempt(point) as attempt:
                    _run(attempt)
        return points.tally


def _run(attempt: Attempt) -> None:
    """The stages in order, each a task; an error is the point's own."""
    decorate: Any = flow(name="point", flow_run_name=attempt.point.name, persist_result=False)

    def point() -> None:
        for stage in STAGES.values():
            run_as_task(stage.name, attempt.run, {name: attempt.refs[name].digest for name in stage.upstream})

    state: State[None] = decorate(point)(return_state=True)
    error = state.result(raise_on_failure=False)
    if isinstance(error, BaseException):
        attempt.fail(error)
    else:
        attempt.finish()
