"""Closed form against least squares, STARFISH against its definition, and what both must leave alone."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heal import checkpoint, masking
from heal.allocators.global_variance import GlobalVariance
from heal.allocators.uniform import Uniform
from heal.errors import ArchitectureError, ImagesError, NumericalError
from heal.families.family import Family
from heal.families.lookup import describe
from heal.healers.closed_form import ClosedForm, CutSite, answered
from heal.healers.ridge import ridge
from heal.healers.starfish import Starfish
from heal.method import AllocationContext, HealContext, taps
from heal.pruned import apply
from heal.pruners.magnitude import Magnitude
from heal.pruners.variance import Variance
from heal.states import TeacherStates, alignment, cosine
from heal.statistics import capture, moments
from heal.values import Budget, ChannelCut, LayerStats, Mask
from tests.heal import nets

WITH_PAIRS = ["vit", "deit", "swin", "swinv2", "convnext"]


def _correlated(rows: int = 4000, width: int = 24, seed: int = 0) -> tuple[Tensor, LayerStats]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    x = torch.randn(1, rows, width, generator=generator) @ mixing + 2
    return x[0].double(), moments(x, comoment=True)


def _layer(width: int = 24, outputs: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(outputs, width, generator=generator), torch.randn(outputs, generator=generator)


def solve(weight: Tensor, bias: Tensor, stats: LayerStats, keep: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The repaired (weight [out, kept], bias [out]) of a layer alone."""
    site = CutSite("", keep, torch.arange(len(weight)))
    joint = answered(weight.double(), bias.double(), stats, site)
    solved, offset = ridge(joint, weight[:, keep].double().unsqueeze(0), damping)
    return solved[0], offset[0]


def _pruned(model: nn.Module, images: Tensor, kind: str) -> tuple[nn.Module, Mask | ChannelCut, HealContext]:
    student = copy.deepcopy(model)
    statistics = capture(model, images, taps(model, [GlobalVariance(), Variance(), ClosedForm()]))
    pruned: Mask | ChannelCut
    if kind == "cut":
        allocation = GlobalVariance().allocate(model, Budget(neurons=0.5), AllocationContext(statistics=statistics))
        pruned = Variance().prune(model, allocation, statistics)
    else:
        pruned = Magnitude().prune(model, Uniform().allocate(model, Budget(weights=0.7), AllocationContext()), {})
    apply(student, pruned)
    return student, pruned, HealContext(statistics=statistics, pruned=pruned)


