"""The healers that match statistics: against slow references, and the identities that hold between them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from heal import batchnorm, masking
from heal.allocators.uniform import Uniform
from heal.batchnorm import Mode
from heal.errors import ArchitectureError, ImagesError, MethodError
from heal.families.discovery import batch_norms, is_batch_norm
from heal.families.lookup import describe
from heal.healers.batchnorm_recalibration import BatchnormRecalibration
from heal.healers.bias_correction import BiasCorrection
from heal.healers.layerwise_variance import LayerwiseVariance
from heal.healers.repair import Repair
from heal.healers.signal_resuscitation import SignalResuscitation
from heal.healers.variance_matching import VarianceMatching
from heal.healers.weight_statistic_correction import corrected
from heal.images import first
from heal.method import AllocationContext, HealContext, Healer, check
from heal.pruned import apply
from heal.pruners.magnitude import Magnitude
from heal.statistics import capture
from heal.values import Budget, Mask
from heal.wiring import trace
from tests.heal import nets


def _masked(name: str, sparsity: float = 0.7) -> tuple[nn.Module, nn.Module, Mask]:
    dense = nets.build(name)
    allocation = Uniform().allocate(dense, Budget(weights=sparsity), AllocationContext())
    mask = Magnitude().prune(dense, allocation, {})
    student = copy.deepcopy(dense)
    apply(student, mask)
    return dense, student, mask


def _healed(name: str, images: Tensor, *healers: Healer) -> nn.Module:
    dense, student, mask = _masked(name)
    for healer in healers:
        healer.heal(student, dense, images, HealContext(pruned=mask))
    return student


def _moments(model: nn.Module, images: Tensor, name: str, side: str) -> tuple[Tensor, Tensor]:
    """Mean and variance [d] of a tap, from one batch, by numpy's formulas."""
    kept: list[Tensor] = []
    module = model.get_submodule(name)
    hook = (
        module.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
        if side == "input"
        else module.register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    )
    with torch.no_grad():
        model(images)
    hook.remove()
    maps = is_batch_norm(module) or type(module).__name__.endswith("2d") or isinstance(module, nn.Conv2d)
    rows = kept[0].movedim(1, -1) if maps else kept[0]
    rows = rows.reshape(-1, rows.shape[-1]).double().numpy()
    return torch.from_numpy(rows.mean(0)), torch.from_numpy(rows.var(0))


# BatchNorm


