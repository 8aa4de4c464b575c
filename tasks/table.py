"""The one list of stages: what each reads, which params it may see, and where it wants to run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from tasks.progress import Progress

StageFunction = Callable[[Any, dict[str, Path], Path, Progress], dict[str, float]]
"""`run(params, inputs, output, progress) -> metrics`: reads input folders, fills one output folder."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline.

    module holds `run`. upstream: the stages whose artifacts it reads. params: the dotted keys it
    may read. pool: where it wants to run. files: what it computes with besides code that it
    imports, as paths beside its module (a folder stands for all in it). outside: its effect lies
    outside the store (in the registry), so a hit counts only while `still_valid(output)` of its
    module says so.
    """

    name: str
    module: str
    upstream: tuple[str, ...]
    params: tuple[str, ...]
    pool: Literal["cpu", "gpu"] = "cpu"
    files: tuple[str, ...] = ()
    outside: bool = False

    def function(self) -> StageFunction:
        """`run` of the stage's module, imported only now: a stage may import torch."""
        return cast(StageFunction, importlib.import_module(self.module).run)

    def still_valid(self, output: Path) -> bool:
        """Whether what this artifact stands for is still there; always so for effects inside the store."""
        return not self.outside or bool(importlib.import_module(self.module).still_valid(output))


Stages = Mapping[str, Stage]

MOVING = ("dense.source", "calibration.source", "evaluation.source", "evaluation.labels")
"""Params that name something which may change while the name stays; tasks/resolve.py looks it up."""

# The order is the order of a run: every stage comes after all of its upstream stages.
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("dense", "tasks.dense", (), ("dense",)),
        # It reads evaluation.source only to stay disjoint from the evaluation images.
        Stage("calibration", "tasks.calibration", ("dense",), ("calibration", "evaluation.source")),
        # It captures the union of what the chosen methods need, so it must know which they are.
        Stage(
            "activations",
            "tasks.activations",
            ("dense", "calibration"),
            ("activations", "allocation.method", "pruning.method", "healing.methods"),
            "gpu",
        ),
        Stage("allocation", "tasks.allocation", ("dense", "calibration", "activations"), ("allocation",), "gpu"),
        Stage("pruning", "tasks.pruning", ("dense", "activations", "allocation"), ("pruning",)),
        Stage("healing", "tasks.healing", ("dense", "calibration", "activations", "pruning"), ("healing",), "gpu"),
        Stage(
            "evaluation",
            "tasks.evaluation",
            ("dense", "calibration", "allocation", "pruning", "healing"),
            ("evaluation",),
            "gpu",
        ),
        Stage(
            "report",
            "tasks.report",
            ("dense", "calibration", "allocation", "pruning", "healing", "evaluation"),
            ("report",),
            files=("templates",),
        ),
        Stage(
            "registration",
            "tasks.registration",
            ("dense", "calibration", "allocation", "pruning", "healing", "evaluation", "report"),
            ("registration",),
            files=("served_model.py",),
            outside=True,
        ),
    )
}


def up_to(last: str) -> dict[str, Stage]:
    """The stages of a run from the first to `last`."""
    names = list(STAGES)
    return {name: STAGES[name] for name in names[: names.index(last) + 1]}