def test_closed_form_is_least_squares_when_hardly_damped() -> None:
    x, stats = _correlated()
    weight, bias = _layer()
    keep = torch.arange(0, 24, 2)
    solved, offset = solve(weight, bias, stats, keep, damping=1e-9)
    design = np.hstack([x[:, keep].numpy(), np.ones((len(x), 1))])
    target = (x @ weight.double().T + bias.double()).numpy()
    expected = np.linalg.lstsq(design, target, rcond=None)[0]
    np.testing.assert_allclose(solved.numpy(), expected[:-1].T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(offset.numpy(), expected[-1], rtol=1e-3, atol=1e-2)


def test_closed_form_is_corps_affine_compensation() -> None:
    _, stats = _correlated()
    weight, bias = _layer()
    keep, cut = torch.arange(0, 16), torch.arange(16, 24)
    c, mu, w = stats.covariance, stats.mean, weight.double()
    ridge = 1e-2 * c.diagonal()[keep].mean()
    b = c[cut][:, keep] @ torch.linalg.inv(c[keep][:, keep] + ridge * torch.eye(16, dtype=torch.float64))
    offset = mu[cut] - b @ mu[keep]
    solved, found = solve(weight, bias, stats, keep, damping=1e-2)
    torch.testing.assert_close(solved, w[:, keep] + w[:, cut] @ b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found, bias.double() + w[:, cut] @ offset, rtol=1e-10, atol=1e-10)


def test_closed_form_is_ob2cs_update_from_the_full_inverse() -> None:
    _, stats = _correlated()
    weight, bias = _layer()
    keep, cut = torch.arange(0, 16), torch.arange(16, 24)
    c, w = stats.covariance, weight.double()
    ridge = 1e-2 * c.diagonal()[keep].mean()
    inverse = torch.linalg.inv(c + ridge * torch.eye(24, dtype=torch.float64))
    update = -w[:, cut] @ torch.linalg.inv(inverse[cut][:, cut]) @ inverse[cut]
    solved, found = solve(weight, bias, stats, keep, damping=1e-2)
    torch.testing.assert_close(solved, (w + update)[:, keep], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, bias.double() - update @ stats.mean, rtol=1e-9, atol=1e-9)


def test_closed_form_becomes_mean_folding_when_damped_without_bound() -> None:
    _, stats = _correlated()
    weight, bias = _layer()
    keep, cut = torch.arange(0, 16), torch.arange(16, 24)
    solved, offset = solve(weight, bias, stats, keep, damping=1e9)
    torch.testing.assert_close(solved, weight[:, keep].double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(offset, bias.double() + weight[:, cut].double() @ stats.mean[cut], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITH_PAIRS)
def test_folded_means_keep_every_consumers_mean_output(name: str) -> None:
    """What VBP promises: with a neuron replaced by its mean, the consumer's mean output does not move."""
    model, images = nets.build(name), nets.images(8)
    _, pruned, context = _pruned(model, images, "cut")
    assert isinstance(pruned, ChannelCut)
    for pair in describe(model).pairs:
        mean, keep = context.statistics[f"{pair.consumer}.input"].mean, pruned.keep[pair.producer]
        consumer = model.get_submodule(pair.consumer)
        w = consumer.get_parameter("weight").detach().flatten(1).double()
        dense = w @ mean + consumer.get_parameter("bias").detach().double()
        cut = w[:, keep] @ mean[keep] + pruned.updates[f"{pair.consumer}.bias"].double()
        torch.testing.assert_close(cut, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITH_PAIRS)
def test_closed_form_brings_the_cut_network_nearer_to_the_dense_one(name: str) -> None:
    model, images = nets.build(name), nets.images(16)
    student, _, context = _pruned(model, images, "cut")
    with torch.no_grad():
        target, before = model(images), student(images)
        report = ClosedForm().heal(student, model, images, context)
        after = student(images)
    assert (after - target).norm() < (before - target).norm()
    assert report.alignment_after.keys() == set(describe(model).blocks)


def test_the_cosine_loss_is_the_one_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    slow = np.mean(
        [
            np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
            for a, b in zip(s.reshape(-1, 4).numpy(), t.reshape(-1, 4).numpy(), strict=True)
        ]
    )
    unit = t.reshape(-1, 4) / t.reshape(-1, 4).norm(dim=-1, keepdim=True)
    assert float(cosine(s.reshape(-1, 4), unit)) == pytest.approx(float(slow), rel=1e-5)


@pytest.mark.parametrize("name", list(nets.NETS))
@pytest.mark.parametrize("kind", ["cut", "mask"])
def test_starfish_heals_and_leaves_the_rest_alone(name: str, kind: str) -> None:
    if kind == "cut" and name not in WITH_PAIRS:
        pytest.skip("of so few noise images the mean of a channel says all, and nothing is left to heal")
    model, images = nets.build(name), nets.images(8)
    teacher_before = {key: value.clone() for key, value in model.state_dict().items()}
    student, pruned, context = _pruned(model, images, kind)
    trained = {f"{layer}.weight" for layer in describe(model).layers}
    frozen = {k: v.clone() for k, v in student.state_dict().items() if k not in trained}
    report = Starfish(epochs=6, batch_size=4, lr=3e-3).heal(student, model, images, context)
    assert np.mean(list(report.alignment_after.values())) > np.mean(list(report.alignment_before.values()))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in teacher_before.items())
    assert all(torch.equal(student.state_dict()[key], value) for key, value in frozen.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in (model, student) for m in net.modules())
    if isinstance(pruned, Mask):
        assert masking.holds(student, pruned)
        assert sum(int((student.get_parameter(f"{k}.weight") == 0).sum()) for k in pruned.keep) == pruned.zeros


def test_the_mask_holds_after_every_step() -> None:
    model, images = nets.build("vit"), nets.images(8)
    student, pruned, context = _pruned(model, images, "mask")
    assert isinstance(pruned, Mask)
    held = []
    context = HealContext(
        statistics=context.statistics, pruned=pruned, report=lambda *_: held.append(masking.holds(student, pruned))
    )
    Starfish(epochs=2, batch_size=4).heal(student, model, images, context)
    assert held == [True] * 4


def test_same_seed_same_bits_and_another_seed_another_order() -> None:
    model, images = nets.build("vit"), nets.images(8)

    def healed(seed: int) -> Tensor:
        student, pruned, context = _pruned(model, images, "mask")
        context = HealContext(statistics=context.statistics, pruned=pruned, seed=seed)
        Starfish(epochs=2, batch_size=4).heal(student, model, images, context)
        return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])

    assert torch.equal(healed(0), healed(0))
    assert not torch.equal(healed(0), healed(1))


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_resumed_training_ends_in_the_same_bits(
    stop_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "PAUSE", 0.0)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: 0.0))  # a checkpoint after every step
    model, images = nets.build("vit"), nets.images(12)
    method = Starfish(epochs=2, batch_size=4)

    def context_of(pruned: Mask | ChannelCut, stop: int | None) -> HealContext:
        def report(_: str, done: int, __: int) -> None:
            if stop is not None and done == stop + 1:
                raise KeyboardInterrupt

        return HealContext(pruned=pruned, checkpoints=tmp_path, report=report)

    undisturbed, pruned, _ = _pruned(model, images, "mask")
    expected = method.heal(undisturbed, model, images, HealContext(pruned=pruned))
    killed, pruned, _ = _pruned(model, images, "mask")
    with pytest.raises(KeyboardInterrupt):
        method.heal(killed, model, images, context_of(pruned, stop_after))
    resumed, pruned, _ = _pruned(model, images, "mask")
    report = method.heal(resumed, model, images, context_of(pruned, None))
    assert report.losses == expected.losses
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), undisturbed.parameters(), strict=True))


