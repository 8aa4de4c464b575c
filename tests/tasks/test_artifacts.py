"""What one stage writes and another reads."""

from __future__ import annotations

from pathlib import Path

import torch

from heal.allocators.n_of_m import NOfM
from heal.method import AllocationContext
from heal.values import NM, Budget, Mask
from tasks import artifacts
from tests.heal import nets


def test_a_pattern_survives_its_artifacts(tmp_path: Path) -> None:
    allocation = NOfM("1:4").allocate(nets.build("vit"), Budget(weights=0.75), AllocationContext())
    artifacts.save_allocation(allocation, "n_of_m", {"pattern": "1:4"}, tmp_path)
    assert artifacts.load_allocation(tmp_path) == allocation
    mask = Mask({"layer": torch.ones(2, 4, dtype=torch.bool)}, pattern=NM(1, 4))
    artifacts.save_pruned(mask, (), tmp_path)
    assert getattr(artifacts.load_pruned(tmp_path), "pattern", None) == NM(1, 4)
