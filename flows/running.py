"""`regrow run`, `demo`, `plan` and `report`: what they do, in the order in which a person sees it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flows.screen import Output, Screen, duration
from heal.errors import InputError
from tasks import params as parameters
from tasks import plan, resolve, state
from tasks.plan import PlannedStage
from tasks.store import Store

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.promotion import Decision


def run(file: Path | None, overrides: list[str], output: Output, is_demo: bool = False) -> int:
    """Run the road, or say that all of it is cached. Gives 1 when the gate rejects, 130 when interrupted."""
    wait_passively()
    return interruptible(lambda: _run(file, overrides, output, is_demo))


def interruptible(work: Callable[[], int]) -> int:
    """The exit code of the work, 130 when it was interrupted."""
    try:
        return work()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: what is finished is kept, and the same command goes on from there\n")
        return 128 + signal.SIGINT


def wait_passively() -> None:
    """Before torch is imported: where cores are shared, threads that spin while they wait are 20 times slower.

    Not for `regrow latency`: it costs small batches a tenth, and a server keeps OpenMP's default.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def prefect_server() -> Iterator[None]:
    """Flows in this context have a server. Import Prefect in it: it warns when its folder is missing."""
    Path(os.environ.get("PREFECT_HOME") or state.prefect_home()).mkdir(parents=True, exist_ok=True)
    from flows import private_server

    with private_server.available():
        yield


def show_plan(file: Path, overrides: list[str], output_json: bool) -> int:
    """Print every stage: cached, or why it would run."""
    screen = Screen("json" if output_json else "plain")
    params = parameters.load(file, overrides)
    stages = plan.plan(params, Store(), resolve.resolve(params))
    if params.chosen:
        screen.say(params.chosen)
    for stage in stages:
        screen.say(f"{stage.name:<13} {'cached' if stage.cached else 'would run'}")
        for reason in stage.why:
            screen.say(f"{'':<13} {reason}")
    screen.note(
        auto=params.chosen, stages=[{"name": s.name, "cached": s.cached, "key": s.key, "why": s.why} for s in stages]
    )
    screen.close()
    return 0


def write_report(file: Path, overrides: list[str], output: Path) -> int:
    """Copy the report of the run that these params name. Raises InputError when it was not made yet."""
    if not output.absolute().parent.is_dir():
        raise InputError(f"there is no folder {output.absolute().parent} to write {output.name} into; make it first")
    if output.is_dir():
        raise InputError(f"{output} is a folder; name the file to write, such as {output / 'report.html'}")
    params = parameters.load(file, overrides)
    store = Store()
    stages = {stage.name: stage for stage in plan.plan(params, store, resolve.resolve(params))}
    digest = stages["report"].digest
    if digest is None:
        raise InputError(f"there is no report of these params yet ({stages['report'].why[0]}); `regrow run` makes it")
    shutil.copyfile(store.materialise(digest) / "report.html", output)
    Screen("plain").say(f"wrote {output}")
    return 0


def _run(file: Path | None, overrides: list[str], output: Output, is_demo: bool) -> int:
    began = time.monotonic()
    screen = Screen(output)
    params = parameters.load(file, overrides)
    state.refuse_unwritable()
    from tasks import rehearsal  # torch: seconds, which a misspelled key need not wait for

    rehearsal.glance(params)
    ensure_dense(params, screen)
    planned = plan.plan(params, Store(), resolve.resolve(params))
    _header(params, screen)
    if all(stage.cached for stage in planned):
        decision = _all_cached(params, planned, screen)
    else:
        rehearsal.rehearse(params, {stage.name: stage for stage in planned}, Store())
        decision = _computed(file, overrides, output, screen)
    _ending(params, decision, screen, began, is_demo)
    screen.close()
    return 1 if decision.rejected else 0


def ensure_dense(params: Params, screen: Screen) -> None:
    """Train and register the digits model where the params name it and the registry has none."""
    from tasks import bootstrap

    if bootstrap.is_needed(params):
        screen.say(f"{params.dense.source} is not registered yet: training a small ViT on digits, a minute or two")
        seconds = bootstrap.train_dense(params, Store(), screen.progress)
        screen.say(f"{'trained':<13} {duration(seconds):<9} registered as dense and champion")


def _header(params: Params, screen: Screen) -> None:
    screen.say(f"regrow: {params.dense.source} -> {params.title}")
    if params.chosen:
        screen.say(params.chosen)


def _all_cached(params: Params, planned: list[PlannedStage], screen: Screen) -> Decision:
    from flows import gate

    store, digests = Store(), {}
    for stage in planned:
        assert stage.record is not None
        store.touch(stage.record.key)
        digests[stage.name] = stage.record.digest
        screen.stage(stage.name, True, stage.record.seconds, stage.record.metrics)
    screen.note(artifacts=digests)
    dense, calibration, registration = (
        store.materialise(digests[name]) for name in ("dense", "calibration", "registration")
    )
    return gate.ask(params, dense, calibration, gate.registered_version(registration))


def _computed(file: Path | None, overrides: list[str], output: Output, screen: Screen) -> Decision:
    with prefect_server():
        from flows.recompress import recompress

        outcome = recompress(None if file is None else str(file), overrides, output)
    for name, ref in outcome.references.items():
        screen.remember(name, ref.cached, ref.seconds, ref.metrics)
    screen.note(artifacts={name: ref.digest for name, ref in outcome.references.items()})
    return outcome.decision


def _ending(params: Params, decision: Decision, screen: Screen, began: float, is_demo: bool) -> None:
    screen.say(f"{'promotion':<13} {decision.reason}")
    if decision.verdict is not None:
        screen.say(str(decision.verdict))
    store = Store()
    digests = screen.facts["artifacts"]
    screen.table(store.materialise(digests["evaluation"]) / "evaluation.json", params.healing.methods)
    report = store.materialise(digests["report"]) / "report.html"
    screen.note(report=str(report), seconds=time.monotonic() - began, decision=decision.reason)
    screen.say(f"\nreport   {report}")
    screen.say(f"MLflow   regrow ui   (model {params.registration.name}, http://127.0.0.1:5000)")
    if is_demo:
        screen.say("again    regrow demo   (all cached), or change a param: regrow plan -S healing.starfish.lr=3e-4")