def _first_norm(model: nn.Module, images: Tensor) -> tuple[nn.BatchNorm2d, list[Tensor]]:
    """The first BatchNorm, and what enters it for every image: no norm comes before."""
    norm = next(iter(batch_norms(model).values()))
    assert isinstance(norm, nn.BatchNorm2d)
    kept: list[Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    with torch.no_grad():
        for image in images:
            model(image.unsqueeze(0))
    hook.remove()
    return norm, kept


def test_cumulative_is_the_mean_of_the_batches() -> None:
    model, images = nets.build("resnet"), nets.images(11)
    norm, inputs = _first_norm(model, images)
    used = batchnorm.reestimate(model, images, "cumulative", batch_size=4)
    assert used == 8, "the incomplete last batch would weigh as much as a whole one"
    batches = [torch.cat(inputs[i : i + 4]).movedim(1, -1).flatten(0, -2).double() for i in (0, 4)]
    assert torch.allclose(norm.running_mean.double(), torch.stack([b.mean(0) for b in batches]).mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var.double(), torch.stack([b.var(0) for b in batches]).mean(0), rtol=1e-4)


def test_exact_is_the_variance_of_all_rows() -> None:
    model, images = nets.build("resnet"), nets.images(12)
    norm, inputs = _first_norm(model, images)
    batchnorm.reestimate(model, images, "exact", batch_size=4)
    rows = torch.cat(inputs).movedim(1, -1).flatten(0, -2).double().numpy()
    assert np.allclose(norm.running_mean, rows.mean(0), atol=1e-6)
    assert np.allclose(norm.running_var, rows.var(0), rtol=1e-5)


def test_the_moving_average_keeps_a_share_of_the_reset_values() -> None:
    model, images = nets.build("resnet"), nets.images(8)
    norm, inputs = _first_norm(model, images)
    used = batchnorm.reestimate(model, images, "ema_reset", batch_size=4, batches=5, momentum=0.1)
    assert used == 20, "it goes around again until it has its batches"
    batches = [torch.cat(inputs[i : i + 4]).movedim(1, -1).flatten(0, -2).double() for i in (0, 4)]
    mean, var = torch.zeros(len(norm.running_mean)).double(), torch.ones(len(norm.running_var)).double()
    for number in (0, 1, 0, 1, 0):
        mean = 0.9 * mean + 0.1 * batches[number].mean(0)
        var = 0.9 * var + 0.1 * batches[number].var(0)
    assert torch.allclose(norm.running_mean.double(), mean, atol=1e-5)
    assert torch.allclose(norm.running_var.double(), var, rtol=1e-4)


@pytest.mark.parametrize("mode", ["cumulative", "ema_reset", "exact"])
def test_recalibration_touches_nothing_but_running_statistics(mode: str) -> None:
    model, images = nets.build("mobilenetv3"), nets.images(6)
    dropout = nn.Dropout(0.5)
    model.add_module("unused", dropout)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    momenta = [norm.momentum for norm in batch_norms(model).values()]
    model.train()
    batchnorm.reestimate(model, images, mode, batch_size=3)  # type: ignore[arg-type]
    assert all(module.training for module in model.modules())
    assert [norm.momentum for norm in batch_norms(model).values()] == momenta
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("running" in name or "num_batches" in name), name


def test_batches_that_the_caller_made_are_taken_as_they_are() -> None:
    images = nets.images(10)
    as_array, as_batches = nets.build("resnet"), nets.build("resnet")
    batchnorm.reestimate(as_array, images, "cumulative", batch_size=4)
    batchnorm.reestimate(as_batches, list(images.split(4)), "cumulative")
    assert all(
        torch.equal(a, b) for a, b in zip(as_array.state_dict().values(), as_batches.state_dict().values(), strict=True)
    )
    with pytest.raises(ImagesError, match="none"):
        batchnorm.reestimate(as_array, [])


@pytest.mark.parametrize("mode", ["cumulative", "ema_reset", "exact"])
def test_a_single_image_is_refused_where_a_norm_sees_one_pixel(mode: Mode) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    images = nets.images(3)
    for single in (images[:1], list(images.split(1))):
        with pytest.raises(ImagesError, match=r"BatchNorm 3 sees \[1, 8, 1, 1\].*batches of 2"):
            batchnorm.reestimate(model, single, mode)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert batchnorm.reestimate(model[:3], images[:1], mode) == 1, "a map of many pixels has a variance"


# The identities between repairs and recalibration (methods.md 3b)

VARIANTS: dict[str, tuple[Healer, ...]] = {
    "none": (),
    "layerwise": (LayerwiseVariance(images=16),),
    "raw": (SignalResuscitation(images=16, shrinkage="none", mean=False),),
    "asr": (SignalResuscitation(images=16),),
}


def _answers(variant: str, mode: str, eps: float) -> Tensor:
    dense, student, mask = _masked("resnet", 0.8)
    images = nets.images(16)
    for model in (dense, student):
        for norm in batch_norms(model).values():
            norm.eps = eps
    for healer in VARIANTS[variant]:
        healer.heal(student, dense, images, HealContext(pruned=mask))
    last = BatchnormRecalibration(mode=mode, batch_size=16, batches=5)  # type: ignore[arg-type]
    last.heal(student, dense, images, HealContext(pruned=mask))
    with torch.no_grad():
        answers: Tensor = student(nets.images(8, seed=1))
    return answers


@pytest.mark.parametrize("mode", ["cumulative", "exact"])
def test_a_repair_before_an_exact_recalibration_changes_nothing(mode: str) -> None:
    plain = _answers("none", mode, 1e-12)
    for variant in ("layerwise", "raw", "asr"):
        assert torch.allclose(_answers(variant, mode, 1e-12), plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


def test_a_repair_before_a_moving_average_changes_the_answer() -> None:
    answers = {variant: _answers(variant, "ema_reset", 1e-12) for variant in VARIANTS}
    for variant in ("layerwise", "raw", "asr"):
        difference = (answers[variant] - answers["none"]).abs().max()
        assert difference > 0.05 * answers["none"].abs().max(), variant


def test_raw_matching_with_the_mean_is_exact_recalibration() -> None:
    """With dense buffers that are the dense moments on these images (identity 2)."""
    images = nets.images(16)
    dense, student, mask = _masked("resnet")
    for model in (dense, student):
        for norm in batch_norms(model).values():
            norm.eps = 1e-12
    batchnorm.reestimate(dense, images, "exact", batch_size=16)
    recalibrated = copy.deepcopy(student)
    student.load_state_dict({n: t for n, t in dense.state_dict().items() if "running" in n}, strict=False)
    SignalResuscitation(images=16, shrinkage="none").heal(student, dense, images, HealContext(pruned=mask))
    # The first layer is skipped by the method, and it is not pruned here.
    batchnorm.reestimate(recalibrated, images, "exact", batch_size=16)
    with torch.no_grad():
        assert torch.allclose(student(images), recalibrated(images), rtol=2e-3, atol=2e-3)


# ASR


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-3, 10), st.floats(1e-3, 10)), min_size=3, max_size=20))
def test_shrunk_gains_lie_between_one_and_the_raw_ones(pairs: list[tuple[float, float]]) -> None:
    dense, pruned = torch.tensor(pairs, dtype=torch.float64).T
    raw = (dense / pruned).sqrt()
    gains = SignalResuscitation().gains(dense, pruned)
    low, high = torch.minimum(raw, torch.ones_like(raw)), torch.maximum(raw, torch.ones_like(raw))
    assert bool(((gains >= low - 1e-6) & (gains <= high + 1e-6)).all())
    assert torch.allclose(SignalResuscitation(shrinkage="none").gains(dense, pruned), raw)


