"""What is taken where no method is named: it fits every network, and is what naming it by hand would be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import heal
from heal.allocators import ALLOCATORS
from heal.allocators.global_variance import GlobalVariance
from heal.allocators.n_of_m import NOfM
from heal.compat import timm
from heal.errors import ArchitectureError, MethodError
from heal.healers import HEALERS
from heal.healers.unipts import Unipts
from heal.method import Allocator, Healer, Pruner, check, name_of
from heal.presets import Named, Preset, choose, taken
from heal.pruners import PRUNERS
from heal.pruners.magnitude import Magnitude
from heal.pruners.none import NoPruning
from tests.heal import nets

BUDGETS = {"neurons": heal.Budget(neurons=0.5), "weights": heal.Budget(weights=0.5), "blocks": heal.Budget(blocks=0.5)}
VGG = ("vgg", "blocks")  # nothing is added there, so nothing can be dropped


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
    found = choose(model, BUDGETS[removes], NOfM() if pattern else None)
    allocator, pruner, healers = _built(found)
    check(model, BUDGETS[removes], allocator, pruner, healers)
    assert {name_of(method) for method in (allocator, pruner, *healers)} <= taken()


@pytest.mark.parametrize(
    ("name", "removes", "names"),
    [
        ("vit", "neurons", ["global_variance", "variance", "closed_form", "starfish"]),
        ("vit", "weights", ["uniform", "obs", "starfish"]),
        ("resnet", "weights", ["lamp", "magnitude", "least_squares", "starfish"]),
        ("convnext", "weights", ["lamp", "magnitude", "starfish"]),
    ],
)
def test_what_is_chosen_depends_on_the_network_and_on_what_goes(name: str, removes: str, names: list[str]) -> None:
    assert _names(choose(nets.build(name), BUDGETS[removes])) == names


def test_a_network_without_blocks_is_not_aligned() -> None:
    assert _names(choose(Plain(), BUDGETS["weights"])) == ["lamp", "magnitude", "least_squares"]


def test_macs_are_saved_by_cuts_where_there_is_anything_to_cut() -> None:
    budget = heal.Budget(macs=0.3)
    assert _names(choose(nets.build("vit"), budget))[0] == "global_variance"
    assert _names(choose(Plain(), budget))[0] == "lamp"
    regnet = timm.create_model("regnetx_002", num_classes=4)  # only its residual stream, which goes if asked for
    assert _names(choose(regnet, budget))[0] == "lamp"
    assert _names(choose(nets.build("vit"), budget, pruner=Magnitude()))[0] == "uniform"
    assert _names(choose(nets.build("vit"), budget, healers=[Unipts()]))[1] == "obs"


def test_a_gentle_cut_of_a_transformer_is_solved_and_not_trained() -> None:
    few, more = heal.Budget(neurons=0.25), heal.Budget(neurons=0.26)
    assert _names(choose(nets.build("vit"), few))[2:] == ["closed_form"]
    assert _names(choose(nets.build("vit"), more))[2:] == ["closed_form", "starfish"]
    assert "starfish" in _names(choose(nets.build("resnet"), few))


def test_in_rounds_pruners_only_choose() -> None:
    weighted = {"statistic": "weighted"}
    assert choose(nets.build("vit"), BUDGETS["neurons"]).pruner == Named("variance", weighted)
    several = choose(nets.build("vit"), BUDGETS["neurons"], rounds=2).pruner
    assert several == Named("variance", weighted | {"fold_mean": False})
    assert choose(nets.build("vit"), BUDGETS["weights"], rounds=2).pruner == Named("magnitude")
    assert choose(nets.build("vit"), BUDGETS["weights"]).pruner == Named("obs")


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("kinds", [("qk",), ("v",), ("mlp", "qk", "v"), ("heads",)], ids=",".join)
def test_methods_suit_the_channels_that_a_named_allocator_cuts(kinds: tuple[str, ...], rounds: int) -> None:
    model, allocator = nets.build("vit"), GlobalVariance(kinds=kinds)
    found = choose(model, BUDGETS["neurons"], allocator, rounds=rounds)
    _, pruner, healers = _built(found)
    check(model, BUDGETS["neurons"], allocator, pruner, healers, rounds)


def test_healers_suit_what_the_named_allocator_cuts_and_a_pruner_that_leaves_all() -> None:
    def healers(*kinds: str, rounds: int = 1) -> list[str]:
        allocator = GlobalVariance(kinds=kinds)  # type: ignore[arg-type]
        return _names(choose(nets.build("vit"), BUDGETS["neurons"], allocator, rounds=rounds))[2:]

    assert healers("qk") == ["qk_compensation", "starfish"]
    assert healers("mlp", "qk", "v") == ["qk_compensation", "closed_form", "starfish"]
    assert healers("mlp", "qk", rounds=2) == ["closed_form", "starfish"]
    few = choose(nets.build("vit"), heal.Budget(neurons=0.2), GlobalVariance(kinds=("qk",)), rounds=2)
    assert _names(few)[2:] == ["starfish"]
    assert _names(choose(nets.build("vit"), BUDGETS["neurons"], pruner=NoPruning()))[2:] == ["none"]


@pytest.mark.parametrize("budget", list(BUDGETS.values()), ids=list(BUDGETS))
def test_naming_nothing_is_naming_what_the_preset_names(budget: heal.Budget) -> None:
    model, images = nets.build("vit"), nets.images(8)
    said: list[str] = []
    chosen = heal.recompress(model, images, budget, log=said.append)
    found = choose(model, budget)
    named = heal.recompress(model, images, budget, *_built(found))
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


@pytest.mark.parametrize("removes", ["neurons", "blocks"])
def test_what_a_network_does_not_have_is_refused_as_ever(removes: str) -> None:
    with pytest.raises(ArchitectureError, match="Plain"):
        heal.recompress(Plain(), nets.images(2), BUDGETS[removes])


def _built(found: Preset) -> tuple[Allocator, Pruner, list[Healer]]:
    healers = [HEALERS[healer.name](**healer.params) for healer in found.healers]
    allocator = ALLOCATORS[found.allocator.name](**found.allocator.params)
    return allocator, PRUNERS[found.pruner.name](**found.pruner.params), healers


def _names(found: Preset) -> list[str]:
    methods: tuple[Named, ...] = (found.allocator, found.pruner, *found.healers)
    return [method.name for method in methods]
