"""AdaPrune and global reconstruction, against loops that are written out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import heal
from heal import masking
from heal.errors import MethodError
from heal.healers.adaprune import Adaprune, absorbed
from heal.healers.global_reconstruction import GlobalReconstruction
from heal.healers.layer_batches import Sampled, Site
from heal.images import generator, shuffled
from heal.method import HealContext
from heal.values import NM
from tests.heal import nets
from tests.heal.test_block_healers import remask
from tests.heal.test_training import masked


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 2, 2)])
def test_in_a_pattern_every_block_keeps_its_sum(shape: tuple[int, ...]) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pattern = NM(1, 4)
    keep = masking.keep_n_of_m(dense.abs(), pattern)
    found = absorbed(dense, dense * keep, keep, pattern)
    rows = [x.movedim(1, -1).reshape(-1, 4).numpy() for x in (dense, found)]
    assert np.allclose(rows[0].sum(1), rows[1].sum(1)) and not found[~keep].any()
    assert torch.allclose(absorbed(dense, found, keep, pattern), found), "nothing is missing any more"


def test_without_a_pattern_every_weight_takes_the_mean_of_what_went() -> None:
    dense = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = (dense + dense[~keep].mean()) * keep
    assert torch.allclose(absorbed(dense, dense * keep, keep, None), expected)
    assert torch.equal(absorbed(dense, dense, torch.ones_like(keep), None), dense), "nothing went"


@pytest.mark.parametrize("net", ["vit", "swin"])
def test_adaprune_is_the_codes_loop(net: str) -> None:
    dense, student, mask = masked(net, 0.5)
    images, layer = nets.images(12), list(mask.keep)[1]
    drawn, module = generator(4, f"adaprune batches of {layer}"), copy.deepcopy(dense.get_submodule(layer))
    keep = mask.keep[layer]
    with torch.no_grad():
        module.weight.add_(module.weight[~keep].mean()).mul_(keep)
    optimisers = [torch.optim.Adam([module.weight], lr=1e-3), torch.optim.Adam([module.bias], lr=1e-2)]
    for _ in range(6):
        entered, wanted = nets.passing(dense, layer, images[torch.randperm(10, generator=drawn)[:5]])
        nn.functional.mse_loss(module(entered), wanted).backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        with torch.no_grad():
            module.weight.mul_(keep)
    method = Adaprune(images=10, iterations=6, batch_size=5)
    report = method.heal(student, dense, images, HealContext(pruned=mask, seed=4))
    found = student.get_submodule(layer)
    assert torch.allclose(found.weight, module.weight, atol=1e-5) and torch.allclose(found.bias, module.bias, atol=1e-5)
    assert len(report.losses) == 6 and report.losses[0] == pytest.approx(1) and report.losses[-1] < 1
    assert masking.holds(student, mask)


@pytest.mark.parametrize(
    "layer", ["layers.0.blocks.1.attn.qkv", "layers.0.blocks.1.mlp.fc1", "layers.1.downsample.reduction"]
)
def test_images_are_drawn_alike_with_and_without_memory(layer: str) -> None:
    """Swin's attention sees several windows of each image as rows of their own."""
    dense, student, _ = masked("swin")
    images = nets.images(7)
    numbers = [torch.tensor([3, 0]), torch.tensor([6, 2])]
    site = Site(layer, student, dense, "dense")
    cached, again = (list(Sampled(site, images, numbers, room, together=3).starting_at(1)) for room in (2**30, 0))
    assert len(cached) == len(again) == 1
    for one, other in zip(cached[0], again[0], strict=True):
        assert one.shape == other.shape and torch.allclose(one, other, atol=1e-5)


def test_a_layers_shift_is_trained_in_its_batch_norm() -> None:
    dense, student, mask = masked("resnet")
    images = nets.images(16)
    plain, before = copy.deepcopy(student), copy.deepcopy(student.state_dict())
    Adaprune(iterations=60).heal(student, dense, images, HealContext(pruned=mask))
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert {"layer1.0.conv1.weight", "layer1.0.bn1.running_mean"} <= moved and "layer1.0.bn1.weight" not in moved
    wanted = dense(images)
    assert (student(images) - wanted).norm() < 0.7 * (plain(images) - wanted).norm()


def test_adaprune_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    dense, student, mask = masked("vit")
    images, again, method = nets.images(8), copy.deepcopy(student), Adaprune(iterations=4)

    def report(stage: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    method.heal(student, dense, images, HealContext(pruned=mask))
    broken = copy.deepcopy(again)
    with pytest.raises(KeyboardInterrupt):
        method.heal(broken, dense, images, HealContext(pruned=mask, checkpoints=tmp_path, report=report))
    assert len(list(tmp_path.glob("adaprune-*.safetensors"))) == 3
    method.heal(again, dense, images, HealContext(pruned=mask, checkpoints=tmp_path))
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("net", ["vit", "vgg"])
def test_global_reconstruction_is_the_published_loop(net: str) -> None:
    """VGG's activations work in place, on what the layers answered."""
    dense, student, mask = masked(net, 0.5)
    images, expected = nets.images(6), copy.deepcopy(student)
    layers = [name for name, module in dense.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    optimiser = torch.optim.Adam(expected.parameters(), lr=1e-3)
    losses = []
    for epoch in range(2):
        order = shuffled(6, 5, f"global_reconstruction order {epoch}")
        for at in (0, 4):
            wanted, found = ({}, {})  # type: ignore[var-annotated]
            for model, outputs in ((dense, wanted), (expected, found)):
                handles = [
                    model.get_submodule(name).register_forward_hook(
                        lambda m, args, output, name=name, outputs=outputs: outputs.__setitem__(name, output.clone())
                    )
                    for name in layers
                ]
                model(images[order[at : at + 4]])
                for handle in handles:
                    handle.remove()
            loss = torch.stack(
                [(found[n] - wanted[n].detach()).square().sum() / wanted[n].detach().norm() ** 2 for n in layers]
            ).sum()
            losses.append(float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            remask(expected, mask)
    method = GlobalReconstruction(epochs=2, batch_size=4, lr=1e-3)
    report = method.heal(student, dense, images, HealContext(pruned=mask, seed=5))
    assert np.allclose(report.losses, losses, rtol=1e-3) and masking.holds(student, mask)
    for (name, value), other in zip(expected.state_dict().items(), student.state_dict().values(), strict=True):
        assert torch.allclose(value, other, atol=1e-4), name


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Adaprune(iterations=0), r"adaprune\.iterations = 0 must be at least 1"),
        (lambda: Adaprune(bias_lr=0), r"adaprune\.bias_lr = 0 must be greater than 0"),
        (lambda: GlobalReconstruction(epochs=0), r"global_reconstruction\.epochs = 0 must be at least 1"),
        (lambda: GlobalReconstruction(lr=-1), r"global_reconstruction\.lr = -1 must be greater than 0"),
    ],
)
def test_wrong_params_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        make()


def test_adaprune_moves_what_bias_correction_stands_on() -> None:
    with pytest.raises(MethodError, match="which adaprune rewrote"):
        healers = ["adaprune", "bias_correction"]
        heal.recompress(nets.build("resnet"), nets.images(), heal.Budget(weights=0.5), "uniform", "magnitude", healers)
