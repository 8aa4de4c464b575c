"""A folder in which a user works: a params file for a tiny network on digits, and `regrow` as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heal import bundle
from tests.heal import nets

PARAMS = """
dense: {source: "bundle:dense", if_missing: refuse}
calibration: {source: digits, count: 32}
allocation: {method: global_variance, budget: {neurons: 0.5}, global_variance: {multiple: 8}}
pruning: {method: variance}
healing:
  methods: [closed_form, starfish]
  starfish: {epochs: 2, batch_size: 16, lr: 6e-4}
evaluation: {source: digits, latency_rounds: 0}
registration: {name: tiny}
promotion: {max_drop_dense: 1.0, max_drop_champion: 1.0, min_agreement: 0.0}
"""

REGROW = str(Path(sys.executable).with_name("regrow"))
"""The installed command: `python -m` would put the working directory first on the path."""

PREPROCESSING = {
    "size": [32, 32],
    "resize": 32,
    "crop": "center",
    "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


@dataclass(frozen=True)
class Workplace:
    """`folder` holds params.yaml and the dense bundle; the state folder lies in it."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Workplace:
        """With a tiny ViT that was never trained: these tests are about the road, not about accuracy."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "params.yaml").write_text(PARAMS)
        bundle.save(nets.build("vit"), folder / "dense", metadata={"preprocessing": PREPROCESSING})
        return cls(folder)

    @property
    def home(self) -> Path:
        """The state folder."""
        return self.folder / ".regrow"

    def used_since(self, when: float) -> list[Path]:
        """The records of the store that were used since then."""
        return [path for path in (self.home / "store" / "keys").iterdir() if path.stat().st_mtime >= when]

    def start(self, *command: str, **extra: str) -> subprocess.Popen[str]:
        """Start a command here, in a process group of its own, as a shell does."""
        environment = {**os.environ, **extra, "REGROW_HOME": str(self.home), "PYTHONPATH": os.getcwd()}
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, *words: str) -> Finished:
        """`regrow WORDS`, to its end."""
        process = self.start(REGROW, *words)
        output, errors = process.communicate(timeout=400)
        return Finished(process.returncode, output, errors)

    def stage(self, name: str) -> Finished:
        """`python -m tasks NAME`, what DVC calls."""
        process = self.start(sys.executable, "-m", "tasks", name)
        output, errors = process.communicate(timeout=400)
        return Finished(process.returncode, output, errors)


@dataclass(frozen=True)
class Finished:
    """How a process ended."""

    code: int
    output: str
    errors: str

    @property
    def facts(self) -> Mapping[str, Any]:
        """What `--json` printed."""
        facts: Mapping[str, Any] = json.loads(self.output)
        return facts

    @property
    def computed(self) -> set[str]:
        """The stages that ran, by `--json`."""
        return {name for name, stage in self.facts["stages"].items() if not stage["cached"]}
