"""Least squares on a mask against numpy row by row, and variance matching against hooks that are left in."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import heal
from heal import masking
from heal.errors import ImagesError, MethodError, NumericalError
from heal.healers import joint_moments, least_squares, masked_rows
from heal.healers.closed_form import ClosedForm
from heal.healers.held_out import is_kept, refuse_shuffled, split
from heal.healers.least_squares import LeastSquares
from heal.healers.variance_matching import VarianceMatching
from heal.method import HealContext, Healer
from heal.values import NM, Mask
from tests.heal import nets
from tests.heal.test_training import masked


def convolutional() -> nn.Module:
    """Layers with and without bias, before a BatchNorm or none, grouped, strided and padded."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 2, 2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 5),
    )
    nets.randomise(model)
    return model.eval()


def pruned_at_random(dense: nn.Module) -> tuple[nn.Module, Mask]:
    """A student whose rows keep unequal numbers of weights, one none and one all; what stays was moved."""
    generator, student, keep = torch.Generator().manual_seed(1), copy.deepcopy(dense), {}
    for name, module in student.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            keep[name] = torch.rand(module.weight.shape, generator=generator) < 0.6
            keep[name][0], keep[name][1] = False, True
            with torch.no_grad():
                module.weight.mul_(1 + 0.1 * torch.randn(module.weight.shape, generator=generator)).mul_(keep[name])
    return student, Mask(keep)


def patches(layer: nn.Module, x: Tensor) -> np.ndarray:
    """[groups, rows, d] of what the weight multiplies, by slicing."""
    if isinstance(layer, nn.Linear):
        return x.double().numpy()[None]
    assert isinstance(layer, nn.Conv2d)
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    padded = np.pad(x.double().numpy(), ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    rows = [
        padded[n, :, i : i + kh, j : j + kw]
        for n in range(len(x))
        for i in range(0, padded.shape[2] - kh + 1, sh)
        for j in range(0, padded.shape[3] - kw + 1, sw)
    ]
    return np.stack(rows).reshape(len(rows), layer.groups, -1).transpose(1, 0, 2)


def ridge(x: np.ndarray, y: np.ndarray, start: np.ndarray, damping: float) -> np.ndarray:
    """By least squares on rows that are added for the ridge; x and y are centred."""
    if not len(start):
        return start
    share = damping * np.square(x).mean(0).mean()
    design = np.vstack([x / np.sqrt(len(x)), np.sqrt(share) * np.eye(len(start))])
    wanted = np.hstack([y / np.sqrt(len(x)), np.sqrt(share) * start])
    return np.linalg.lstsq(design, wanted, rcond=None)[0]


def by_brute_force(dense: nn.Module, student: nn.Module, mask: Mask, images: Tensor, method: LeastSquares) -> nn.Module:
    """Every row by numpy on every image but each tenth, in the order of the layers; nothing is refused."""
    expected = copy.deepcopy(student)
    fitted = images[torch.arange(len(images)) % 10 != 0]
    for name, keep in mask.keep.items():
        layer = expected.get_submodule(name)
        source = dense if method.inputs == "dense" else expected
        x = patches(layer, nets.passing(source, name, fitted)[0])
        y = nets.passing(dense, name, fitted)[1].double()
        y = (y.movedim(1, -1) if y.ndim == 4 else y).flatten(0, -2).numpy()
        weight, bias = layer.weight.detach().double().flatten(1).numpy(), np.zeros(len(keep))
        for row, kept in enumerate(keep.flatten(1).numpy()):
            seen = x[row * len(x) // len(keep)][:, kept]
            weight[row, kept] = ridge(
                seen - seen.mean(0), y[:, row] - y[:, row].mean(), weight[row, kept], method.damping
            )
            bias[row] = y[:, row].mean() - seen.mean(0) @ weight[row, kept]
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight).view_as(layer.weight))
            if name == "0":
                expected[1].running_mean.copy_(dense[1].running_mean - torch.from_numpy(bias))
            else:
                layer.bias = nn.Parameter(torch.from_numpy(bias).float())
    return expected


