"""The main flow: take the dense model, prune it, heal it without labels, prove it, promote it.

Prefect gives order, states, retries and schedules. What is cached is decided by the store alone:
a stage that was found ends in a state named Cached, and what travels between stages is a reference.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE

from flows import gate
from flows.screen import Output, Screen
from flows.stage_task import run_as_task
from tasks import params as parameters
from tasks import promotion, resolve, tracking
from tasks.params import Params
from tasks.runner import Ref, run_stage
from tasks.store import Store
from tasks.table import STAGES


@flow(name="recompress", persist_result=False, validate_parameters=True)
def recompress(params_file: str | None = None, overrides: list[str] | None = None, output: Output = "auto") -> Outcome:
    """Recompress the model that the params name, and ask the gate to promote the result."""
    with Road.open(params_file, overrides or [], output) as road:
        dense = road.stage("dense")
        calibration = road.stage("calibration", dense)
        activations = road.stage("activations", dense, calibration)
        allocation = road.stage("allocation", dense, calibration, activations)
        pruning = road.stage("pruning", dense, activations, allocation)
        healing = road.stage("healing", dense, calibration, activations, pruning)
        evaluation = road.stage("evaluation", dense, calibration, allocation, pruning, healing)
        made = (dense, calibration, allocation, pruning, healing, evaluation)
        report = road.stage("report", *made)
        registration = road.stage("registration", *made, report)
        return Outcome(road.references, road.promote(registration))


@dataclass(frozen=True)
class Outcome:
    """What a run made, and what the gate said."""

    references: dict[str, Ref]
    decision: promotion.Decision


class Road:
    """One run on its way: the params, the store, the MLflow run, the screen."""

    def __init__(self, params: Params, screen: Screen) -> None:
        self.params, self.screen, self.store = params, screen, Store()
        self.references: dict[str, Ref] = {}
        self.run_id = ""

    @classmethod
    @contextmanager
    def open(cls, params_file: str | None, overrides: list[str], output: Output) -> Iterator[Road]:
        """The road, with an MLflow run that ends as the flow ends."""
        params = parameters.load(None if params_file is None else Path(params_file), overrides)
        road = cls(params, Screen(output))
        road.run_id = tracking.open_run(str(runtime.flow_run.id), params.flat(), name=params.title)
        ending: tracking.Ending = "FAILED"
        os.environ["MLFLOW_RUN_ID"] = road.run_id
        try:
            yield road
            ending = "FINISHED"
        finally:
            del os.environ["MLFLOW_RUN_ID"]
            tracking.close_run(road.run_id, ending)

    def stage(self, name: str, *upstream: Ref) -> Ref:
        """The stage as a Prefect task; it reads the artifacts of the stages before it."""
        return run_as_task(name, self._run, {ref.stage: ref.digest for ref in upstream})

    def promote(self, registration: Ref) -> promotion.Decision:
        """Ask the gate; moves the champion when it says yes."""
        decorate = task(name="promotion", task_run_name="promotion", cache_policy=NO_CACHE, persist_result=False)
        return decorate(self._ask)(registration.digest)

    def _run(self, name: str, upstream: dict[str, str]) -> Ref:
        refs = {other: self.references[other] for other in upstream}
        names = partial(resolve.resolve, self.params)
        ref = run_stage(STAGES[name], self.params, refs, self.store, self.screen.progress, names)
        self.references[name] = ref
        tracking.log_stage(self.run_id, name, ref.cached, ref.metrics)
        self.screen.stage(name, ref.cached, ref.seconds, ref.metrics)
        return ref

    def _ask(self, registration: str) -> promotion.Decision:
        dense, calibration = (self.store.materialise(self.references[name].digest) for name in ("dense", "calibration"))
        return gate.ask(self.params, dense, calibration, gate.registered_version(self.store.materialise(registration)))
