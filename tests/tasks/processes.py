"""Processes of their own: what they print, leave behind and survive can be seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def process(code: str, cwd: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """Run `code` with the test's state folder."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
