"""What is taken where no method is named: it fits every network, and is what naming it by hand would be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import heal
from heal.allocators import ALLOCATORS
from heal.allocators.n_of_m import NOfM
from heal.errors import ArchitectureError, MethodError
from heal.healers import HEALERS
from heal.method import check, name_of
from heal.presets import Named, Preset, preset, removed_by_default, taken
from heal.pruners import PRUNERS
from tests.heal import nets

BUDGETS = {"neurons": heal.Budget(neurons=0.5), "weights": heal.Budget(weights=0.5)}
VGG = ("vgg", "blocks")  # nothing is added there, so nothing can be dropped
DEPTH = heal.Budget(blocks=0.3)


class Plain(nn.Module):
    """No blocks, no norms, channels that nothing says belong together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, nets.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.head(self.stem(x).relu().mean((2, 3)))
        return answers


@pytest.mark.parametrize(
    ("name", "removes", "pattern"),
    [
        *((name, removes, False) for name in nets.NETS for removes in ("neurons", "blocks") if (name, removes) != VGG),
        *((name, "weights", pattern) for name in [*nets.NETS, "plain"] for pattern in (False, True)),
    ],
)
def test_every_preset_makes_sense_on_every_network(name: str, removes: str, pattern: bool) -> None:
    model = Plain() if name == "plain" else nets.build(name)
    found = preset(model, removes, pattern)
    allocator = ALLOCATORS[found.allocator.name](**found.allocator.params)
    pruner = PRUNERS[found.pruner.name](**found.pruner.params)
    healers = [HEALERS[healer.name](**healer.params) for healer in found.healers]
    check(model, BUDGETS.get(removes, DEPTH), allocator, pruner, healers)
    assert {name_of(method) for method in (allocator, pruner, *healers)} <= taken()


@pytest.mark.parametrize(
    ("name", "removes", "names"),
    [
        ("vit", "neurons", ["global_variance", "variance", "closed_form", "starfish"]),
        ("vit", "weights", ["uniform", "obs", "starfish"]),
        ("resnet", "weights", ["lamp", "magnitude", "variance_matching", "starfish"]),
        ("convnext", "weights", ["lamp", "magnitude", "starfish"]),
    ],
)
def test_what_is_chosen_depends_on_the_network_and_on_what_goes(name: str, removes: str, names: list[str]) -> None:
    assert _names(preset(nets.build(name), removes)) == names


def test_a_network_without_blocks_is_not_aligned() -> None:
    assert _names(preset(Plain(), "weights")) == ["lamp", "magnitude", "least_squares"]


def test_macs_are_saved_by_cuts_where_there_is_anything_to_cut() -> None:
    budget = heal.Budget(macs=0.3)
    assert removed_by_default(nets.build("vit"), budget) == "neurons"
    assert removed_by_default(Plain(), budget) == "weights"


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_naming_nothing_is_naming_what_the_preset_names(budget: heal.Budget) -> None:
    model, images = nets.build("vit"), nets.images(8)
    said: list[str] = []
    chosen = heal.recompress(model, images, budget, log=said.append)
    found = preset(model, budget.unit)
    healers = [HEALERS[healer.name](**healer.params) for healer in found.healers]
    named = heal.recompress(model, images, budget, found.allocator.name, found.pruner.name, healers)
    assert f"auto: {found.why}" in said
    assert all(torch.equal(value, named.model.state_dict()[key]) for key, value in chosen.model.state_dict().items())


def test_what_is_named_stays_and_the_rest_follows_from_it() -> None:
    model, images = nets.build("vit"), nets.images(8)
    result = heal.recompress(model, images, heal.Budget(weights=0.5), allocator=NOfM("2:4"), healers=[])
    assert isinstance(result.pruned, heal.Mask) and result.pruned.pattern is not None
    assert result.pruned.updates  # of OBS, which the preset takes for patterns
    assert result.report.healing == ()


def test_auto_stands_alone_among_healers() -> None:
    with pytest.raises(MethodError, match="stands alone"):
        heal.recompress(nets.build("vit"), nets.images(2), BUDGETS["neurons"], healers=["auto", "starfish"])


def test_cuts_of_a_network_that_has_none_are_refused_as_ever() -> None:
    with pytest.raises(ArchitectureError, match="Plain"):
        heal.recompress(Plain(), nets.images(2), BUDGETS["neurons"])


def _names(found: Preset) -> list[str]:
    methods: tuple[Named, ...] = (found.allocator, found.pruner, *found.healers)
    return [method.name for method in methods]
