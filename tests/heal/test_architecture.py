"""Recipes of networks: derived, verified, built, and never a way to read or run anything."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heal import architecture, surgery
from heal.architecture import Architecture, Changes, changes, of
from heal.compat import timm
from heal.errors import ArchitectureError
from tests.heal.nets import NETS, build

TIMM_NETS = [name for name in NETS if name != "vgg"]  # made by class there, so timm does not name it


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", TIMM_NETS)
def test_a_timm_model_tells_its_own_recipe(name: str) -> None:
    model = build(name)
    rebuilt = of(model).build()
    assert type(rebuilt) is type(model) and shapes(rebuilt) == shapes(model) and not rebuilt.training
    assert of(rebuilt) == of(model)


@pytest.mark.parametrize("name", TIMM_NETS)
def test_cuts_do_not_count_as_another_architecture(name: str) -> None:
    model = build(name)
    recipe, full = of(model), surgery.widths(model)
    surgery.shrink(model, {group: max(1, width // 2) for group, width in full.items()})
    assert of(model) == recipe
    found = changes(recipe, model)
    assert found.channels == {group: max(1, width // 2) for group, width in full.items() if width > 1}
    rebuilt = recipe.build()
    found.apply(rebuilt)
    assert shapes(rebuilt) == shapes(model)


def test_a_bias_that_pruning_added_is_a_change() -> None:
    model = build("resnet")
    layer = model.get_submodule("layer1.0.conv2")
    assert isinstance(layer, nn.Conv2d)
    layer.bias = nn.Parameter(torch.ones(len(layer.weight)))
    assert changes(of(model), model) == Changes({}, ("layer1.0.conv2",))
    for wrong in ("layer1.0.conv2.nothing", "fc", "layer1"):
        with pytest.raises(ArchitectureError, match="cannot be given one"):
            Changes({}, (wrong,)).apply(build("resnet"))


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any], object]]] = {
    "dropout": ("vit_tiny_patch16_224", {"drop_path_rate": 0.1, "drop_rate": 0.2}, lambda model: None),
    "pooling": ("vit_tiny_patch16_224", {"global_pool": "avg"}, lambda model: None),
    "channels": ("resnet18", {"in_chans": 1}, lambda model: None),
    "classes": ("resnet18", {}, lambda model: model.reset_classifier(5)),
    "size": ("vit_tiny_patch16_224", {}, lambda model: model.set_input_size((64, 96))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_recorded", [True, False])
def test_settings_are_read_off_the_model(case: str, is_recorded: bool) -> None:
    name, kwargs, change = CASES[case]
    model = timm.create_model(name, **kwargs)
    change(model)
    if not is_recorded:  # an older timm, or a model that was unpickled
        del model._model_args
    assert shapes(of(model).build()) == shapes(model)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "heads": (
        lambda model: setattr(model.blocks[0].attn, "num_heads", 2),
        r"proj.weight is \[32, 32\]",
    ),
    "block": (lambda model: setattr(model, "blocks", model.blocks[:2]), "absent"),
    "width": (lambda model: setattr(model.blocks[0].mlp, "fc1", nn.Linear(32, 200)), r"\[200\], not \[128\]"),
    "activation": (lambda model: setattr(model.blocks[0].mlp, "act", nn.ReLU()), "is a ReLU, not a GELU"),
    "extra": (lambda model: model.add_module("more", nn.ReLU()), "only in the model"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_its_recipe_does_not_build_is_refused(change: str) -> None:
    model = build("vit")
    alter, message = CHANGES[change]
    alter(model)
    with pytest.raises(ArchitectureError, match=message):
        of(model)


def test_a_network_of_the_users_own_must_come_with_a_recipe() -> None:
    with pytest.raises(ArchitectureError, match=r"pass architecture=heal\.Architecture"):
        of(nn.Sequential(nn.Linear(2, 2)))


def test_an_unknown_name_gets_its_nearest() -> None:
    with pytest.raises(ArchitectureError, match="did you mean 'resnet18'"):
        Architecture("timm", "resnett18").build()
    with pytest.raises(ArchitectureError, match="cannot build 'resnet18'"):
        Architecture("timm", "resnet18", {"no_such_kwarg": 1}).build()


@pytest.mark.parametrize("name", ["local-dir:/tmp", "hf-hub:some/model", "../resnet18", ""])
def test_a_name_cannot_point_anywhere(name: str) -> None:
    with pytest.raises(ArchitectureError, match="timm has no model"):
        Architecture("timm", name).build()


@pytest.mark.parametrize("kwarg", ["pretrained", "checkpoint_path", "pretrained_cfg_overlay", "cache_dir"])
def test_kwargs_cannot_read_or_fetch(kwarg: str) -> None:
    with pytest.raises(ArchitectureError, match=kwarg):
        Architecture("timm", "resnet18", {kwarg: "/etc/passwd"})


@pytest.mark.parametrize(
    ("source", "name", "kwargs"),
    [("hub", "x", {}), ("adapter", "os.system", {}), ("adapter", "a b:c", {}), ("timm", "resnet18", {"act": nn.ReLU})],
)
def test_a_malformed_recipe_is_refused(source: str, name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError):
        Architecture(source, name, kwargs)


def test_recipes_are_equal_as_they_come_back_from_json() -> None:
    given = Architecture("timm", "swin_tiny_patch4_window7_224", {"depths": (2, 2)})
    assert given == Architecture(**given.description()) and given.kwargs == {"depths": [2, 2]}


def test_building_moves_no_random_state() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Architecture("timm", "resnet18").build()
    assert torch.equal(torch.rand(2), expected)


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that leaves a trace when it is imported."""
    code = (
        "from pathlib import Path\nimport torch\nPath(__file__).with_name('imported').touch()\n"
        "def net(width=4):\n    return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 2))\n"
        "def number():\n    return 3\n"
    )
    (tmp_path / "own_nets.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_nets", raising=False)
    return "own_nets:net"


@pytest.mark.parametrize("allowed", [(), ("own_nets:number",), "xown_nets:nets"])
def test_an_adapter_is_not_imported_unless_it_is_listed(adapter: str, allowed: Any, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="pass allow_adapters"):
        Architecture("adapter", adapter).build(allowed)
    assert not (tmp_path / "imported").exists()


def test_a_listed_adapter_builds_and_is_remembered(adapter: str) -> None:
    recipe = Architecture("adapter", adapter, {"width": 6})
    model = recipe.build([adapter])
    assert shapes(model)["0.weight"] == [6, 3] and not model.training
    assert architecture.of(copy.deepcopy(model)) == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_nets:number", "returned a int"),
        ("own_nets:absent", "cannot be imported"),
        ("no_such_package:net", "cannot be imported"),
    ],
)
def test_a_broken_adapter_is_named(adapter: str, name: str, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        Architecture("adapter", name).build([name])