def test_gains_at_the_limits() -> None:
    dense, pruned = torch.tensor([4.0, 4, 4]).double(), torch.tensor([1e-9, 1, 1e6]).double()
    gains = SignalResuscitation().gains(dense, pruned)
    assert gains[0] == pytest.approx(1, abs=1e-3), "a dead channel is left alone"
    assert gains[1] == pytest.approx((1 + 2) / 2), "at the prior it is half of the way"
    assert gains[2] == pytest.approx((4 / 1e6) ** 0.5, rel=1e-2), "a strong one is matched"
    dead = SignalResuscitation().gains(torch.ones(4).double(), torch.tensor([0.0, 0, 0, 1]).double())
    assert dead.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["resnet", "vgg", "mobilenetv2"])
def test_asr_is_its_algorithm_written_out(name: str) -> None:
    images = nets.images(8)
    healed = _healed(name, images, SignalResuscitation(images=8))
    dense, student, mask = _masked(name)
    wiring = trace(dense, [n for n, m in dense.named_modules() if isinstance(m, nn.Conv2d)], images[:1])
    for layer in wiring.order[1:]:
        (mean_d, v_d), (mean_p, v_p) = (_moments(model, images, layer, "output") for model in (dense, student))
        prior = float(np.median(v_p))
        weight = v_p / (v_p + prior)
        gamma = weight * torch.where(v_p > 0, v_d / v_p, 1.0).sqrt() + (1 - weight)
        with torch.no_grad():
            conv = student.get_submodule(layer)
            conv.weight.mul_(gamma.float().view(-1, 1, 1, 1))
            offset = (mean_d - gamma * mean_p).float()
            if conv.bias is None:
                student.get_submodule(wiring.norm_after[layer]).running_mean -= offset
            else:
                conv.bias.copy_(conv.bias * gamma.float() + offset)
    assert masking.holds(healed, mask)
    with torch.no_grad():
        assert torch.allclose(healed(images), student(images), rtol=1e-3, atol=1e-3)


# Variance matching, REPAIR, bias correction, weight statistics


@pytest.mark.parametrize("name", ["resnet", "mobilenetv3", "vit", "swin", "convnext"])
def test_variance_matching_gives_every_norm_the_dense_moments(name: str) -> None:
    images = nets.images(16)
    dense, student, mask = _masked(name)
    VarianceMatching(images=16).heal(student, dense, images, HealContext(pruned=mask))
    assert masking.holds(student, mask)
    order = trace(dense, describe(dense).norms, images[:1]).order
    for norm in order:
        outputs = []
        for model in (dense, student):
            module = model.get_submodule(norm)
            side = "input" if is_batch_norm(module) else "output"
            mean, var = _moments(model, images, norm, side)
            if side == "input":
                gain = module.weight.double() / (module.running_var.double() + module.eps).sqrt()
                mean = gain * (mean - module.running_mean.double()) + module.bias.double()
                var = gain.square() * var
            outputs.append((mean.detach(), var.detach()))
        (mean_d, var_d), (mean_p, var_p) = outputs
        assert torch.allclose(mean_p, mean_d, atol=1e-5 * float(var_d.sqrt().max()) + 1e-5), norm
        alive = var_p > 1e-12  # a channel that lost all its weights has no variance to give back
        assert torch.allclose(var_p[alive], var_d[alive], rtol=1e-4, atol=1e-9), norm


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_repair_gives_every_layer_the_dense_moments(name: str) -> None:
    images = nets.images(16)
    dense, student, mask = _masked(name)
    Repair(images=16).heal(student, dense, images, HealContext(pruned=mask))
    assert masking.holds(student, mask)
    for layer in describe(dense).layers:
        (mean_d, var_d), (mean_p, var_p) = (_moments(model, images, layer, "output") for model in (dense, student))
        assert torch.allclose(mean_p, mean_d, atol=1e-4 * float(var_d.sqrt().max())), layer
        alive = var_p > 1e-12
        assert torch.allclose(var_p[alive], var_d[alive], rtol=1e-4), layer


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_bias_correction_restores_the_mean_on_dense_inputs(name: str) -> None:
    """Exactly where no padding makes positions differ: Linear, and convolutions of 1x1 (here: no padding)."""
    images = nets.images(8)
    dense, student, mask = _masked(name)
    wiring = trace(dense, mask.keep, images[:1])
    buffers = {n: t.clone() for n, t in student.state_dict().items()}
    BiasCorrection(images=8).heal(student, dense, images, HealContext(pruned=mask))
    stats = capture(dense, images, {f"{layer}.{side}": False for layer in mask.keep for side in ("input", "output")})
    for layer in mask.keep:
        module = student.get_submodule(layer)
        weight = module.weight.detach().double()
        if weight.ndim == 4 and weight.shape[-1] > 1:
            continue
        answer = weight.flatten(1) @ stats[f"{layer}.input"].mean
        if module.bias is not None:
            answer = answer + module.bias.detach().double()
        else:
            norm = wiring.norm_after[layer]
            answer = answer - student.state_dict()[f"{norm}.running_mean"] + buffers[f"{norm}.running_mean"]
        assert torch.allclose(answer, stats[f"{layer}.output"].mean, atol=1e-4), layer


