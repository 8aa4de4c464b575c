"""timm imports wherever torch does, and an ordinary torchvision is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heal import compat

ROOT = Path(__file__).parents[2]


def test_timm_imports_in_a_fresh_process_and_its_networks_run() -> None:
    net = "timm.create_model('resnet10t').eval()"
    code = f"import torch; from heal.compat import timm; print({net}(torch.ones(1, 3, 32, 32)).shape)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([1, 1000])"


def test_importing_again_gives_the_same_module() -> None:
    assert compat.import_timm() is compat.timm


def test_operators_that_load_are_not_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_loads", lambda library: True)
    monkeypatch.setattr(compat, "_declare_operators", lambda: pytest.fail("an ordinary torchvision was touched"))
    assert compat.import_timm() is compat.timm


def test_declaring_leaves_operators_that_are_there() -> None:
    before = torch.ops.torchvision.nms
    compat._declare_operators()
    assert torch.ops.torchvision.nms is before


def test_a_file_that_is_no_library_does_not_load(tmp_path: Path) -> None:
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    assert not compat._loads(broken)
