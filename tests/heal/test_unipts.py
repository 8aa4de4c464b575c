"""UniPTS against its formulas and its code's loop written out, after a kill, and in company of other healers."""

from __future__ import annotations

import copy
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import heal
from heal import masking
from heal.errors import ArchitectureError, ImagesError, MethodError
from heal.families.discovery import batch_norms
from heal.healers.starfish import Starfish
from heal.healers.unipts import Unipts, base_decayed_kl
from heal.images import shuffled
from heal.method import HealContext
from heal.values import Mask
from tests.heal import nets
from tests.heal.test_training import masked
from tests.tasks.processes import process

QUICK = Unipts(epochs=3, batch_size=4, lr=0.02)


def _logits(seed: int) -> Tensor:
    return 3 * torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _softmax(y: np.ndarray) -> np.ndarray:
    e = np.exp(y - y.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("epoch", "scale"), [(0, 2.00), (50, 3.31), (99, 5.41)])
def test_the_loss_and_its_gradient_are_the_formulas(epoch: int, scale: float) -> None:
    ours, theirs, tem = _logits(0).requires_grad_(), _logits(1), 8 * 0.99**epoch
    loss = base_decayed_kl(ours, theirs, 4.0, tem)
    loss.backward()  # type: ignore[no-untyped-call]
    s, p = ours.detach().numpy(), _softmax(theirs.numpy() / 4)
    value = 16 / 4 * sum(
        p[i, c] * (np.log(p[i, c]) - np.log(_softmax(s)[i, c]) / tem) for i in range(4) for c in range(5)
    )  # fmt: skip
    assert loss.item() == pytest.approx(value, rel=1e-9)
    assert 16 / tem == pytest.approx(scale, abs=5e-3)
    np.testing.assert_allclose(ours.grad, 16 / tem * (_softmax(s) - p) / 4, rtol=1e-9)


