"""dvc.yaml, written from the stage table: `python -m tasks.dvcfile`.

DVC sees of a stage its command, its code, its params, and a small reference file; the bytes are the
store's. A stage that DVC runs without need costs one look into the store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tasks import atomic, code
from tasks.methods import METHOD_KEYS
from tasks.plots import PLOTS
from tasks.references import FOLDER
from tasks.table import STAGES, Stage, Stages

DVC_YAML = Path("dvc.yaml")
HEADER = "# Written by `python -m tasks.dvcfile` from tasks/table.py; a test compares the two.\n"

# A stage depends on the whole folder of methods, not on the one that params.yaml names today: `dvc exp run -S` may
# name another, and a new method must need no other change than its file and its line.
METHOD_FOLDERS = {"allocation": "heal.allocators", "pruning": "heal.pruners", "healing": "heal.healers"}

PRESETS = ("heal/presets.py", "tasks/auto.py")
"""What decides which methods `auto` stands for; the methods themselves are in the keys of the store."""

OUTPUTS = {"healing": ["data/healed"]}
"""What DVC itself keeps, so that `dvc pull` brings a model."""

METRICS = ("healing", "evaluation")
"""Stages whose numbers `dvc metrics diff` compares."""


def render(stages: Stages = STAGES) -> dict[str, Any]:
    """The content of dvc.yaml."""
    return {
        "stages": {stage.name: _stage(stage) for stage in stages.values()},
        "metrics": [_reference(name) for name in METRICS if name in stages],
        "plots": [plot.described() for name, plot in PLOTS.items() if name in stages],
    }


def text(stages: Stages = STAGES) -> str:
    """dvc.yaml as it is written."""
    return HEADER + yaml.safe_dump(render(stages), sort_keys=False, width=120)


def _stage(stage: Stage) -> dict[str, Any]:
    plots = [{PLOTS[stage.name].path: {"cache": False}}] if stage.name in PLOTS else []
    return {
        "cmd": f"python -m tasks {stage.name}",
        "deps": [*(_reference(name) for name in stage.upstream), *_code(stage)],
        "params": list(dict.fromkeys(_watched(key) for key in stage.params)),
        "outs": [{_reference(stage.name): {"cache": False}}, *OUTPUTS.get(stage.name, ()), *plots],
    }


def _watched(key: str) -> str:
    """What DVC watches for a params key: for the name of a method its section, as options may change what it needs."""
    section, _, leaf = key.partition(".")
    return section if leaf and METHOD_KEYS.get(section) == leaf else key


def _reference(name: str) -> str:
    return f"{FOLDER.as_posix()}/{name}.json"


def _code(stage: Stage) -> list[str]:
    """The stage's code and that of all methods it may be told to use."""
    folders = [METHOD_FOLDERS[key] for key in stage.params if key in METHOD_FOLDERS]
    methods = [name for folder in folders for name in code.modules_in(folder)]
    modules = code.closure(stage.module, methods)
    files = {f"{name.replace('.', '/')}.py" for name in modules if name.rpartition(".")[0] not in folders}
    folders = [folder.replace(".", "/") for folder in folders]
    files |= set(PRESETS) if folders else set()
    beside = [f"{stage.module.rpartition('.')[0].replace('.', '/')}/{name}" for name in stage.files]
    return sorted({*files, *folders, *beside})


if __name__ == "__main__":
    atomic.write(DVC_YAML, text().encode())
