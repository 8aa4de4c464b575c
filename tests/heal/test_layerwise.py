"""Layer-wise tuning: against POT's own loop and against least squares, layer by layer, and after a kill."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heal import checkpoint, masking
from heal.errors import MethodError
from heal.families.discovery import batch_norms
from heal.healers.bias_correction import BiasCorrection
from heal.healers.layer_batches import Drawn, Site, numbered
from heal.healers.layerwise import Layerwise, loosened, mean_relative
from heal.healers.tuning_budgets import Openvino
from heal.images import generator
from heal.method import HealContext
from heal.training import Step
from heal.values import Mask
from heal.wiring import trace
from tests.heal import nets
from tests.heal.test_training import masked

FAST = {"lr": 1e-3, "bias_lr": 1e-2}
SHORT = Layerwise(iterations=2, steps=8, lr=1e-3, bias_lr=1e-2)
MSBENCH = Layerwise(budget="msbench", steps=20, lr=1e-3, bias_lr=1e-2)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def _squared_error(student: nn.Module, dense: nn.Module, layer: str, images: Tensor) -> float:
    """Of the layer's answer to dense inputs, with what its BatchNorm's running mean adds."""
    entered, wanted = nets.passing(dense, layer, images)
    with torch.no_grad():
        answer = student.get_submodule(layer)(entered)
    norm = trace(dense, [layer], images[:1]).norm_after.get(layer)
    if norm is not None and student.get_submodule(layer).bias is None:
        moved = dense.get_submodule(norm).running_mean - student.get_submodule(norm).running_mean  # type: ignore[operator]
        answer = answer + moved.view(1, -1, 1, 1)
    return float((answer - wanted).square().mean())


# POT's loop


def _pot(dense: nn.Module, mask: Mask, pool: Tensor, layer: str, iterations: int, steps: int, seed: int) -> nn.Module:
    """OpenVINO's fine-tuning of one layer with a bias: its zero gradients, its memory of the last loss."""
    module = copy.deepcopy(dense.get_submodule(layer))
    w, loose = module.get_parameter("weight"), loosened(dense, mask, 0.1)
    for level, keep in enumerate((loose.keep[layer], mask.keep[layer])):
        w.data *= keep
        bias = module.get_parameter("bias")
        optimiser = torch.optim.Adam([{"params": [w], "lr": 1e-3}, {"params": [bias], "lr": 1e-2}], foreach=False)
        last = 0.0
        for iteration in range(iterations):
            drawn = generator(seed, f"layerwise batch {level * iterations + iteration}")
            entered, wanted = nets.passing(dense, layer, pool[torch.randperm(len(pool), generator=drawn)[:50]])
            for step in range(steps):
                loss = nn.functional.mse_loss(module(entered), wanted)
                initial = loss.item() + 1e-8 if step == 0 else initial  # noqa: F821
                relative = loss.item() / initial
                w.grad, bias.grad = torch.zeros_like(w), torch.zeros_like(bias)
                if relative >= last:
                    loss.backward()  # type: ignore[no-untyped-call]
                    w.grad *= keep
                optimiser.step()
                last = relative
            w.data *= keep
    return module


@pytest.mark.parametrize("layer", ["blocks.0.attn.qkv", "blocks.2.mlp.fc2"])
def test_openvinos_budget_is_pots_loop(layer: str) -> None:
    dense, student, mask = masked("vit")
    images = nets.images(60)
    Layerwise(iterations=3, steps=6, **FAST).heal(student, dense, images, HealContext(pruned=mask, seed=5))
    expected = _pot(dense, mask, images, layer, 3, 6, seed=5)
    found = student.get_submodule(layer)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.bias, expected.bias, rtol=1e-5, atol=1e-6)


