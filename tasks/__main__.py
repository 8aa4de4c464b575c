"""Run one stage from the command line; this is what dvc.yaml calls.

    python -m tasks healing -S healing.starfish.lr=3e-4

Upstream artifacts are those that data/stages/<stage>.json refer to; what is missing is computed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from heal.errors import HealError, InputError
from tasks import bootstrap
from tasks.keys import Resolved
from tasks.params import load
from tasks.plots import PLOTS
from tasks.progress import fitting
from tasks.references import References
from tasks.resolve import resolve
from tasks.runner import Ref
from tasks.store import Store
from tasks.table import STAGES

PARAMS = Path("params.yaml")
HEALED = Path("data/healed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: done; 1: the stage failed; 2: the user must change something."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in flows/running.py; before anything brings torch
    options = _parser().parse_args(arguments)
    try:
        ref = _run(options.stage, options.params, options.set)
    except HealError as error:
        sys.stderr.write(f"{error}\n")
        return 2 if isinstance(error, InputError) else 1
    how = "cached" if ref.cached else f"{ref.seconds:.1f} s"
    sys.stdout.write(f"{ref.stage:<12} {how:<10} {ref.digest[:12]}\n")
    return 0


def _run(stage: str, path: Path | None, overrides: Sequence[str]) -> Ref:
    if path is None and PARAMS.is_file():
        path = PARAMS
    params = load(path, overrides)

    store = Store()

    def resolved() -> Resolved:
        if bootstrap.is_needed(params):
            bootstrap.train_dense(params, store, fitting)
        return resolve(params)

    ref = References(params, store, resolved, fitting).run(stage)
    if stage == "healing":
        put(store.materialise(ref.digest) / "bundle", HEALED)
    if stage in PLOTS:
        PLOTS[stage].write(store.materialise(ref.digest))
    return ref


def put(bundle: Path, folder: Path) -> None:
    """Put a copy of a bundle where DVC finds it, in place of what is there."""
    beside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        shutil.copytree(bundle, beside, copy_function=shutil.copyfile)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tasks", description="Run one stage.", epilog="example: python -m tasks healing -S healing.seed=1"
    )
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("-S", dest="set", action="append", default=[], metavar="KEY=VALUE", help="override a param")
    parser.add_argument("--params", type=Path, metavar="FILE", help=f"default: {PARAMS}, where there is one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
