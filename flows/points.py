"""The points of a sweep on their way: what is found and what is computed, recorded in MLflow and shown."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from flows.screen import Screen, Series, duration, remark
from heal.errors import HealError, InputError
from tasks import artifacts, keys, plan, resolve, sweep_runs, tracking
from tasks.manifest import Record
from tasks.runner import Ref, run_stage
from tasks.store import Store
from tasks.sweep_file import STAGES, Point, Sweep

Found = Mapping[str, Record]
"""The finished computations of a point's stages."""


Ending = Literal["computed", "cached", "failed"]


@dataclass(frozen=True)
class Tally:
    """How points ended, by name, and why some failed. `run_id` is the sweep's in MLflow."""

    run_id: str
    ended: Mapping[str, Ending]
    errors: Mapping[str, str]


class Planner:
    """Which points are finished already; what names point to is asked once for all that share them."""

    def __init__(self) -> None:
        self.store = Store()
        self._resolved: dict[str, dict[str, str]] = {}

    def resolved(self, point: Point) -> dict[str, str]:
        """What the point's moving names point to. Raises InputError subclasses when something named is not there."""
        named = ("dense", "calibration.source", "calibration.labels", "evaluation.source", "evaluation.labels")
        shared = keys.canonical(point.params.slice(named))
        if shared not in self._resolved:
            self._resolved[shared] = resolve.resolve(point.params)
        return self._resolved[shared]

    def identities(self, sweep: Sweep) -> dict[str, str]:
        """What the points' runs would be found by today, by name; nothing where what they name is not there now."""
        return {point.name: self._identity(sweep.name, point) for point in sweep.points}

    def _identity(self, sweep: str, point: Point) -> str:
        try:
            return sweep_runs.identity_of(sweep, point, self.resolved(point))
        except InputError:
            return ""  # so what was recorded of it is of other inputs

    def find(self, point: Point) -> Found | None:
        """The computations of all stages of the point, or None when one would run."""
        return plan.finished(point.params, self.store, self.resolved(point), STAGES)


class Points:
    """A sweep under way."""

    def __init__(self, sweep: Sweep, count: int, screen: Screen, planner: Planner) -> None:
        self.sweep, self.planner = sweep, planner
        self.shown = Series(screen, "points", count)
        self.ended: dict[str, Ending] = {}
        self.errors: dict[str, str] = {}
        self._recorded = sweep_runs.results(sweep)
        self.run_id = sweep_runs.open_sweep(sweep.name)

    @classmethod
    @contextmanager
    def open(cls, sweep: Sweep, count: int, screen: Screen, planner: Planner) -> Iterator[Points]:
        """`count` points of a sweep, under an MLflow run that ends as they do."""
        points = cls(sweep, count, screen, planner)
        ending: tracking.Ending = "FAILED"
        try:
            yield points
            ending = "FAILED" if points.errors else "FINISHED"
        finally:
            points.shown.close()
            tracking.close_run(points.run_id, ending)

    @property
    def tally(self) -> Tally:
        """How they ended so far."""
        return Tally(self.run_id, dict(self.ended), dict(self.errors))

    def confirm(self, point: Point, found: Found) -> None:
        """A point that is finished already: its run is there, or is written now."""
        self.shown.begin(point.name)
        for record in found.values():
            self.planner.store.touch(record.key)
        refs = {name: Ref.of(record, cached=True) for name, record in found.items()}
        if self._is_recorded(point, refs):
            self.end(point, "cached", refs["evaluation"].metrics)
            return
        with self.attempt(point) as attempt:
            for name, ref in refs.items():
                attempt.keep(name, ref)
            attempt.finish()

    @contextmanager
    def attempt(self, point: Point) -> Iterator[Attempt]:
        """A point with an MLflow run, which is not left open when the sweep is interrupted."""
        self.shown.begin(point.name)
        run_id = sweep_runs.open_point(self.sweep.name, point, self._identity(point), self.run_id)
        attempt = Attempt(self, point, run_id)
        try:
            yield attempt
        finally:
            if point.name not in self.ended:
                tracking.close_run(attempt.run_id, "KILLED")

    def end(self, point: Point, ending: Ending, metrics: Mapping[str, float], seconds: float = 0) -> None:
        """Count a point that has its numbers."""
        self.ended[point.name] = ending
        took = "cached" if ending == "cached" else duration(seconds)
        self.shown.end(f"{point.name:<44} {took:<9} {remark('evaluation', metrics)}".rstrip())

    def fail(self, point: Point, error: str) -> None:
        """Count a point that has none."""
        self.ended[point.name], self.errors[point.name] = "failed", error
        self.shown.end(f"{point.name:<44} failed    {error.splitlines()[0]}", failed=True)

    def _is_recorded(self, point: Point, refs: Mapping[str, Ref]) -> bool:
        """Whether the point's last run has these very artifacts."""
        known = self._recorded.get(point.name)
        if known is None or known.status != "finished" or known.identity != self._identity(point):
            return False
        return known.artifacts == {name: ref.digest for name, ref in refs.items()}

    def _identity(self, point: Point) -> str:
        return sweep_runs.identity_of(self.sweep.name, point, self.planner.resolved(point))


class Attempt:
    """One point on its way: the references of its stages so far."""

    def __init__(self, points: Points, point: Point, run_id: str) -> None:
        self.points, self.point, self.run_id = points, point, run_id
        self.refs: dict[str, Ref] = {}
        self._began, self._stage = time.monotonic(), ""

    def run(self, name: str, upstream: Mapping[str, str]) -> Ref:
        """The stage's artifact, found or computed."""
        self._stage = name
        params, planner, refs = self.point.params, self.points.planner, {other: self.refs[other] for other in upstream}
        names = partial(resolve.resolve, params)
        ref = run_stage(STAGES[name], params, refs, planner.store, self.points.shown.progress, names)
        self.keep(name, ref)
        return ref

    def keep(self, name: str, ref: Ref) -> None:
        """Take the stage's artifact as the point's, and record it."""
        self.refs[name] = ref
        tracking.log_stage(self.run_id, name, ref.cached, ref.metrics)

    def finish(self) -> None:
        """All stages are there: record what the evaluation says."""
        digests = {name: ref.digest for name, ref in self.refs.items()}
        evaluation = artifacts.read_json(
            self.points.planner.store.materialise(digests["evaluation"]) / "evaluation.json"
        )
        sweep_runs.finish_point(self.run_id, evaluation, digests, sum(ref.seconds for ref in self.refs.values()))
        ending: Ending = "cached" if all(ref.cached for ref in self.refs.values()) else "computed"
        self.points.end(self.point, ending, self.refs["evaluation"].metrics, time.monotonic() - self._began)

    def fail(self, error: BaseException) -> None:
        """Record which stage failed, and why."""
        kind = "" if isinstance(error, HealError) else f"{type(error).__name__}: "
        said = f"{self._stage}: {kind}{error}"
        sweep_runs.fail_point(self.run_id, said)
        self.points.fail(self.point, said)
