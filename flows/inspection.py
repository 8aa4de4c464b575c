"""`regrow latency`, `promote`, `rollback`, `history`, `doctor`, `ui`, `store gc`: looking, and setting right."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows import running
from flows.screen import Screen
from heal.errors import InputError
from tasks import params as parameters
from tasks import plan, resolve, state
from tasks.addresses import public
from tasks.store import Store

if TYPE_CHECKING:
    from tasks.params import Params


def latency(models: list[str], batches: list[int], rounds: int, allow_adapters: list[str], output_json: bool) -> int:
    """Median seconds and quartiles of every model, side by side, and the ratio to the first."""
    from tasks import latency

    screen = Screen("json" if output_json else "plain")
    screen.say(f"eager, {rounds} rounds in turns; median (quartiles), times as fast as the first")
    for timed in latency.compare(models, batches, rounds, allow_adapters):
        t = timed.latency
        spread = f"{1e3 * t.median:.1f} ms ({1e3 * t.low:.1f}-{1e3 * t.high:.1f})"
        screen.say(f"batch {timed.batch:<4} {timed.model:<40} {spread:<28} {timed.speedup:.2f}x")
        screen.note(**{f"{timed.model} batch {timed.batch}": {"median": t.median, "low": t.low, "high": t.high}})
    screen.close()
    return 0


def promote(name: str | None, version: str | None, file: Path | None, overrides: list[str]) -> int:
    """Ask the gate of the params about a version again. Gives 1 when it rejects."""
    running.wait_passively()  # the gate may time: it measures as it does at the end of a run
    from flows import gate
    from tasks import registry

    params = _params(file, overrides)
    if name not in (None, params.registration.name):
        raise InputError(f"these params are about {params.registration.name}; name those of {name} with --params")
    name = params.registration.name
    wanted = version or registry.version_of(f"models:/{name}@challenger").version
    dense, calibration = _artifacts(params, "dense", "calibration")
    decision = gate.ask(params, dense, calibration, wanted, again=True)
    screen = Screen("plain")
    screen.say(decision.reason)
    if decision.verdict is not None:
        screen.say(str(decision.verdict))
    return 1 if decision.rejected else 0


def rollback(name: str | None, to: str | None) -> int:
    """Make an earlier version champion again."""
    from tasks import promotion

    Screen("plain").say(str(promotion.rollback(name or _params().registration.name, to)))
    return 0


def history(name: str | None, output_json: bool) -> int:
    """Every move of the model's aliases, oldest first."""
    from tasks import ledger

    moves = ledger.moves(name or _params().registration.name)
    for move in moves:
        sys.stdout.write((move.line() if output_json else str(move)) + "\n")
    if not moves and not output_json:
        sys.stdout.write(f"no alias of {name or _params().registration.name} was moved from {state.home()}\n")
    return 0


def doctor() -> int:
    """Close the MLflow runs of dead processes, and say what is there."""
    from tasks import registry, tracking

    screen = Screen("plain")
    screen.say(f"state    {state.home()}")
    screen.say(f"store    {Store().url}")
    screen.say(f"registry {public(registry.tracking_uri())}")
    for run in tracking.close_dead_runs():
        screen.say(f"closed   run {run.run_id}: its process {run.pid} is gone")
    for work in sorted((state.home() / "work").glob("*/checkpoints")):
        if any(work.iterdir()):
            screen.say(f"resumes  {work.parent.name[:12]}: an interrupted stage goes on from its checkpoint")
    return 0


def ui(port: int) -> int:
    """Serve MLflow on the loopback until interrupted."""
    from tasks import mlflow_store, registry

    uri = registry.tracking_uri()
    if uri.startswith("http"):
        sys.stdout.write(f"a server has the registry: open {public(uri)}\n")
        return 0
    _refuse_taken(port)
    mlflow_store.ready(uri)
    address = ["--host", "127.0.0.1", "--port", str(port)]
    os.environ["MLFLOW_BACKEND_STORE_URI"] = uri  # not an argument: those are in everybody's process list
    stored = ["--default-artifact-root", str(state.mlflow_artifacts())]
    sys.stdout.write(f"http://127.0.0.1:{port}   (Ctrl-C ends it)\n")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *address, *stored])


def _refuse_taken(port: int) -> None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port {port} is taken ({error.strerror}); name another with --port") from error


def collect_garbage(keep_runs: int, dry_run: bool) -> int:
    """Remove what neither a registered version nor one of the last runs refers to.

    Raises InputError for a store of its own without a registry: that it stands for nothing is seldom meant.
    """
    from tasks import mlflow_store, registry
    from tasks.gc import gc

    uri = registry.tracking_uri()
    if "REGROW_STORE" in os.environ and not mlflow_store.exists(uri):
        raise InputError(
            f"there is no registry at {public(uri)} that says which artifacts of {Store().url} must stay; "
            "set MLFLOW_TRACKING_URI or REGROW_HOME to the one that runs with this store use"
        )
    freed = gc(Store(), registry.referenced_artifacts(), keep_runs, dry_run=dry_run)
    for artifact in freed.artifacts:
        sys.stdout.write(f"{artifact.digest[:12]}  {artifact.stage:<13} {artifact.bytes / 1e6:8.1f} MB\n")
    sys.stdout.write(f"{'would free' if dry_run else 'freed'} {freed.bytes / 1e6:.1f} MB\n")
    return 0


def _params(file: Path | None = None, overrides: Sequence[str] = ()) -> Params:
    default = Path("params.yaml")
    return parameters.load(file or (default if default.is_file() else None), overrides)


def _artifacts(params: Params, *stages: str) -> list[Path]:
    """The artifacts of cached stages. Raises InputError when one was not made yet."""
    store = Store()
    planned = {stage.name: stage for stage in plan.plan(params, store, resolve.resolve(params))}
    found = []
    for name in stages:
        digest = planned[name].digest
        if digest is None:
            reason = planned[name].why[0]
            raise InputError(f"stage {name} of these params has not run yet ({reason}); `regrow run` first")
        found.append(store.materialise(digest))
    return found