def test_bias_correction_runs_a_constant_image_through_a_padded_convolution() -> None:
    images = nets.images(8)
    dense, student, mask = _masked("resnet")
    wiring = trace(dense, mask.keep, images[:1])
    before = {n: t.clone() for n, t in student.state_dict().items()}
    BiasCorrection(images=8).heal(student, dense, images, HealContext(pruned=mask))
    layer = next(layer for layer in mask.keep if student.get_submodule(layer).weight.shape[-1] == 3)
    mean_in, _ = _moments(dense, images, layer, "input")
    mean_out, _ = _moments(dense, images, layer, "output")
    height, width = wiring.input_size[layer]
    image = mean_in.float().view(1, -1, 1, 1) * torch.ones(1, len(mean_in), height, width)
    with torch.no_grad():
        answer = student.get_submodule(layer)(image).mean((0, 2, 3))
    name = f"{wiring.norm_after[layer]}.running_mean"
    shift = before[name] - student.state_dict()[name]
    assert torch.allclose(shift.double(), mean_out - answer.double(), atol=1e-4)


def test_weight_statistics_are_pots() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(5, 3, 3, 3, generator=generator) + 0.3
    keep = torch.rand(dense.shape, generator=generator) > 0.6
    found = corrected(dense, dense * keep, keep).numpy()
    for row in range(5):
        w, pruned, mask = dense[row].numpy(), (dense * keep)[row].numpy(), keep[row].numpy()
        scaled = pruned * (w.std() / (pruned.std() + 1e-9))
        expected = (scaled + (w.mean() - scaled.mean())) * mask
        assert np.allclose(found[row], expected, atol=1e-6)


# What is refused


def test_methods_for_batch_norms_refuse_networks_without_and_the_reverse() -> None:
    budget, allocator, pruner = Budget(weights=0.5), Uniform(), Magnitude()
    for healer in (BatchnormRecalibration(), SignalResuscitation(), LayerwiseVariance()):
        with pytest.raises(ArchitectureError, match="has none"):
            check(nets.build("vit"), budget, allocator, pruner, [healer])
    with pytest.raises(ArchitectureError, match="for networks without BatchNorm"):
        check(nets.build("resnet"), budget, allocator, pruner, [Repair()])


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: BatchnormRecalibration(mode="cumulativ"),  # type: ignore[arg-type]
        lambda: BatchnormRecalibration(batch_size=1),
        lambda: BatchnormRecalibration(momentum=0),
        lambda: SignalResuscitation(shrinkage="mean"),  # type: ignore[arg-type]
        lambda: VarianceMatching(images=0),
        lambda: Repair(images=0),
    ],
)
def test_a_wrong_param_is_refused(wrong: object) -> None:
    with pytest.raises(MethodError):
        wrong()  # type: ignore[operator]


def test_the_first_images_are_taken_whatever_the_batches() -> None:
    images = nets.images(10)
    assert torch.equal(torch.cat(first(images, 7, 3)), images[:7])
    assert torch.equal(torch.cat(first(list(images.split(4)), 7, 3)), images[:7])
    assert torch.equal(torch.cat(first(images, 99, 4)), images)