@pytest.mark.parametrize("damping", [1e-6, 0.3])
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_least_squares_is_numpys_row_by_row(inputs: str, damping: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "is_kept", lambda before, after: True)
    dense, images = convolutional(), nets.images(150, size=16)
    student, mask = pruned_at_random(dense)
    method = LeastSquares(inputs=inputs, damping=damping)
    expected = by_brute_force(dense, student, mask, images, method)
    report = method.heal(student, dense, images, HealContext(pruned=mask))
    assert not report.notes and masking.holds(student, mask)
    for (name, value), other in zip(expected.state_dict().items(), student.state_dict().items(), strict=True):
        assert name == other[0]
        assert torch.allclose(value, other[1], rtol=1e-3, atol=2e-4), name


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_neither_rows_at_once_nor_batches_nor_passes_matter(inputs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, images = convolutional(), nets.images(60, size=16)
    student, mask = pruned_at_random(dense)
    other = copy.deepcopy(student)
    LeastSquares(inputs=inputs).heal(student, dense, images, HealContext(pruned=mask))
    monkeypatch.setattr(masked_rows, "ROOM", 1 << 13)
    monkeypatch.setattr(joint_moments, "ROOM", 1)
    monkeypatch.setattr(least_squares, "ROOM", 1)
    batches = list(torch.split(images, 7))
    LeastSquares(inputs=inputs).heal(other, dense, batches, HealContext(pruned=mask))
    for value, again in zip(student.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.allclose(value, again, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", ["vit", "swin", "resnet", "mobilenetv2"])
def test_no_layer_fits_worse_than_before(net: str) -> None:
    dense, student, mask = masked(net, 0.6)
    images = nets.images(40)
    fitted = images[torch.arange(40) % 10 != 0]
    before = copy.deepcopy(student)
    report = LeastSquares(inputs="dense").heal(student, dense, images, HealContext(pruned=mask))
    stay = {note.split()[0] for note in report.notes}
    assert masking.holds(student, mask) and len(stay) < len(mask.keep) / 2
    for layer in mask.keep:
        entered, wanted = nets.passing(dense, layer, fitted)
        apart = [model.get_submodule(layer)(entered) - wanted for model in (before, student)]
        over = tuple(
            axis
            for axis in range(wanted.ndim)
            if axis != (1 if wanted.ndim == 4 and net != "swin" else wanted.ndim - 1)
        )
        first, then = (float(error.detach().var(over, correction=0).sum()) for error in apart)
        assert then <= first * (1 + 1e-5) + 1e-9 and (layer in stay) == (then == first), layer


def test_a_pattern_is_solved_and_stays() -> None:
    dense, images = nets.build("vit"), nets.images(60)
    answers = []
    for healers in (["none"], ["least_squares"]):
        result = heal.recompress(dense, images, heal.Budget(weights=0.5), "n_of_m", "magnitude", healers)
        assert isinstance(result.pruned, Mask) and masking.holds(result.model, result.pruned)
        assert all(masking.is_n_of_m(keep, NM(2, 4)) for keep in result.pruned.keep.values())
        answers.append(result.model(nets.images(20, seed=1)))
    wanted = dense(nets.images(20, seed=1))
    assert (answers[1] - wanted).norm() < 0.8 * (answers[0] - wanted).norm()


def test_what_worsens_held_out_images_is_refused() -> None:
    """Three images to fit 75 weights a row, and a held-out one that is nothing like them."""
    dense, student, mask = masked("vit", 0.3)
    images = nets.images(4)
    images[1:] = 0.02 * images[1:] + images[1:2]
    images[0] = 30 * images[0]
    before = copy.deepcopy(student.state_dict())
    told: list[str] = []
    report = LeastSquares(damping=1e-5).heal(student, dense, images, HealContext(pruned=mask, log=told.append))
    stay = {note.split()[0] for note in report.notes}
    assert stay and all("on held-out images its error would go from" in note for note in report.notes)
    assert told == [f"least_squares: {note}" for note in report.notes]
    for layer in mask.keep:
        unmoved = torch.equal(student.state_dict()[f"{layer}.weight"], before[f"{layer}.weight"])
        assert unmoved == (layer in stay), layer


def test_a_layer_that_costs_too_much_stays_and_is_named() -> None:
    dense, student, mask = masked("vit", 0.5)
    cost = {layer: float((keep.sum(1).double() ** 3).sum() / 3) for layer, keep in mask.keep.items()}
    most = sorted(cost.values())[len(cost) // 2]
    before = copy.deepcopy(student.state_dict())
    report = LeastSquares(most=most).heal(student, dense, nets.images(30), HealContext(pruned=mask))
    dear = {layer for layer, needed in cost.items() if needed > most}
    told = {note.split()[0] for note in report.notes if "more than least_squares.most" in note}
    assert dear and told == dear
    assert all(torch.equal(student.state_dict()[f"{layer}.weight"], before[f"{layer}.weight"]) for layer in dear)


def test_a_moment_that_is_not_positive_definite_is_refused() -> None:
    moment = torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    rows = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(NumericalError, match="not positive definite at damping 0"):
        masked_rows.solved(moment, moment[:, :1], rows, rows.bool(), 0.001)


# Held-out images


@pytest.mark.parametrize("as_given", [lambda x: x, lambda x: list(torch.split(x, 4))], ids=["array", "batches"])
def test_every_tenth_image_is_held_out(as_given: Callable[[Tensor], object]) -> None:
    images = torch.arange(25.0).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    fitted, judging = (torch.cat(list(part))[:, 0, 0, 0].tolist() for part in split(as_given(images), 22, 8))  # type: ignore[arg-type]
    assert judging == [0, 10, 20] and fitted == [n for n in range(22) if n % 10]


@pytest.mark.parametrize("healer", [LeastSquares(), LeastSquares(inputs="dense"), ClosedForm(inputs="pruned")])
def test_a_stream_that_shuffles_is_refused_where_two_passes_hold_the_same_out(healer: Healer) -> None:
    images = list(nets.images(40))
    shuffling, steady = (DataLoader(images, batch_size=8, shuffle=shuffle) for shuffle in (True, False))  # type: ignore[arg-type]
    cut = isinstance(healer, ClosedForm)
    methods = ("global_variance", "variance") if cut else ("uniform", "magnitude")
    budget, model = heal.Budget(neurons=0.5) if cut else heal.Budget(weights=0.5), nets.build("vit")
    with pytest.raises(ImagesError, match="no image can be held out; pass shuffle=False"):
        heal.recompress(model, shuffling, budget, *methods, [healer])
    heal.recompress(model, steady, budget, *methods, [healer])


def test_closed_form_on_dense_inputs_takes_images_in_any_order() -> None:
    images = list(nets.images(40))
    loader = DataLoader(images, batch_size=8, shuffle=True)  # type: ignore[arg-type]
    heal.recompress(nets.build("vit"), loader, heal.Budget(neurons=0.5), "global_variance", "variance", ["closed_form"])


def test_what_is_no_number_does_not_count_as_shuffled() -> None:
    refuse_shuffled(DataLoader(nets.images(4) * torch.nan, batch_size=2))  # type: ignore[arg-type]


def test_a_repair_stays_where_held_out_images_are_no_worse() -> None:
    assert is_kept(1.0, 1.0) and is_kept(1.0, 0.5) and not is_kept(1.0, 1.1) and not is_kept(1.0, float("nan"))
    with pytest.raises(ImagesError, match="none is left to fit"):
        split(nets.images(1), 10, 8)


# Variance matching, as OBC published it


def hooked(dense: nn.Module, student: nn.Module, images: Tensor, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    """As published: hooks that correct every norm's output, measured one after another in one pass, and stay.

    In float64: in float32 what a dead channel's mean is rounded by is divided by 1e-9, too.
    """
    wanted: dict[str, tuple[Tensor, Tensor]] = {}
    dense, corrected, images = copy.deepcopy(dense).double(), copy.deepcopy(student).double(), images.double()

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        over = (0, 2, 3) if x.ndim == 4 else tuple(range(x.ndim - 1))
        return x.mean(over, keepdim=True), x.std(over, keepdim=True)

    def correct(name: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        found: list[tuple[Tensor, Tensor]] = []

        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            found.extend([] if found else [moments(output)])
            (mean, std), (to_mean, to_std) = found[0], wanted[name]
            return (output - mean) * (to_std / (std + 1e-9)) + to_mean

        return hook

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: wanted.__setitem__(name, moments(output))

    names = [name for name, module in dense.named_modules() if isinstance(module, kinds)]
    for name in names:
        dense.get_submodule(name).register_forward_hook(note(name))
    dense(images)
    for name in names:
        corrected.get_submodule(name).register_forward_hook(correct(name))
    corrected(images)
    return corrected


@pytest.mark.parametrize("net", ["vit", "resnet", "bottleneck"])
def test_variance_matching_is_the_published_hooks(net: str) -> None:
    dense, student, mask = masked(net)
    images, others = nets.images(16), nets.images(6, seed=7)
    with torch.no_grad():
        expected = hooked(dense, student, images, (nn.BatchNorm2d, nn.LayerNorm))(others.double()).float()
        VarianceMatching(images=16).heal(student, dense, images, HealContext(pruned=mask))
        assert torch.allclose(student(others), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert masking.holds(student, mask) and not any(module._forward_hooks for module in student.modules())


def test_an_activation_inside_a_norm_does_not_matter() -> None:
    """MobileNetV2's BatchNorms hold their activation."""
    dense, student, mask = masked("mobilenetv2")
    images = nets.images(8)
    VarianceMatching(images=8).heal(student, dense, images, HealContext(pruned=mask))
    norm = "blocks.1.0.bn1"
    entered = [nets.passing(model, norm, images)[0] for model in (dense, student)]
    outputs = []
    for model, x in zip((dense, student), entered, strict=True):
        module = model.get_submodule(norm)
        statistics = module.running_mean, module.running_var, module.weight, module.bias
        outputs.append(nn.functional.batch_norm(x, *statistics, eps=module.eps).detach())
    (mean, std), (to_mean, to_std) = ((y.mean((0, 2, 3)), y.std((0, 2, 3))) for y in outputs)
    dead = to_std == 0
    assert torch.allclose(mean, to_mean, atol=1e-4) and torch.allclose(std[~dead], to_std[~dead], rtol=1e-3)
    assert bool(dead.any()) and not bool(dead.all())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LeastSquares(damping=0), r"least_squares\.damping = 0 must be greater than 0"),
        (lambda: LeastSquares(images=1), r"least_squares\.images = 1 must be at least 2"),
        (lambda: LeastSquares(most=0), r"least_squares\.most = 0 must be greater than 0"),
        (lambda: LeastSquares(inputs="denes"), "denes"),  # type: ignore[arg-type]
    ],
)
def test_wrong_params_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        make()


@pytest.mark.parametrize(
    ("healers", "said"),
    [
        (["starfish", "least_squares"], "least_squares solves layers anew .* put it first"),
        (["least_squares", "bias_correction"], "which least_squares rewrote"),
    ],
)
def test_an_order_that_undoes_itself_is_refused(healers: list[str], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        heal.recompress(nets.build("resnet"), nets.images(), heal.Budget(weights=0.5), "uniform", "magnitude", healers)
