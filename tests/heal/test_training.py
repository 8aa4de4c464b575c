"""The one loop: what each optimiser, schedule and mask policy does, against loops written out; and crops."""

from __future__ import annotations

import copy
import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from heal import checkpoint, masking
from heal.allocators.uniform import Uniform
from heal.augmentation import crop_and_flip, draw_box
from heal.compat import timm
from heal.errors import MethodError
from heal.families.discovery import batch_norms
from heal.families.lookup import describe
from heal.healers.starfish import Starfish
from heal.images import Replay, generator, shuffled
from heal.mask_policies import Dynamic, Fixed
from heal.method import AllocationContext, HealContext
from heal.modes import normalising_by_batch
from heal.pruned import apply
from heal.pruners.magnitude import Magnitude
from heal.training import Adam, Schedule, Sgd, Step, Training, fit
from heal.values import Budget, Mask
from tests.heal import nets


def masked(name: str, sparsity: float = 0.7) -> tuple[nn.Module, nn.Module, Mask]:
    """The dense network, a masked copy, and the mask."""
    dense = nets.build(name)
    allocation = Uniform().allocate(dense, Budget(weights=sparsity), AllocationContext())
    mask = Magnitude().prune(dense, allocation, {})
    student = copy.deepcopy(dense)
    apply(student, mask)
    return dense, student, mask


def _block_states(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Every block's output as rows [r, d]."""
    family, kept = describe(model), []
    hooks = [
        model.get_submodule(block).register_forward_hook(lambda _, __, output: kept.append(output))
        for block in family.blocks
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return [(state.flatten(0, -2) if family.states == "tokens" else state.flatten(1)) for state in kept]


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_starfish_is_bit_for_bit_a_loop_written_out(name: str) -> None:
    dense, student, mask = masked(name)
    images, reference = nets.images(10), copy.deepcopy(student)
    report = Starfish(epochs=2, batch_size=4, lr=3e-3, precision="float32").heal(
        student, dense, images, HealContext(pruned=mask, seed=3)
    )
    weights = {layer: reference.get_parameter(f"{layer}.weight") for layer in describe(dense).layers}
    optimiser = torch.optim.Adam(weights.values(), fused=True)
    batches = list(images[shuffled(10, 3, "healing order")].split(4))
    losses: list[float] = []
    for step in range(6):
        batch = batches[step % 3]
        with torch.no_grad():
            theirs = [state / torch.linalg.vector_norm(state, dim=-1).clamp_min(1e-12).unsqueeze(-1)
                      for state in _block_states(dense, batch)]  # fmt: skip
        pairs = zip(_block_states(reference, batch), theirs, strict=True)
        cosines = [
            ((s * t.half().float()).sum(-1) / torch.linalg.vector_norm(s, dim=-1).clamp_min(1e-12)).mean()
            for s, t in pairs
        ]
        loss = torch.stack([1 - cosine for cosine in cosines]).mean()
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        for layer, weight in weights.items():
            if weight.grad is not None:
                weight.grad *= mask.keep[layer]
        for group in optimiser.param_groups:
            group["lr"] = 1e-6 + 0.5 * (3e-3 - 1e-6) * (1 + math.cos(math.pi * step / 6))
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            for layer, weight in weights.items():
                weight *= mask.keep[layer]
    assert report.losses == tuple(losses)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), reference.parameters(), strict=True))