def test_a_gradient_is_computed_only_where_the_relative_error_did_not_fall() -> None:
    budget = Openvino(nets.images(4), 0, iterations=2, steps=3)
    losses = [4.0, 3.0, 3.0, 8.0, 9.0, 7.0]
    relative = [4 / 4, 3 / 4, 3 / 4, 8 / 8, 9 / 8, 7 / 8]
    for number, loss in enumerate(losses):
        step = Step(number, number // 3, number % 3, losses[:number])
        fell = number > 0 and relative[number] < relative[number - 1]
        assert budget.coasts(step, torch.tensor(loss)) == fell


def test_at_the_lower_sparsity_the_weights_of_highest_normalised_magnitude_return() -> None:
    dense, _, mask = masked("resnet")
    loose = loosened(dense, mask, 0.1)
    ranked = []
    for number, (layer, keep) in enumerate(mask.keep.items()):
        weight = dense.get_parameter(f"{layer}.weight").detach()
        scores = (weight.abs() / weight.norm()).flatten().tolist()
        kept = keep.flatten().tolist()
        ranked += [(-score, number, index) for index, score in enumerate(scores) if not kept[index]]
    returned = set(sorted(ranked)[: math.floor(0.1 * mask.total + 0.5)])
    for number, layer in enumerate(mask.keep):
        expected = mask.keep[layer].flatten().clone()
        expected[[index for _, owner, index in returned if owner == number]] = True
        assert torch.equal(loose.keep[layer].flatten(), expected)
    assert loosened(dense, mask, 1.0).zeros == 0 and loosened(dense, mask, 0.0).zeros == mask.zeros


# What tuning reaches


def test_a_layer_tuned_to_its_end_is_least_squares_on_its_own_weights() -> None:
    dense, student, mask = masked("vit")
    images, layer = nets.images(24), "blocks.1.attn.proj"
    alone = Mask({layer: mask.keep[layer]})
    tuned, _, _ = masked("vit")
    tuned.get_submodule(layer).load_state_dict(student.get_submodule(layer).state_dict())
    Layerwise(budget="msbench", steps=1500, lr=5e-3, bias_lr=5e-3).heal(tuned, dense, images, HealContext(pruned=alone))
    entered, wanted = (x.flatten(0, -2).double().numpy() for x in nets.passing(dense, layer, images))
    best = 0.0
    for row, keep in enumerate(alone.keep[layer].numpy()):
        design = np.hstack([entered[:, keep], np.ones((len(entered), 1))])
        solution = np.linalg.lstsq(design, wanted[:, row], rcond=None)[0]
        best += float(np.square(design @ solution - wanted[:, row]).mean()) / wanted.shape[1]
    begun, found = _squared_error(student, dense, layer, images), _squared_error(tuned, dense, layer, images)
    assert best <= found * (1 + 1e-6) and found < best + 0.01 * (begun - best)


@pytest.mark.parametrize("method", [SHORT, MSBENCH], ids=["openvino", "msbench"])
@pytest.mark.parametrize("name", ["vit", "swin", "convnext", "resnet", "bottleneck"])
def test_every_layers_error_falls_and_nothing_else_changes(name: str, method: Layerwise) -> None:
    dense, student, mask = masked(name)
    images, before, teacher = nets.images(16), _state(student), _state(dense)
    untuned = copy.deepcopy(student)
    report = method.heal(student, dense, images, HealContext(pruned=mask))
    wiring = trace(dense, mask.keep, images[:1])
    shifted = {norm for layer, norm in wiring.norm_after.items() if dense.get_submodule(layer).bias is None}
    may = {f"{layer}.{leaf}" for layer in mask.keep for leaf in ("weight", "bias")}
    may |= {f"{norm}.running_mean" for norm in shifted}
    assert {key for key, tensor in student.state_dict().items() if not torch.equal(tensor, before[key])} <= may
    assert all(torch.equal(tensor, teacher[key]) for key, tensor in dense.state_dict().items())
    assert masking.holds(student, mask) and not any(p.grad is not None for p in student.parameters())
    assert not any(
        m.training or m._forward_hooks or m._forward_pre_hooks for m in (*dense.modules(), *student.modules())
    )
    errors = [[_squared_error(model, dense, layer, images) for model in (untuned, student)] for layer in wiring.order]
    assert all(after < begun for begun, after in errors if begun > 1e-6)
    assert len(report.losses) == (32 if method is SHORT else 20) and report.losses[-1] < report.losses[0]


def test_what_bias_correction_shifted_is_where_the_shift_begins() -> None:
    dense, student, mask = masked("resnet")
    images = nets.images(16)
    BiasCorrection().heal(student, dense, images, HealContext(pruned=mask))
    corrected = copy.deepcopy(student)
    Layerwise(budget="msbench", steps=1, lr=1e-12, bias_lr=1e-12).heal(student, dense, images, HealContext(pruned=mask))
    for name, norm in batch_norms(corrected).items():
        torch.testing.assert_close(student.get_submodule(name).running_mean, norm.running_mean, rtol=1e-6, atol=1e-6)


def test_pruned_inputs_are_those_of_the_student_with_earlier_layers_tuned() -> None:
    dense, student, mask = masked("vit")
    images = nets.images(8)
    Layerwise(budget="msbench", inputs="pruned", steps=4, **FAST).heal(student, dense, images, HealContext(pruned=mask))
    _, reference, _ = masked("vit")
    for layer in trace(dense, mask.keep, images[:1]).order:
        (entered, _), (_, wanted) = nets.passing(reference, layer, images), nets.passing(dense, layer, images)
        module, keep = reference.get_submodule(layer), mask.keep[layer]
        w, bias = module.get_parameter("weight"), module.get_parameter("bias")
        optimiser = torch.optim.Adam([{"params": [w], "lr": 1e-3}, {"params": [bias], "lr": 1e-2}], foreach=False)
        for _ in range(4):
            optimiser.zero_grad()
            (module(entered) - wanted).square().sum(-1).mean().backward()  # type: ignore[no-untyped-call]
            assert w.grad is not None
            w.grad *= keep
            optimiser.step()
            w.data *= keep
    for a, b in zip(student.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Msbench's budget


def test_msbench_ends_a_layer_whose_error_is_small_enough() -> None:
    dense, _, mask = masked("vit")
    whole = Mask({layer: torch.ones_like(keep) for layer, keep in mask.keep.items()})
    student = copy.deepcopy(dense)
    report = MSBENCH.heal(student, dense, nets.images(4), HealContext(pruned=whole))
    assert len(report.losses) == 1 and report.losses[0] < 1e-3


@pytest.mark.parametrize("cache_bytes", [0, 40_000, 2**30])
def test_what_is_kept_in_memory_changes_no_bit(cache_bytes: int) -> None:
    dense, student, mask = masked("swin")
    _, reference, _ = masked("swin")
    images = nets.images(130)
    few = Layerwise(budget="msbench", steps=4, **FAST)
    few.heal(student, dense, images, HealContext(pruned=mask, cache_bytes=cache_bytes))
    few.heal(reference, dense, list(images.split(64)), HealContext(pruned=mask))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), reference.parameters(), strict=True))


