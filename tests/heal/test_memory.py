"""What a method keeps of the calibration images does not grow with their number (law 6)."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from heal.allocators import ALLOCATORS
from heal.healers import HEALERS
from heal.images import Images, Replay
from heal.method import AllocationContext, Allocator, HealContext, Healer, taps
from heal.pruned import apply
from heal.pruners import PRUNERS
from heal.statistics import capture
from heal.values import Budget
from tests.heal import entries, nets
from tests.heal.entries import replaced

FEW, MANY, SIDE = 320, 1280, 64
HELD = (MANY - FEW) * 3 * SIDE * SIDE * 4
"""Bytes that a method which holds all images takes more of many than of few: 45 MiB."""

SHORT = entries.SHORT | {"population": 3, "parents": 2, "generations": 1}
STATUS = Path("/proc/self/status")
M_MMAP_THRESHOLD = -3
"""The name of this limit for mallopt (malloc.h of glibc)."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STATUS.exists(), reason="the peak of a process's memory is read from Linux's /proc"),
]


@dataclasses.dataclass(frozen=True)
class Made:
    """Images that come into being when they are asked for."""

    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.count, 3, SIDE, SIDE

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        return torch.randn(len(indices), *self.shape[1:], generator=torch.Generator().manual_seed(int(indices[0])))


@pytest.fixture(scope="module")
def apart() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, whose resident memory is what it holds."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=return_what_is_freed) as pool:
        yield pool


def return_what_is_freed() -> None:
    """Blocks of 64 KiB and more come from the system and go back to it; else fragments of a heap pass for growth."""
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024) == 1


def test_holding_all_images_would_be_seen(apart: ProcessPoolExecutor) -> None:
    assert apart.submit(grows_by_holding).result() > 0.9 * HELD


@pytest.mark.parametrize("name", sorted(set(HEALERS) - {"none", "qk_compensation"}))
def test_a_healer_holds_no_more_of_many_images_than_of_few(name: str, apart: ProcessPoolExecutor) -> None:
    assert apart.submit(grows_by_healing, name).result() < HELD / 2


@pytest.mark.parametrize("name", sorted(set(ALLOCATORS) - {"projection_forced"}))
def test_an_allocator_holds_no_more_of_many_images_than_of_few(name: str, apart: ProcessPoolExecutor) -> None:
    assert apart.submit(grows_by_allocating, name).result() < HELD / 2


def heals(model: nn.Module, healer: Healer, images: Images) -> None:
    """Mask or cut a half and heal; what the healer may cache by its budget is set to nothing."""
    names = ("global_variance", "variance") if healer.unit == "neurons" else ("uniform", "magnitude")
    allocator, pruner = ALLOCATORS[names[0]](), PRUNERS[names[1]]()
    wanted = taps(model, [allocator, pruner, healer])
    statistics = capture(model, images, wanted) if wanted else {}
    context = AllocationContext(statistics=statistics)
    pruned = pruner.prune(model, allocator.allocate(model, Budget(**{allocator.unit: 0.5}), context), statistics)
    student = copy.deepcopy(model)
    apply(student, pruned)
    healer.heal(student, model, images, HealContext(statistics=statistics, pruned=pruned, cache_bytes=0, spill_bytes=0))


def allocates(model: nn.Module, allocator: Allocator, images: Images) -> None:
    wanted = taps(model, [allocator])
    statistics = capture(model, images, wanted) if wanted else {}
    budget = Budget(blocks=0.75) if allocator.unit == "blocks" else Budget(**{allocator.unit: 0.5})
    allocator.allocate(model, budget, AllocationContext(statistics=statistics, images=images))


def grows_by_holding() -> int:
    return growth(lambda images: torch.cat(list(Replay(images, 64))))


def grows_by_healing(name: str) -> int:
    model = bare() if name == "repair" else nets.build("resnet")
    return growth(lambda images: heals(model, replaced(HEALERS[name](), SHORT), images))


def grows_by_allocating(name: str) -> int:
    model = nets.build("resnet")
    return growth(lambda images: allocates(model, replaced(ALLOCATORS[name](), SHORT), images))


def growth(use: Callable[[Images], object]) -> int:
    """Bytes by which the peak of memory is higher with many images than with few."""
    use(Made(FEW))  # what is made once, such as kernels, is made
    few, many = (peak(use, count) for count in (FEW, MANY))
    return many - few


def peak(use: Callable[[Images], object], count: int) -> int:
    """The highest resident memory while `use` runs, over what there was before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    use(Made(count))
    return resident("VmHWM") - before


def resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert found
    return int(found[1]) * 1024


def bare() -> nn.Module:
    """A network without BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1800, 10)
    )
