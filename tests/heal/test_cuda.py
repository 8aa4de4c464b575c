"""A GPU gives what the CPU gives: every entry on four families, where there is a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import heal
from heal.allocators import ALLOCATORS
from heal.errors import BudgetError, InputError
from heal.evaluation import predict
from heal.healers import HEALERS
from heal.method import AllocationContext, Allocator, Healer, check, taps
from heal.pruners import PRUNERS
from heal.statistics import capture
from heal.values import Allocation, Budget, Mask
from tests.heal import nets
from tests.heal.entries import BUDGETS, quick, small, that_make_sense

FAMILIES = ("vit", "convnext", "resnet", "mobilenetv2")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rounded to ten bits, as convolutions are by default, a GPU differs from the CPU more than a mistake might."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("healer", HEALERS)
@pytest.mark.parametrize("net", FAMILIES)
def test_recompressing_gives_what_it_gives_on_the_cpu(net: str, healer: str) -> None:
    images = nets.images(8)
    for budget, allocator, pruner in that_make_sense(nets.build(net), healer):
        expected, found = (
            heal.recompress(nets.build(net).to(device), images, budget, allocator, pruner, [exact(healer)])
            for device in ("cpu", "cuda")
        )
        assert {tensor.device.type for tensor in found.model.state_dict().values()} == {"cuda"}
        assert found.report.allocation.kept == expected.report.allocation.kept
        assert apart(found.model, expected.model, images) < 0.05
        if isinstance(found.pruned, Mask):
            for layer, keep in found.pruned.keep.items():
                assert not found.model.get_submodule(layer).get_parameter("weight")[~keep.cuda()].any()


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("net", FAMILIES)
def test_an_allocation_is_the_one_of_the_cpu(net: str, allocator: str) -> None:
    budgets = (Budget(weights=0.5),) if allocator == "n_of_m" else BUDGETS
    for budget in budgets:
        try:
            check(nets.build(net), budget, small(allocator), PRUNERS["none"](), [])
            expected, found = (allocated(net, device, budget, small(allocator)) for device in ("cpu", "cuda"))
        except (InputError, BudgetError):
            continue
        assert found.got == expected.got
        moved = sum(abs(found.kept[layer] - kept) for layer, kept in expected.kept.items())
        assert moved <= 0.02 * expected.got, "rounding decides between equals alone"


def allocated(net: str, device: str, budget: Budget, allocator: Allocator) -> Allocation:
    model, images = nets.build(net).to(device), nets.images(8)
    statistics = capture(model, images, taps(model, [allocator]))
    return allocator.allocate(model, budget, AllocationContext(statistics=statistics, images=images))


def exact(name: str) -> Healer:
    """Quick, and in float32 where it trains."""
    healer = quick(name)
    fields = {field.name for field in dataclasses.fields(healer)} if dataclasses.is_dataclass(healer) else set()
    return dataclasses.replace(healer, precision="float32") if "precision" in fields else healer  # type: ignore[type-var]


def apart(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    """The distance of the logits relative to their size."""
    found, expected = predict(one, images, 8), predict(other, images, 8)
    return float((found - expected).norm() / expected.norm())