class _Quadratic(nn.Module):
    """Two parameters and a loss that is told the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.b = nn.Parameter(torch.tensor([0.5]))

    def loss(self, step: Step, batch: Tensor) -> Tensor:
        x = batch.flatten()[:3]
        return ((self.a - x).square().sum() + (self.b - x[0]).square().sum()) * (1 + step.epoch)


def _fitted(schedule: Schedule, masks: Fixed | Dynamic | None = None) -> tuple[_Quadratic, tuple[float, ...]]:
    model = _Quadratic()
    replay = Replay(nets.images(6, size=2), 2)
    training = Training(
        "quadratic", lambda _: replay, model.loss, dict(model.named_parameters()), schedule, masks or Fixed()
    )
    return model, fit(model, training, HealContext(pruned=Mask({})))


def _grads(a: Tensor, b: Tensor, step: int) -> tuple[Tensor, Tensor]:
    x = nets.images(6, size=2)[2 * (step % 3)].flatten()[:3].double()
    return 2 * (a - x) * (1 + step // 3), 2 * (b - x[:1]) * (1 + step // 3)


def test_sgd_is_the_formula_with_momentum_decay_and_warmup() -> None:
    schedule = Schedule(4, 0.05, 0.0, warmup_epochs=1, optimiser=Sgd(momentum=0.9, weight_decay=0.01))
    model, _ = _fitted(schedule)
    a, b = torch.tensor([1.0, -2.0, 3.0]).double(), torch.tensor([0.5]).double()
    momenta: list[Tensor] = [torch.zeros(3).double(), torch.zeros(1).double()]
    for step in range(12):
        lr = 0.05 * step / 3 if step < 3 else 0.025 * (1 + math.cos(math.pi * step / 12))
        for index, (w, g) in enumerate(zip((a, b), _grads(a, b, step), strict=True)):
            momenta[index] = 0.9 * momenta[index] + g + 0.01 * w
        a, b = a - lr * momenta[0], b - lr * momenta[1]
    torch.testing.assert_close(model.a.detach().double(), a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.b.detach().double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adam_is_the_formula_however_weights_lie_in_memory(
    layout: torch.memory_format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also resumed in the middle, when its own memory comes from a file."""
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: 0.0))  # a checkpoint after every step
    drawn = torch.Generator().manual_seed(0)
    start, slopes = torch.randn(4, 2, 3, 3, generator=drawn), torch.randn(4, 4, 2, 3, 3, generator=drawn)
    weight = nn.Parameter(start.clone(memory_format=layout))
    layer = nn.Module()
    layer.register_parameter("weight", weight)

    def losing(step: Step, batch: Tensor) -> Tensor:
        return (weight * slopes[step.number]).sum()

    def stop() -> None:
        raise KeyboardInterrupt

    schedule = Schedule(4, 0.1, 0.1, optimiser=Adam(weight_decay=0.01))
    training = Training("one", lambda _: Replay(slopes[0], 4), losing, {"weight": weight}, schedule)
    context = HealContext(pruned=Mask({}), checkpoints=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(layer, training, replace(context, checkpoint_saved=stop))
    assert len(fit(layer, training, context)) == 4
    expected, mean, square = start.double(), torch.zeros(start.shape).double(), torch.zeros(start.shape).double()
    for step, slope in enumerate(slopes.double(), start=1):
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope.square()
        unbiased = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        expected = (1 - 0.1 * 0.01) * expected - 0.1 * unbiased
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_factors_are_of_the_learning_rate_and_a_small_loss_ends_it() -> None:
    model, losses = _fitted(Schedule(1, 1e-3, 1e-3, optimiser=Adam({"b": 10.0})))
    start = _Quadratic()
    assert len(losses) == 3
    assert float((model.b - start.b).detach().abs()) == pytest.approx(3e-2, rel=0.4), "Adam steps by about the rate"
    assert float((model.a - start.a).detach().abs().max()) == pytest.approx(3e-3, rel=0.4)
    _, short = _fitted(Schedule(1, 1e-3, 1e-3, stop_below=losses[0] + 1e-3))
    assert len(short) == 1


def test_the_schedule_is_timms_with_a_clock_that_includes_the_warmup() -> None:
    scheduler = importlib.import_module(f"{timm.__name__}.scheduler")
    schedule = Schedule(10, 0.01, 0.0, warmup_epochs=2, optimiser=Sgd())
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    theirs = scheduler.CosineLRScheduler(
        optimiser, t_initial=50, lr_min=0, warmup_t=10, warmup_lr_init=0, cycle_limit=1, t_in_epochs=False
    )
    for step in range(50):
        theirs.step_update(step)
        assert schedule.lr_at(step, 50) == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-12)
    assert schedule.lr_at(0, 50) == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 0}, "epochs = 0 must be at least 1"),
        ({"warmup_epochs": 3}, "warmup_epochs = 3 must be at least 0 and less than epochs = 3"),
        ({"lr": 0.0}, "lr > 0"),
        ({"min_lr": 1.0}, "min_lr <= lr"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        Schedule(**({"epochs": 3, "lr": 0.1, "min_lr": 0.0} | wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(("momentum", "decay"), [(1.0, 0.0), (-0.1, 0.0), (0.9, -1e-4)])
def test_an_optimiser_that_makes_no_sense_is_refused(momentum: float, decay: float) -> None:
    with pytest.raises(MethodError, match=r"momentum|weight_decay"):
        Sgd(momentum, decay)


# Masks


class _Subnet(torch.autograd.Function):
    """SR-STE's operator, as its authors wrote it: masked forward; g + decay (1 - mask) w backward."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, kept: int, decay: float) -> Tensor:
        mask = torch.zeros_like(weight).flatten()
        mask[weight.abs().flatten().argsort(descending=True, stable=True)[:kept]] = 1
        ctx.mask, ctx.weight, ctx.decay = mask.view_as(weight), weight.clone(), decay  # type: ignore[attr-defined]
        return mask.view_as(weight) * weight

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] + ctx.decay * (1 - ctx.mask) * ctx.weight, None, None  # type: ignore[attr-defined]


def test_a_dynamic_mask_is_sr_stes_operator() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    weights = dict(layer.named_parameters())
    latent = layer.weight.detach().clone()
    policy = Dynamic({"weight": 11}, decay=0.3)
    with policy.masked(weights):
        assert int(layer.weight.count_nonzero()) == 11
        layer(x).square().sum().backward()
    assert torch.equal(layer.weight.detach(), latent), "between steps the weight is dense"
    w = latent.clone().requires_grad_()
    nn.functional.linear(x, _Subnet.apply(w, 11, 0.3), layer.bias.detach()).square().sum().backward()
    assert layer.weight.grad is not None and w.grad is not None
    torch.testing.assert_close(layer.weight.grad, w.grad, rtol=1e-6, atol=1e-6)


def test_after_an_exception_the_latent_weights_are_back() -> None:
    layer = nn.Linear(6, 5)
    latent = layer.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), Dynamic({"weight": 3}, 0.1).masked(dict(layer.named_parameters())):
        raise KeyboardInterrupt
    assert torch.equal(layer.weight.detach(), latent)


def test_of_equal_weights_exactly_the_allocation_stays() -> None:
    layer = nn.Linear(6, 5)
    nn.init.ones_(layer.weight)
    keep = Dynamic({"weight": 13}, 0.0).materialise({"weight": layer.weight})
    assert torch.equal(layer.weight.detach().flatten(), torch.cat([torch.ones(13), torch.zeros(17)]))
    assert masking.holds(nn.Sequential(layer), Mask({"0": keep["weight"]}))


# BatchNorm by batches


@pytest.mark.parametrize("name", ["resnet", "mobilenetv3"])
@pytest.mark.parametrize("moving", [True, False])
def test_norms_by_the_batch_answer_as_in_train_mode_and_only_norms_are(name: str, moving: bool) -> None:
    model, images = nets.build(name), nets.images(6)
    model.add_module("unused", nn.Dropout(0.5).eval())
    reference = copy.deepcopy(model)
    for norm in batch_norms(reference).values():
        norm.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad(), normalising_by_batch(model, moving=moving):
        answer = model(images)
        assert {type(m) for m in model.modules() if m.training} == {type(m) for m in batch_norms(model).values()}
    with torch.no_grad():
        assert torch.equal(answer, reference(images))
    assert not any(module.training for module in model.modules())
    expected = reference.state_dict() if moving else before
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


# Crops


def test_boxes_are_legal_and_drawn_evenly() -> None:
    drawn = generator(0, "boxes")
    boxes = [draw_box(40, 30, drawn) for _ in range(4000)]
    for top, left, height, width in boxes:
        assert 0 <= top <= 40 - height and 0 <= left <= 30 - width
    shares = torch.tensor([height * width / 1200 for _, _, height, width in boxes])
    ratios = torch.tensor([width / height for _, _, height, width in boxes])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [_torchvisions_box(torch.empty(3, 40, 30)) for _ in range(4000)]
    wanted = torch.tensor([height * width / 1200 for _, _, height, width in theirs])
    sides = torch.tensor([width / height for _, _, height, width in theirs])
    places = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(shares.quantile(places), wanted.quantile(places), rtol=0.1, atol=0.01)
    torch.testing.assert_close(ratios.quantile(places), sides.quantile(places), rtol=0.05, atol=0.01)


def _torchvisions_box(image: Tensor) -> list[int]:
    from torchvision.transforms import RandomResizedCrop

    box: list[int] = list(RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]))
    return box


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000)])
def test_a_slender_image_is_cut_in_its_middle_as_nothing_fits(size: tuple[int, int]) -> None:
    assert list(draw_box(*size, generator(0, "boxes"))) == _torchvisions_box(torch.empty(3, *size))


def test_a_crop_is_the_resized_box_and_half_are_mirrored() -> None:
    images = nets.images(64, size=24)
    found = crop_and_flip(images, generator(5, "crops"))
    again = generator(5, "crops")
    boxes = [draw_box(24, 24, again) for _ in images]
    mirrored = torch.rand(64, generator=again) < 0.5
    assert 20 < int(mirrored.sum()) < 44
    for image, box, mirror, crop in zip(images, boxes, mirrored, found, strict=True):
        expected = _resized_crop(image, box)
        torch.testing.assert_close(crop, expected.flip(-1) if mirror else expected, rtol=1e-4, atol=1e-4)


def _resized_crop(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    from torchvision.transforms.v2 import functional

    resized: Tensor = functional.resized_crop(image, *box, [24, 24], antialias=True)
    return resized