def test_a_batch_is_run_once_while_there_is_memory_for_it() -> None:
    dense, student, _ = masked("vit")
    runs = []
    hook = dense.get_submodule("blocks.0").register_forward_pre_hook(lambda *_: runs.append(0))
    batches, numbers = numbered(nets.images(12), 4), [0, 1, 0, 1, 2, 0]
    site = Site("blocks.0.mlp.fc1", student, dense, "dense")
    pairs = list(Drawn(site, batches, numbers, 2**30).starting_at(0))
    assert len(runs) == 3 and torch.equal(pairs[0][0], pairs[2][0])
    assert len(list(Drawn(site, batches, numbers, 0).starting_at(2))) == 4 and len(runs) == 7
    hook.remove()


def test_losses_are_relative_to_each_layers_first() -> None:
    assert mean_relative([[4.0, 2.0, 1.0], [10.0, 5.0]]) == pytest.approx((1.0, 0.5, 0.375))
    assert mean_relative([]) == ()


# Resume and refusals


@pytest.mark.parametrize("method", [SHORT, MSBENCH], ids=["openvino", "msbench"])
def test_a_healing_that_was_cut_off_goes_on_with_the_next_layer(method: Layerwise, tmp_path: Path) -> None:
    dense, undisturbed, mask = masked("resnet")
    images = nets.images(16)
    expected = method.heal(undisturbed, dense, images, HealContext(pruned=mask))

    def report(name: str, done: int, _: int) -> None:
        if (name, done) == ("layerwise", 4):
            raise KeyboardInterrupt

    _, killed, _ = masked("resnet")
    with pytest.raises(KeyboardInterrupt):
        method.heal(killed, dense, images, HealContext(pruned=mask, checkpoints=tmp_path, report=report))
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(finished) == 4 * (2 if method is SHORT else 1)
    _, resumed, _ = masked("resnet")
    found = method.heal(resumed, dense, images, HealContext(pruned=mask, checkpoints=tmp_path))
    assert finished.items() <= {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}.items()
    assert found.losses == expected.losses
    wanted = undisturbed.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in resumed.state_dict().items())


@pytest.mark.parametrize("method", [SHORT, MSBENCH], ids=["openvino", "msbench"])
def test_a_layer_that_was_cut_off_in_its_middle_ends_in_the_same_bits(
    method: Layerwise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, undisturbed, mask = masked("resnet")
    images, saved = nets.images(16), []
    expected = method.heal(undisturbed, dense, images, HealContext(pruned=mask))

    def stop() -> None:
        saved.append(0)
        if len(saved) == 45:  # in the middle of the second level, or of the third layer
            raise KeyboardInterrupt

    _, killed, _ = masked("resnet")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "PAUSE", 0.0)
        patch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: 0.0))  # a checkpoint after every step
        method.heal(killed, dense, images, HealContext(pruned=mask, checkpoints=tmp_path, checkpoint_saved=stop))
    _, resumed, _ = masked("resnet")
    found = method.heal(resumed, dense, images, HealContext(pruned=mask, checkpoints=tmp_path))
    assert found.losses == expected.losses
    wanted = undisturbed.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in resumed.state_dict().items())


def test_a_seed_gives_the_same_bits_and_another_gives_others() -> None:
    def healed(seed: int) -> Tensor:
        dense, student, mask = masked("vit")
        SHORT.heal(student, dense, nets.images(60), HealContext(pruned=mask, seed=seed))
        return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])

    assert torch.equal(healed(0), healed(0)) and not torch.equal(healed(0), healed(1))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"budget": "openvin"}, "did you mean 'openvino'"),
        ({"inputs": "sparse"}, "inputs = 'sparse' is unknown"),
        ({"budget": "msbench", "iterations": 3}, "set layerwise.steps, or budget openvino"),
        ({"steps": 0}, "steps = 0 must be at least 1, or null"),
        ({"lr": 0.0}, "lr = 0 must be greater than 0"),
        ({"bias_lr": -1.0}, "bias_lr = -1 must be greater than 0"),
    ],
)
def test_params_out_of_range_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        Layerwise(**wrong)  # type: ignore[arg-type]
