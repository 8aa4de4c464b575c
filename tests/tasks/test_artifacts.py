"""What one stage writes and another reads."""

from __future__ import annotations

from pathlib import Path

import torch

from heal.allocators.depth import Depth
from heal.allocators.n_of_m import NOfM
from heal.method import AllocationContext
from heal.values import NM, Budget, ChannelCut, Mask
from tasks import artifacts
from tests.heal import nets


def test_a_pattern_survives_its_artifacts(tmp_path: Path) -> None:
    allocation = NOfM("1:4").allocate(nets.build("vit"), Budget(weights=0.75), AllocationContext())
    artifacts.save_allocation(allocation, "n_of_m", {"pattern": "1:4"}, tmp_path)
    assert artifacts.load_allocation(tmp_path) == allocation
    mask = Mask({"layer": torch.ones(2, 4, dtype=torch.bool)}, pattern=NM(1, 4))
    artifacts.save_pruned(mask, (), tmp_path)
    assert getattr(artifacts.load_pruned(tmp_path), "pattern", None) == NM(1, 4)


def test_dropped_blocks_survive_their_artifacts(tmp_path: Path) -> None:
    context = AllocationContext(images=nets.images(4))
    allocation = Depth().allocate(nets.build("vit"), Budget(macs=0.2), context)
    artifacts.save_allocation(allocation, "depth", {}, tmp_path)
    assert artifacts.load_allocation(tmp_path) == allocation
    cut = ChannelCut({"a": torch.arange(2)}, {"a": 4}, dropped=("blocks.1", "blocks.0"))
    artifacts.save_pruned(cut, (), tmp_path)
    found = artifacts.load_pruned(tmp_path)
    assert isinstance(found, ChannelCut) and (found.dropped, found.kept) == (cut.dropped, cut.kept)
