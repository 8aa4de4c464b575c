"""The closed form's options: damping by rule, pruned inputs, denoised moments, and what held-out images refuse."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import heal
from heal.allocators.global_variance import GlobalVariance
from heal.denoising import denoised
from heal.errors import MethodError
from heal.families.lookup import describe
from heal.healers.closed_form import ClosedForm
from heal.healers.held_out import is_held_out
from heal.healers.ridge import GRID, oas
from heal.merging import merge, without
from heal.method import AllocationContext, HealContext, HealingReport, taps
from heal.pruned import apply
from heal.pruners.variance import Variance
from heal.statistics import capture, moments
from heal.values import Budget, ChannelCut
from tests.heal import nets


def healed(
    model: nn.Module, images: Tensor, healer: ClosedForm, fitted: Tensor | None = None
) -> tuple[nn.Module, ChannelCut, HealingReport]:
    """Half of the channels cut, evenly. fitted: the images of the statistics, if not the same."""
    allocator, pruner = GlobalVariance(scope="layer"), Variance()
    statistics = capture(model, images if fitted is None else fitted, taps(model, [allocator, pruner, healer]))
    allocation = allocator.allocate(model, Budget(neurons=0.5), AllocationContext(statistics=statistics))
    pruned = pruner.prune(model, allocation, statistics)
    student = copy.deepcopy(model)
    apply(student, pruned)
    report = healer.heal(student, model, images, HealContext(statistics=statistics, pruned=pruned))
    return student, pruned, report


def rows(model: nn.Module, layer: str, images: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Inputs [n, in] and outputs [n, out] of a Linear."""
    x, y = (tensor.double().flatten(0, -2).numpy() for tensor in nets.passing(model, layer, images))
    return x, y


def test_what_was_merged_can_be_taken_off_again() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (moments(torch.randn(1, n, 5, generator=generator) + 3, comoment=True) for n in (40, 13))
    rest = without(merge(a, b), b)
    assert rest.count == a.count
    for name in ("mean", "m2", "comoment"):
        torch.testing.assert_close(getattr(rest, name), getattr(a, name), rtol=1e-9, atol=1e-9)


def test_oas_is_the_published_estimator() -> None:
    """Chen, Wiesel, Eldar and Hero 2010; scikit-learn's leaves out terms of 1/p."""
    from sklearn.covariance import OAS

    x = np.random.default_rng(0).normal(size=(60, 12)) @ np.diag(np.linspace(1, 3, 12))
    covariance = torch.from_numpy(x.T @ x / len(x))
    width, n = 12, 60
    squared, trace = float(covariance.square().sum()), float(covariance.trace())
    by_hand = ((1 - 2 / width) * squared + trace**2) / ((n + 1 - 2 / width) * (squared - trace**2 / width))
    assert oas(covariance, n) == pytest.approx(min(1.0, by_hand), rel=1e-12)
    assert oas(covariance, n) == pytest.approx(OAS(assume_centered=True).fit(x).shrinkage_, rel=0.25)
    assert oas(torch.eye(4, dtype=torch.float64), 100) == 1.0


def test_on_pruned_inputs_every_consumer_is_numpys_least_squares() -> None:
    """In forward order, on what the student gives by then, towards the dense outputs."""
    model, images = nets.build("vit"), nets.images(40)
    student, pruned, report = healed(model, images, ClosedForm(damping=1e-9, inputs="pruned"))
    assert not report.notes
    for pair in describe(model).pairs:
        _, wanted = rows(model, pair.consumer, images)
        x, found = rows(student, pair.consumer, images)
        assert x.shape[1] == len(pruned.keep[pair.producer])
        design = np.hstack([x, np.ones((len(x), 1))])
        best = design @ np.linalg.lstsq(design, wanted, rcond=None)[0]
        np.testing.assert_allclose(((found - wanted) ** 2).sum(), ((best - wanted) ** 2).sum(), rtol=1e-4)


def test_pruned_inputs_undo_what_drifted_before() -> None:
    model, images = nets.build("vit"), nets.images(64)
    with torch.no_grad():
        dense = model(images)
        errors = {
            inputs: float((healed(model, images, ClosedForm(inputs=inputs))[0](images) - dense).norm())  # type: ignore[arg-type]
            for inputs in ("dense", "pruned")
        }
    assert errors["pruned"] < errors["dense"]


