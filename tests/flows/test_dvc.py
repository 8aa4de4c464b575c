"""DVC itself over the canonical experiment, in a clone: what is done stays done, and the store is shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


@pytest.mark.slow
def test_what_dvc_has_done_it_does_not_do_again(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    assert "Running stage 'healing'" in _run(clone, "dvc", "repro")
    assert "Data and pipelines are up to date" in _run(clone, "dvc", "repro")
    stages = json.loads(_run(clone, "regrow", "run", "--json"))["stages"]
    assert all(stage["cached"] for stage in stages.values())
    params = clone / "params.yaml"
    section = "  global_variance:\n"
    assert section in params.read_text()
    params.write_text(params.read_text().replace(section, f"{section}    statistic: pre\n"))
    assert "Running stage 'activations'" in _run(clone, "dvc", "repro"), "an option changed what a method needs"
    assert "Data and pipelines are up to date" in _run(clone, "dvc", "repro")


def _run(folder: Path, *words: str) -> str:
    """The output of an installed command; `python` in dvc.yaml is this environment's."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    environment.pop("REGROW_HOME", None)
    command = [str(BIN / words[0]), *words[1:]]
    return subprocess.run(command, cwd=folder, env=environment, text=True, check=True, stdout=subprocess.PIPE).stdout
