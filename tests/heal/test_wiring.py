"""Where a layer's output goes: which BatchNorm alone takes it, and what healers make of it where none does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from heal.healers.least_squares import LeastSquares
from heal.healers.repair import Repair
from heal.method import HealContext
from heal.values import Mask
from heal.wiring import trace
from tests.heal import nets

Forward = Callable[["Pair", Tensor], Tensor]


class Pair(nn.Module):
    """Two convolutions without bias, a norm for each, and a classifier; how they are wired is given."""

    def __init__(self, wired: Forward) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, bias=False), nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm, self.behind, self.head = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.wired = wired

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.wired(self, x).mean((2, 3)))
        return out


def straight(net: Pair, x: Tensor) -> Tensor:
    out: Tensor = net.behind(net.second(torch.relu(net.norm(net.first(x)))))
    return out


def measured_only(net: Pair, x: Tensor) -> Tensor:
    out = net.first(x)
    assert out.shape[1] == 6 and out.dim() == 4
    out = net.norm(nn.Identity()(out))
    result: Tensor = net.behind(net.second(torch.relu(out)))
    return result


def summed_in_place(net: Pair, x: Tensor) -> Tensor:
    """Pre-activation: the sum is the tensor that the layer gave."""
    carried = net.first(x)
    out = net.second(torch.relu(net.norm(carried)))
    out += carried
    result: Tensor = net.behind(out)
    return result


def rectified_in_place(net: Pair, x: Tensor) -> Tensor:
    out: Tensor = net.norm(torch.relu_(net.first(x)))
    return net.behind(net.second(out))  # type: ignore[no-any-return]


def written_into(net: Pair, x: Tensor) -> Tensor:
    out = net.first(x)
    out[:, :2] = 1.0
    result: Tensor = net.behind(net.second(net.norm(out)))
    return result


def read_beside(net: Pair, x: Tensor) -> Tensor:
    carried = net.first(x)
    out: Tensor = net.behind(net.second(net.norm(carried))) + avg_pool2d(carried, 1)
    return out


def one_norm_for_both(net: Pair, x: Tensor) -> Tensor:
    out: Tensor = net.norm(net.second(torch.relu(net.norm(net.first(x)))))
    return out


def two_norms_for_one(net: Pair, x: Tensor) -> Tensor:
    carried = net.first(x)
    out: Tensor = net.second(net.norm(carried)) + net.behind(carried)
    return out


def built(wired: Forward) -> Pair:
    model = Pair(wired)
    nets.randomise(model, 0)
    return model.eval()


@pytest.mark.parametrize(
    ("wired", "pairs"),
    [
        (straight, {"first": "norm", "second": "behind"}),
        (measured_only, {"first": "norm", "second": "behind"}),
        (summed_in_place, {}),
        (rectified_in_place, {"second": "behind"}),
        (written_into, {"second": "behind"}),
        (read_beside, {"second": "behind"}),
        (one_norm_for_both, {}),
        (two_norms_for_one, {}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_norm_belongs_to_a_layer_that_it_takes_alone(wired: Forward, pairs: dict[str, str]) -> None:
    assert trace(built(wired), ["first", "second"], nets.images(1)).norm_after == pairs


@pytest.mark.parametrize("wired", [straight, summed_in_place, rectified_in_place, read_beside, one_norm_for_both])
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_what_is_solved_is_what_the_layer_gives(wired: Forward, inputs: str) -> None:
    """The layer's output, as the norm takes it or by its bias, is the least-squares fit that numpy finds."""
    dense, images = built(wired), 1 + 3 * avg_pool2d(nets.images(20), 5, 1)
    student = copy.deepcopy(dense)
    keep = dense.first.weight.abs() > dense.first.weight.abs().median()
    with torch.no_grad():
        student.first.weight.mul_(keep)
    context = HealContext(pruned=Mask({"first": keep}))
    report = LeastSquares(inputs=inputs, damping=1e-9).heal(student, dense, images, context)  # type: ignore[arg-type]
    assert report.notes == ()
    fitted = images[torch.arange(20) % 10 != 0]
    with torch.no_grad():
        shifted = (dense.norm.running_mean - student.norm.running_mean).view(-1, 1, 1)
        ours = student.first(fitted) + shifted
        patches = torch.nn.functional.unfold(fitted, 3).transpose(1, 2).flatten(0, 1).double().numpy()
        wanted = dense.first(fitted).movedim(1, -1).flatten(0, -2).double().numpy()
    for channel in range(6):
        columns = np.column_stack([patches[:, keep[channel].flatten().numpy()], np.ones(len(patches))])
        solution = np.linalg.lstsq(columns, wanted[:, channel], rcond=None)[0]
        found = ours[:, channel].flatten().double().numpy()
        assert np.allclose(columns @ solution, found, atol=1e-3)
    if wired is not straight:
        assert torch.equal(student.norm.running_mean, dense.norm.running_mean)
        assert student.first.bias is not None


class Twice(nn.Module):
    """One layer runs twice, on inputs that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.relu(self.again(torch.relu(self.enter(x.flatten(1)))))
        out: Tensor = self.head(torch.relu(self.again(3 * once - 1)))
        return out


@pytest.fixture
def twice() -> Twice:
    model = Twice()
    nets.randomise(model, 0)
    return model.eval()


@pytest.fixture
def small() -> Tensor:
    return torch.randn(100, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def test_what_repair_measures_of_a_layer_are_all_its_calls(twice: Twice, small: Tensor) -> None:
    student = copy.deepcopy(twice)
    mask = Mask({name: torch.ones_like(twice.get_parameter(f"{name}.weight")).bool() for name in ("enter", "again")})
    Repair().heal(student, twice, small, HealContext(pruned=mask))
    torch.testing.assert_close(student(small), twice(small), rtol=1e-4, atol=1e-4)


def test_least_squares_leaves_what_runs_twice_or_solves_for_both(twice: Twice, small: Tensor) -> None:
    weight = twice.again.weight
    keep = weight.abs() > weight.abs().median()
    errors, notes = {}, {}
    for inputs in ("pruned", "dense"):
        student = copy.deepcopy(twice)
        with torch.no_grad():
            student.again.weight.mul_(keep)
        healer = LeastSquares(inputs=inputs)  # type: ignore[arg-type]
        notes[inputs] = healer.heal(student, twice, small, HealContext(pruned=Mask({"again": keep}))).notes
        with torch.no_grad():
            errors[inputs] = float((student(small) - twice(small)).square().mean())
    assert trace(twice, ["enter", "again"], small[:1]).repeated == {"again"}
    assert notes["dense"] == () and "again stays as it was: it runs several times" in notes["pruned"][0]
    assert errors["dense"] < errors["pruned"]