def test_a_damping_by_held_out_images_is_the_best_of_the_grid() -> None:
    """On the held-out images no fixed damping of the grid, fitted without them, answers a consumer better."""
    model, images = nets.build("vit"), nets.images(20)
    held = is_held_out(torch.arange(20))
    student, pruned, _ = healed(model, images, ClosedForm(damping="held_out"))
    for pair in describe(model).pairs:
        keep = pruned.keep[pair.producer].numpy()
        (x, y), (x_held, y_held) = (rows(model, pair.consumer, part) for part in (images[~held], images[held]))
        errors = {
            share: error(x[:, keep], y, x_held[:, keep], y_held, model, pair.consumer, keep, share) for share in GRID
        }
        best = min(errors, key=lambda share: errors[share])
        fixed, _, _ = healed(model, images, ClosedForm(damping=best))
        torch.testing.assert_close(
            student.get_parameter(f"{pair.consumer}.weight"), fixed.get_parameter(f"{pair.consumer}.weight")
        )


def error(
    x: np.ndarray[Any, Any],
    y: np.ndarray[Any, Any],
    x_held: np.ndarray[Any, Any],
    y_held: np.ndarray[Any, Any],
    model: nn.Module,
    consumer: str,
    keep: np.ndarray[Any, Any],
    share: float,
) -> float:
    """Of ridge regression towards the old weights, by numpy's normal equations."""
    anchor = model.get_parameter(f"{consumer}.weight").detach().double().numpy()[:, keep]
    centred, answers = x - x.mean(0), y - y.mean(0)
    moment = centred.T @ centred / len(x)
    pull = share * np.diag(moment).mean()
    weight = np.linalg.solve(moment + pull * np.eye(len(moment)), centred.T @ answers / len(x) + pull * anchor.T).T
    found = x_held @ weight.T + (y.mean(0) - weight @ x.mean(0))
    return float(((found - y_held) ** 2).sum())


def test_a_solution_that_answers_held_out_images_worse_is_refused_and_said_so() -> None:
    """The held-out image is of another kind: what fits the others is worse there than the folded mean."""
    model = nets.build("vit")
    images = nets.images(4)
    images[0] = 40 * torch.sign(images[0])
    student, pruned, report = healed(model, images, ClosedForm(damping=1e-6))
    assert report.notes and all("has its mean folded only" in note for note in report.notes)
    refused = [note.split()[0] for note in report.notes]
    for pair in describe(model).pairs:
        if pair.consumer in refused:
            expected = model.get_parameter(f"{pair.consumer}.weight")[:, pruned.keep[pair.producer]]
            torch.testing.assert_close(student.get_parameter(f"{pair.consumer}.weight"), expected)


@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_nothing_is_said_of_a_consumer_that_lost_nothing(inputs: Any) -> None:
    model, images = nets.build("resnet"), nets.images(20)
    statistics = capture(model, images, taps(model, [GlobalVariance(), Variance(), ClosedForm()]))
    cut = Variance().prune(
        model,
        GlobalVariance().allocate(model, Budget(neurons=0.0), AllocationContext(statistics=statistics)),
        statistics,
    )
    student = copy.deepcopy(model)
    report = ClosedForm(inputs=inputs).heal(student, model, images, HealContext(statistics=statistics, pruned=cut))
    assert report.notes == ()
    torch.testing.assert_close(student(images), model(images), rtol=1e-3, atol=1e-3)


def test_the_denoised_moment_takes_the_samples_place() -> None:
    model, images = nets.build("vit"), nets.images(64)
    healer = ClosedForm(moment="denoised", damping=1e-2)
    student, pruned, _ = healed(model, images, healer)
    statistics = capture(model, images, taps(model, [healer]))
    for pair in describe(model).pairs:
        stats, keep = statistics[f"{pair.consumer}.input"], pruned.keep[pair.producer]
        signal, weight = denoised(stats), model.get_parameter(f"{pair.consumer}.weight").detach().double()
        pull = 1e-2 * signal.diagonal()[keep].mean()
        moment = signal[keep][:, keep] + pull * torch.eye(len(keep), dtype=torch.float64)
        expected = torch.linalg.solve(moment, (weight @ signal[:, keep] + pull * weight[:, keep]).T).T
        found = student.get_parameter(f"{pair.consumer}.weight").detach().double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"damping": "oass"}, "did you mean 'oas'"),
        ({"damping": 0.0}, "must be greater than 0"),
        ({"moment": "denoised", "inputs": "pruned"}, "set inputs: dense"),
    ],
)
def test_wrong_params_are_refused(params: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        ClosedForm(**params)


def test_oas_runs_end_to_end() -> None:
    model, images = nets.build("bottleneck"), nets.images(16, size=64)
    result = heal.recompress(model, images, Budget(neurons=0.3), healers=[ClosedForm(damping="oas")])
    assert result.report.healing[0].params["damping"] == "oas"