@pytest.mark.parametrize(("cache", "spill", "where"), [(2**30, 0, "memory"), (0, 2**30, "file"), (0, 0, "again")])
def test_where_teacher_states_are_kept_does_not_change_a_bit(cache: int, spill: int, where: str) -> None:
    model, images = nets.build("vit"), nets.images(8)
    student, pruned, _ = _pruned(model, images, "mask")
    reference, _, _ = _pruned(model, images, "mask")
    said: list[str] = []
    context = HealContext(pruned=pruned, cache_bytes=cache, spill_bytes=spill, log=said.append)
    Starfish(epochs=2, batch_size=4).heal(student, model, images, context)
    Starfish(epochs=2, batch_size=4).heal(reference, model, images, HealContext(pruned=pruned))
    assert any(where in line for line in said)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), reference.parameters(), strict=True))


class _Several(nn.Module):
    """A block that gives its state and something else."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.layer, self.kind = nn.Sequential(nn.Linear(6, 6)), kind

    def forward(self, x: Tensor | tuple[Tensor, ...]) -> object:
        x = self.layer(x if isinstance(x, Tensor) else x[0])
        return {"state": x} if self.kind is dict else self.kind([x, torch.zeros(1)])


@pytest.mark.parametrize("kind", [tuple, list])
def test_of_a_block_that_gives_several_values_the_first_tensor_counts(kind: type) -> None:
    model = nn.Sequential(_Several(kind), _Several(kind)).eval()
    other = copy.deepcopy(model)
    nn.init.normal_(other[1].layer[0].weight)
    found = alignment(other, model, torch.randn(8, 1, 2, 6))
    assert found["0"] == pytest.approx(1) and found["1"] < 0.99


def test_a_block_without_a_tensor_is_refused_by_name() -> None:
    model = nn.Sequential(_Several(tuple), _Several(dict)).eval()
    model.regrow_family = Family("mine", layers=("0.layer.0",), blocks=("0", "1"))  # type: ignore[assignment]
    with pytest.raises(ArchitectureError, match="block 1 gives a dict, not a tensor"):
        alignment(model, model, torch.randn(8, 1, 2, 6))


def test_a_loader_that_shuffles_is_refused() -> None:
    model, images = nets.build("vit"), nets.images(8)
    student, pruned, _ = _pruned(model, images, "mask")
    loader = torch.utils.data.DataLoader(images, batch_size=4, shuffle=True)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with pytest.raises(ImagesError, match="shuffle=False"):
        Starfish(epochs=5, batch_size=4).heal(student, model, loader, HealContext(pruned=pruned))


def test_a_loss_that_is_not_finite_stops_with_a_message() -> None:
    model, images = nets.build("vit"), nets.images(8)
    student, pruned, _ = _pruned(model, images, "mask")
    with torch.no_grad():
        student.get_parameter("blocks.0.norm1.weight").fill_(torch.inf)
    with pytest.raises(NumericalError, match="starfish: the loss is nan at step 0"):
        Starfish(epochs=1).heal(student, model, images, HealContext(pruned=pruned))


def test_alignment_of_a_network_with_itself_is_one() -> None:
    model = nets.build("swin")
    assert all(value == pytest.approx(1, abs=1e-5) for value in alignment(model, model, nets.images(4)).values())


def test_teacher_states_are_the_blocks_outputs() -> None:
    from heal.images import Replay

    model, images = nets.build("vit"), nets.images(4)
    states = TeacherStates(model, Replay(images, 4), 2**20, 0, lambda message: None)
    first, again = states.of(0, images), states.of(0, images)
    seen: list[Tensor] = []
    handle = model.get_submodule("blocks.1").register_forward_hook(lambda m, a, output: seen.append(output.detach()))
    with torch.no_grad():
        model(images)
    handle.remove()
    lengths = seen[0].flatten(0, 1).norm(dim=-1)
    unit = seen[0].flatten(0, 1) / lengths.unsqueeze(-1)
    torch.testing.assert_close(first.units["blocks.1"], unit, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(first.lengths["blocks.1"], lengths)
    assert torch.equal(first.units["blocks.1"], again.units["blocks.1"])
    assert torch.equal(first.lengths["blocks.1"], again.lengths["blocks.1"])
    assert torch.equal(first.logits, again.logits)
