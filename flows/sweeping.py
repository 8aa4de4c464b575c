"""`regrow sweep`: what it does, in the order in which a person sees it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows import running
from flows.screen import Output, Screen
from heal.errors import InputError
from tasks import atomic, keys, state, sweep_file

if TYPE_CHECKING:
    from flows.points import Found, Planner, Tally
    from tasks.sweep_file import Point, Sweep
    from tasks.sweep_results import Result

ROWS = 20
"""Of the table on the screen; the files have all."""


def run(file: Path, overrides: list[str], only: str | None, folder: Path | None, output: Output) -> int:
    """Run the points of a sweep and write its tables. Gives 1 when a point failed, 130 when interrupted."""
    running.wait_passively()
    return running.interruptible(lambda: _run(file, overrides, only, folder, output))


def draw(file: Path, overrides: list[str], only: str | None, folder: Path | None, output: Output) -> int:
    """Write the tables again from what MLflow has, and run nothing. Raises InputError when there is nothing."""
    if only is not None:
        raise InputError("--only says which points to run, and --table runs none; leave one of them out")
    screen, sweep = Screen(output), sweep_file.load(file, overrides)
    folder = _refuse_folder(folder or Path("sweeps") / sweep.name)
    from flows.points import Planner
    from tasks import sweep_runs

    results = list(sweep_runs.results(sweep, Planner().identities(sweep)).values())
    if not results:
        raise InputError(
            f"MLflow has no point of the sweep {sweep.name} with these params; run it first: regrow sweep {file}"
        )
    _show(screen, sweep, results, _write(folder, sweep, results))
    screen.close()
    return 0


def _run(file: Path, overrides: list[str], only: str | None, folder: Path | None, output: Output) -> int:
    began, screen = time.monotonic(), Screen(output)
    sweep = sweep_file.load(file, overrides)
    chosen = sweep.matching(only)
    folder = _refuse_folder(folder or Path("sweeps") / sweep.name)
    state.refuse_unwritable()
    _prepare(chosen, overrides, screen)
    from flows.points import Planner

    planner = Planner()
    found = {point.name: planner.find(point) for point in chosen}
    cached = sum(records is not None for records in found.values())
    screen.say(f"regrow: sweep {sweep.name}, {len(chosen)} points, {cached} of them cached")
    if cached == len(chosen):
        tally = _confirmed(sweep, chosen, found, screen, planner)
    else:
        with running.prefect_server():
            from flows.sweep import sweep as flow

            tally = flow(str(file), overrides, only, output)
    _ending(screen, sweep, tally, folder, planner)
    screen.note(seconds=time.monotonic() - began)
    screen.close()
    return 1 if tally.errors else 0


def _prepare(points: Sequence[Point], overrides: list[str], screen: Screen) -> None:
    """Raise what needs no model to be seen, and train the digits model where one is named that is not there."""
    from tasks import rehearsal  # torch: seconds, which a misspelled key need not wait for

    distinct = {(point.model, point.method): point for point in points}.values()
    for point in distinct:
        rehearsal.look(point.params)
    sweep_file.refuse_idle(list(distinct), overrides)
    for point in {keys.canonical(point.params.slice(("dense",))): point for point in points}.values():
        running.ensure_dense(point.params, screen)


def _confirmed(
    sweep: Sweep, chosen: Sequence[Point], found: dict[str, Found | None], screen: Screen, planner: Planner
) -> Tally:
    """All are finished: no server is started."""
    from flows.points import Points

    with Points.open(sweep, len(chosen), screen, planner) as points:
        for point in chosen:
            records = found[point.name]
            assert records is not None
            points.confirm(point, records)
        return points.tally


def _ending(screen: Screen, sweep: Sweep, tally: Tally, folder: Path, planner: Planner) -> None:
    from tasks import sweep_runs, tracking

    results = list(sweep_runs.results(sweep, planner.identities(sweep)).values())
    files = _write(folder, sweep, results)
    for path in files.values():
        tracking.log_artifact(tally.run_id, path)
    _show(screen, sweep, results, files)
    screen.note(ended=dict(tally.ended), errors=dict(tally.errors))
    reasons = {name: error.splitlines()[0] for name, error in tally.errors.items()}
    for why in dict.fromkeys(reasons.values()):
        first, *others = (name for name, reason in reasons.items() if reason == why)
        screen.say(f"failed   {first}{f' and {len(others)} more' if others else ''}: {why}")


def _write(folder: Path, sweep: Sweep, results: Sequence[Result]) -> dict[str, Path]:
    """The files, each whole or as it was."""
    from tasks import sweep_page, sweep_table

    planned = len(sweep.points)
    made = {
        "sweep.html": sweep_page.render(sweep.name, results, planned),
        "sweep.md": sweep_table.markdown(sweep.name, results, planned),
        "points.csv": sweep_table.comma_separated(results),
    }
    for name, text in made.items():
        atomic.write(folder / name, text.encode())
    return {name: folder / name for name in made}


def _show(screen: Screen, sweep: Sweep, results: Sequence[Result], files: dict[str, Path]) -> None:
    """How many there are, the top of the table, where the files are."""
    from tasks import sweep_means, sweep_table

    found = sweep_means.settings(results)
    standing = sweep_table.standing(results, len(sweep.points))
    points = {result.point: sweep_table.line(result) for result in results}
    screen.note(sweep=sweep.name, standing=standing, points=points, files={n: str(path) for n, path in files.items()})
    if screen.output == "json":
        return
    from rich.console import Console

    console = Console()
    console.print()
    console.print(sweep_table.terminal(found, ROWS))
    screen.say(f"... {len(found) - ROWS} more in sweep.md" if len(found) > ROWS else "")
    screen.say(standing)
    for name, path in files.items():
        screen.say(f"{name.partition('.')[2]:<8} {path}")
    screen.say("MLflow   regrow ui   (http://127.0.0.1:5000)")


def _refuse_folder(folder: Path) -> Path:
    """Raise InputError where the files cannot be written."""
    if there := state.blocked(folder):
        raise InputError(f"{there} cannot be written to, so {folder} cannot be made; name another folder with -o")
    return folder