class _Subnet(torch.autograd.Function):
    """The operator as the official code has it: the j smallest |w| become 0, the others 1."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, kept: int) -> Tensor:
        mask = torch.zeros(weight.numel())
        mask[weight.abs().flatten().argsort(descending=True, stable=True)[:kept]] = 1
        ctx.mask, ctx.weight = mask.view_as(weight), weight.clone()  # type: ignore[attr-defined]
        return mask.view_as(weight) * weight

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] + 5e-5 * (1 - ctx.mask) * ctx.weight, None  # type: ignore[attr-defined]


def _official(dense: nn.Module, mask: Mask, images: Tensor, epochs: int, seed: int) -> tuple[nn.Module, list[float]]:
    """The official loop on whole batches of 4, without crops: from the dense weights, the teacher in train mode."""
    model, teacher = copy.deepcopy(dense), copy.deepcopy(dense)
    kept = {f"{layer}.weight": int(keep.sum()) for layer, keep in mask.keep.items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4, foreach=False)
    for norm in (*batch_norms(model).values(), *batch_norms(teacher).values()):
        norm.train()
    losses: list[float] = []
    for epoch in range(epochs):
        order = shuffled(len(images), seed, f"unipts order {epoch}")[: len(images) // 4 * 4]
        for batch in images[order].split(4):
            step, steps = len(losses), epochs * (len(order) // 4)
            warmup = steps // epochs
            rate = 0.02 * step / warmup if step < warmup else 0.01 * (1 + np.cos(np.pi * step / steps))
            parameters = dict(model.named_parameters())
            used = {name: _Subnet.apply(parameters[name], count) for name, count in kept.items()}
            with torch.no_grad():
                target = torch.softmax(teacher(batch) / 4, 1)
            answer = torch.log_softmax(torch.func.functional_call(model, used, (batch,)), 1) / (8 * 0.99**epoch)
            loss = nn.functional.kl_div(answer, target, reduction="sum") * 16 / 4
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.param_groups[0]["lr"] = float(rate)
            optimiser.step()
    with torch.no_grad():
        for name, count in kept.items():
            parameters[name].copy_(_Subnet.apply(parameters[name], count))
    return model.eval(), losses


@pytest.mark.parametrize("name", ["resnet", "mobilenetv3", "vit"])
def test_it_is_the_official_loop(name: str) -> None:
    dense, student, mask = masked(name)
    images = nets.images(11)
    report = replace(QUICK, augment=False).heal(student, dense, images, HealContext(pruned=mask, seed=2))
    expected, losses = _official(dense, mask, images, epochs=3, seed=2)
    np.testing.assert_allclose(report.losses, losses, rtol=1e-4)
    for key, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "resnet", "convnext"])
def test_weights_return_and_every_layer_keeps_its_count(name: str) -> None:
    dense, student, mask = masked(name)
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    report = replace(QUICK, lr=0.1).heal(student, dense, nets.images(8), HealContext(pruned=mask))
    assert isinstance(report.pruned, Mask) and report.pruned.keep.keys() == mask.keep.keys()
    for layer, keep in report.pruned.keep.items():
        weight = student.get_parameter(f"{layer}.weight").detach()
        assert int(keep.sum()) == int(mask.keep[layer].sum()) and torch.equal(weight != 0, keep)
    assert any(bool((keep & ~mask.keep[layer]).any()) for layer, keep in report.pruned.keep.items())
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())
    assert not any(
        m.training or m._forward_hooks or m._forward_pre_hooks for m in (*dense.modules(), *student.modules())
    )


def test_everything_trains_and_running_statistics_move() -> None:
    dense, student, mask = masked("resnet")
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    QUICK.heal(student, dense, nets.images(8), HealContext(pruned=mask))
    assert [key for key, tensor in student.state_dict().items() if torch.equal(tensor, before[key])] == []


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_teacher_answers_in_the_mode_asked_for(mode: str) -> None:
    dense, student, mask = masked("resnet")
    images, teacher = nets.images(4), copy.deepcopy(dense)
    if mode == "train":
        teacher.train()
    method = Unipts(epochs=1, warmup_epochs=0, batch_size=4, augment=False, teacher=mode)  # type: ignore[arg-type]
    first = method.heal(student, dense, images, HealContext(pruned=mask)).losses[0]
    _, again, _ = masked("resnet")
    for norm in batch_norms(again).values():
        norm.train()
    with torch.no_grad():
        order = shuffled(4, 0, "unipts order 0")
        expected = base_decayed_kl(again(images[order]), teacher(images[order]), 4.0, 8.0)
    assert first == pytest.approx(float(expected), rel=1e-5)


def test_teacher_and_student_see_the_same_crops_and_each_step_has_its_own() -> None:
    dense, student, mask = masked("resnet")
    seen: dict[nn.Module, list[Tensor]] = {dense: [], student: []}
    hooks = [
        model.register_forward_pre_hook(lambda module, args: seen[module].append(args[0].clone())) for model in seen
    ]
    Unipts(epochs=2, batch_size=8).heal(student, dense, nets.images(8), HealContext(pruned=mask))
    for hook in hooks:
        hook.remove()
    ours, theirs = seen[student][1:-1], seen[dense][1:-1]  # the first and the last measure the alignment
    assert len(ours) == 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], ours[1])


def test_another_seed_gives_other_crops() -> None:
    def healed(seed: int) -> Tensor:
        dense, student, mask = masked("vit")
        Unipts(epochs=2, batch_size=8).heal(student, dense, nets.images(8), HealContext(pruned=mask, seed=seed))
        return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])

    assert torch.equal(healed(0), healed(0)) and not torch.equal(healed(0), healed(1))


def test_batches_that_the_caller_made_stay_as_they_are() -> None:
    dense, student, mask = masked("resnet")
    batches = list(nets.images(9).split((4, 3, 2)))
    report = Unipts(epochs=2, batch_size=64).heal(student, dense, batches, HealContext(pruned=mask))
    assert len(report.losses) == 6


def test_a_batch_of_one_image_is_refused_where_there_are_batch_norms() -> None:
    dense, student, mask = masked("resnet")
    with pytest.raises(ImagesError, match="batch of a single image"):
        Unipts(epochs=2).heal(student, dense, nets.images(1), HealContext(pruned=mask))


def test_a_network_without_logits_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    with pytest.raises(ArchitectureError, match=r"Sequential answers \[2, 4, 28, 28\], not logits"):
        heal.recompress(model, nets.images(2), heal.Budget(weights=0.5), "uniform", "magnitude", ["unipts"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"teacher": "trained"}, "did you mean 'train'"),
        ({"epochs": 1}, "warmup_epochs = 1 must be at least 0 and less than epochs = 1"),
        ({"batch_size": 0}, "batch_size = 0 must be at least 1"),
        ({"decay": -1.0}, "decay = -1 must be at least 0"),
        ({"base_decay": 0.0}, "base_decay = 0 must be greater than 0"),
        ({"momentum": 1.0}, r"momentum = 1 is not in \[0, 1\)"),
    ],
)
def test_params_out_of_range_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        Unipts(**wrong)  # type: ignore[arg-type]


def test_what_follows_and_what_is_given_back_has_the_new_mask() -> None:
    dense, images = nets.build("vit"), nets.images(8)
    healers = [replace(QUICK, lr=0.1), Starfish(epochs=1, batch_size=4)]
    result = heal.recompress(dense, images, heal.Budget(weights=0.7), "uniform", "magnitude", healers)
    moved = result.report.healing[0].pruned
    assert isinstance(moved, Mask) and isinstance(result.pruned, Mask)
    assert all(torch.equal(result.pruned.keep[layer], keep) for layer, keep in moved.keep.items())
    assert masking.holds(result.model, result.pruned)
    first = heal.recompress(dense, images, heal.Budget(weights=0.7), "uniform", "magnitude", []).pruned
    assert any(not torch.equal(first.keep[layer], keep) for layer, keep in moved.keep.items())


WORKER = """
import os, time
from pathlib import Path
from types import SimpleNamespace
from heal import checkpoint
from heal.healers.unipts import Unipts
from heal.method import HealContext
from tests.heal import nets
from tests.heal.test_training import masked

