"""A GPU gives what the CPU gives: every entry on four families, where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import heal
from heal.allocators import ALLOCATORS
from heal.errors import BudgetError, InputError
from heal.evaluation import predict
from heal.healers import HEALERS
from heal.method import AllocationContext, Allocator, Healer, Pruner, check, taps
from heal.pruners import PRUNERS
from heal.recompression import Result
from heal.statistics import capture
from heal.values import Allocation, Budget, ChannelCut, Mask
from tests.heal import nets
from tests.heal.entries import BUDGETS, combinations, quick, small

FAMILIES = ("vit", "convnext", "resnet", "mobilenetv2")
IMAGES = nets.images(8)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Iterator[None]:
    """By default they are rounded to ten bits, and differ from the CPU's more than by a mistake."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("name", HEALERS)
@pytest.mark.parametrize("net", FAMILIES)
def test_recompressing_gives_what_it_gives_on_the_cpu(net: str, name: str) -> None:
    tried = list(combinations(nets.build(net), name))
    if not tried:
        pytest.skip(f"{name} is for no budget of {net}")
    for methods in tried:
        bare = recompressed(net, "cpu", *methods, HEALERS["none"]())
        expected, found = (
            recompressed(net, device, *methods, quick(name, precision="float32")) for device in ("cpu", "cuda")
        )
        assert {tensor.device.type for tensor in found.model.state_dict().values()} == {"cuda"}
        assert found.report.allocation.kept == expected.report.allocation.kept
        assert share_alike(found.pruned, expected.pruned) > 0.99, "rounding decides between equals alone"
        healed = distance(bare.model, expected.model)
        assert distance(found.model, expected.model) < 1e-3 + 0.3 * healed
        if isinstance(found.pruned, Mask):
            for layer, keep in found.pruned.keep.items():
                assert not found.model.get_submodule(layer).get_parameter("weight")[~keep.cuda()].any()


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("net", FAMILIES)
def test_an_allocation_is_the_one_of_the_cpu(net: str, name: str) -> None:
    tried = 0
    for budget in (Budget(weights=0.5),) if name == "n_of_m" else BUDGETS:
        try:
            check(nets.build(net), budget, small(name), PRUNERS["none"](), [])
            expected = allocated(net, "cpu", budget, small(name))
        except (InputError, BudgetError):
            continue
        tried += 1
        found = allocated(net, "cuda", budget, small(name))
        assert found.got == expected.got
        moved = sum(abs(found.kept[layer] - kept) for layer, kept in expected.kept.items())
        assert moved <= 0.02 * expected.got, "rounding decides between equals alone"
    if not tried:
        pytest.skip(f"{name} is for no budget of {net}")


def recompressed(net: str, device: str, budget: Budget, allocator: Allocator, pruner: Pruner, healer: Healer) -> Result:
    return heal.recompress(nets.build(net).to(device), IMAGES, budget, allocator, pruner, [healer])


def allocated(net: str, device: str, budget: Budget, allocator: Allocator) -> Allocation:
    model = nets.build(net).to(device)
    statistics = capture(model, IMAGES, taps(model, [allocator]))
    return allocator.allocate(model, budget, AllocationContext(statistics=statistics, images=IMAGES))


def share_alike(one: Mask | ChannelCut, other: Mask | ChannelCut) -> float:
    """Of the weights or channels that both keep, those that are the same."""
    if isinstance(one, Mask) and isinstance(other, Mask):
        both = [int((one.keep[layer] & keep).sum()) for layer, keep in other.keep.items()]
        all_of = [int(keep.sum()) for keep in other.keep.values()]
    else:
        both = [int((one.keep[layer].unsqueeze(-1) == keep.unsqueeze(-2)).sum()) for layer, keep in other.keep.items()]
        all_of = [keep.numel() for keep in other.keep.values()]
    return sum(both) / sum(all_of) if all_of else 1.0


def distance(one: nn.Module, other: nn.Module) -> float:
    """Of the logits, relative to their size."""
    found, expected = predict(one, IMAGES, 8), predict(other, IMAGES, 8)
    return float((found - expected).norm() / expected.norm())
