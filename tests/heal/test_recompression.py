"""The face of the library: one call, every family, and refusals before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import heal
from heal import cost, masking
from heal.allocators.global_variance import GlobalVariance
from heal.errors import ArchitectureError, InputError, MethodError, WeightsError
from heal.families.family import HIDDEN
from heal.families.lookup import describe
from heal.healers.starfish import Starfish
from heal.surgery import widths
from heal.values import ChannelCut, Mask
from tests.heal import nets

WITH_PAIRS = ["vit", "deit", "swin", "swinv2", "convnext"]
QUICK = Starfish(epochs=1, batch_size=4)


@pytest.mark.parametrize("name", WITH_PAIRS)
def test_half_of_the_neurons_go_and_the_model_is_smaller(name: str) -> None:
    model, images = nets.build(name), nets.images(8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = heal.recompress(model, images, heal.Budget(neurons=0.5), healers=["closed_form", QUICK])
    pairs = [pair.producer for pair in describe(model).pairs]
    dense, cut = widths(model), widths(result.model)
    total = sum(dense[pair] for pair in pairs)
    assert sum(cut[pair] for pair in pairs) == int(0.5 * total + 0.5)
    assert cost.parameters(result.model) < cost.parameters(model)
    assert isinstance(result.pruned, ChannelCut)
    assert len(result.report.cuts) == len(pairs)
    assert [report.method for report in result.report.healing] == ["closed_form", "starfish"]
    assert not result.model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", list(nets.NETS))
def test_three_quarters_of_the_weights_go_in_every_family(name: str) -> None:
    model, images = nets.build(name), nets.images(8)
    result = heal.recompress(model, images, heal.Budget(weights=0.75), "uniform", "magnitude", [QUICK])
    assert isinstance(result.pruned, Mask)
    assert result.pruned.zeros == result.pruned.total - int(0.25 * result.pruned.total + 0.5)
    assert masking.holds(result.model, result.pruned)


def test_batches_do_as_well_as_a_tensor() -> None:
    model, images = nets.build("vit"), nets.images(8)
    batches = list(images.split(4))
    result = heal.recompress(model, batches, heal.Budget(neurons=0.25), healers=["closed_form", QUICK])
    assert cost.parameters(result.model) < cost.parameters(model)


def test_nothing_pruned_and_nothing_healed_is_the_dense_model() -> None:
    model, images = nets.build("resnet"), nets.images(2)
    result = heal.recompress(model, images, heal.Budget(weights=0.0), "uniform", "none", ["none"])
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), model.parameters(), strict=True))


def test_an_unknown_method_names_its_neighbour() -> None:
    with pytest.raises(MethodError, match="did you mean 'variance'"):
        heal.recompress(nets.build("vit"), nets.images(), heal.Budget(neurons=0.5), pruner="varience")


@pytest.mark.parametrize(
    ("budget", "allocator", "pruner", "healers", "reason"),
    [
        (heal.Budget(weights=0.5), "global_variance", "magnitude", [], "allocator global_variance works on neurons"),
        (heal.Budget(neurons=0.5), "global_variance", "magnitude", [], "pruner magnitude works on weights"),
        (heal.Budget(weights=0.5), "uniform", "magnitude", ["closed_form"], "healer closed_form works on neurons"),
        (heal.Budget(neurons=0.5), "global_variance", "none", ["starfish"], "leaves nothing to heal"),
        (heal.Budget(neurons=0.5), "global_variance", "variance", ["starfish", "closed_form"], "put it first"),
        (
            heal.Budget(weights=0.5),
            "uniform",
            "magnitude",
            ["variance_matching", "bias_correction"],
            "bias_correction stands on the dense running statistics, which variance_matching rewrote",
        ),
    ],
)
def test_a_combination_that_makes_no_sense_is_refused(
    budget: heal.Budget, allocator: str, pruner: str, healers: list[str], reason: str
) -> None:
    with pytest.raises(MethodError, match=reason):
        heal.recompress(nets.build("vit"), nets.images(), budget, allocator, pruner, healers)


@pytest.mark.parametrize("first", ["layerwise", "adaprune", "signal_resuscitation"])
def test_a_mean_that_a_batch_norm_makes_up_for_is_not_made_up_for_again(first: str) -> None:
    budget, healers = heal.Budget(weights=0.5), [first, "bias_correction"]
    with pytest.raises(MethodError, match=f"which {first} rewrote; put it before"):
        heal.recompress(nets.build("resnet"), nets.images(), budget, "uniform", "magnitude", healers)


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "vgg", "mobilenetv2", "mobilenetv3", "efficientnet"])
def test_a_convolutional_network_loses_inner_channels_and_is_repaired(name: str) -> None:
    model, images, evenly = nets.build(name), nets.images(16, size=64), GlobalVariance(scope="layer")
    folded, solved = (
        heal.recompress(model, images, heal.Budget(neurons=0.4), evenly, healers=healers).model
        for healers in ((), ("closed_form",))
    )
    groups = describe(model).groups_of(HIDDEN)
    before, after = (sum(widths(net)[name] for name in groups) for net in (model, folded))
    assert after == int(0.6 * before + 0.5)
    with torch.no_grad():
        dense, worse, better = (net(images) for net in (model, folded, solved))
    assert (better - dense).norm() < (worse - dense).norm()


def test_a_network_that_nobody_knows_is_masked_but_not_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10)).eval()
    result = heal.recompress(model, nets.images(), heal.Budget(weights=0.5), "uniform", "magnitude", ["none"])
    assert isinstance(result.pruned, Mask)
    with pytest.raises(ArchitectureError, match="weights"):
        heal.recompress(model, nets.images(), heal.Budget(neurons=0.5), healers=["closed_form"])
    with pytest.raises(ArchitectureError, match="names no blocks"):
        heal.recompress(model, nets.images(), heal.Budget(weights=0.5), "uniform", "magnitude", ["starfish"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"budget": 0.5}, r"budget 0\.5 has no unit; write heal\.Budget"),
        ({"healers": "starfish"}, r"write \['starfish'\]"),
        ({"images": []}, "images: there are none"),
        ({"images": torch.zeros(4, 3, 20, 20)}, r"VisionTransformer cannot answer \[n, 3, 20, 20\]"),
        ({"images": torch.zeros(4, 3, 32)}, r"expected a non-empty \[n, channels, height, width\]"),
    ],
)
def test_what_is_given_wrongly_is_named_before_anything_is_computed(wrong: dict[str, Any], said: str) -> None:
    given = {"images": nets.images(4), "budget": heal.Budget(neurons=0.5)} | wrong
    with pytest.raises(InputError, match=said):
        heal.recompress(nets.build("vit"), **given)


def test_the_face_lists_what_it_offers() -> None:
    assert [name for name in dir(heal) if getattr(heal, name, None) is None] == []
    assert {"recompress", "save", "load", "Budget"} <= set(dir(heal))


def test_what_needs_no_images_asks_for_none() -> None:
    result = heal.recompress(nets.build("resnet"), [], heal.Budget(weights=0.5), "uniform", "magnitude", [])
    assert isinstance(result.pruned, Mask)


def test_broken_weights_are_named() -> None:
    model = nets.build("vit")
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[0, 0] = torch.nan
    with pytest.raises(WeightsError, match=r"blocks\.1\.mlp\.fc1\.weight"):
        heal.recompress(model, nets.images(), heal.Budget(neurons=0.5))