checkpoint.PAUSE, checkpoint.time = 0.0, SimpleNamespace(monotonic=lambda: 0.0)  # a checkpoint after every step

def report(name, done, total):
    if done == 12:  # of epochs of three steps: the last checkpoint is of the middle of the fourth
        print(done, flush=True)
        time.sleep(600)

dense, student, mask = masked("resnet")
context = HealContext(pruned=mask, report=report, checkpoints=Path(os.environ["CHECKPOINTS"]))
Unipts(epochs=6, batch_size=4, lr=0.02).heal(student, dense, nets.images(12), context)
"""


def test_a_killed_process_goes_on_in_the_middle_of_an_epoch_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    with process(WORKER, CHECKPOINTS=str(tmp_path)) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "12\n"
        worker.send_signal(signal.SIGKILL)
    assert worker.returncode == -signal.SIGKILL
    method, images = Unipts(epochs=6, batch_size=4, lr=0.02), nets.images(12)
    dense, resumed, mask = masked("resnet")
    said: list[str] = []
    found = method.heal(resumed, dense, images, HealContext(pruned=mask, checkpoints=tmp_path, log=said.append))
    _, undisturbed, _ = masked("resnet")
    expected = method.heal(undisturbed, dense, images, HealContext(pruned=mask))
    assert said == ["resuming after step 11"]
    assert found.losses == expected.losses
    wanted = undisturbed.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in resumed.state_dict().items())
    assert isinstance(found.pruned, Mask) and isinstance(expected.pruned, Mask)
    assert all(torch.equal(keep, expected.pruned.keep[layer]) for layer, keep in found.pruned.keep.items())


def test_a_fixed_mask_stays_the_pruners_and_what_it_keeps_trains() -> None:
    dense, student, mask = masked("vit")
    before = copy.deepcopy(student.state_dict())
    method = replace(QUICK, mask="fixed", warmup_epochs=0, augment=False)
    report = method.heal(student, dense, nets.images(8), HealContext(pruned=mask))
    with torch.no_grad():
        wanted = base_decayed_kl(_answers(before, dense), dense(nets.images(8)[_first(8)]), 4.0, 8.0)
    assert report.losses[0] == pytest.approx(float(wanted), rel=1e-4)
    assert report.pruned is None and masking.holds(student, mask)
    assert not torch.equal(student.state_dict()["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])


def _first(count: int) -> Tensor:
    """The images of the first batch."""
    return shuffled(count, 0, "unipts order 0")[:4]


def _answers(state: dict[str, Tensor], dense: nn.Module) -> Tensor:
    student = copy.deepcopy(dense)
    student.load_state_dict(state)
    answers: Tensor = student(nets.images(8)[_first(8)])
    return answers
