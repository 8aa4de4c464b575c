"""The transition of curves that are known, and of a network that was really pruned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from heal.allocators.uniform import Uniform
from heal.errors import InputError
from heal.healers.batchnorm_recalibration import BatchnormRecalibration
from heal.method import HealContext, HealingReport
from heal.pruners.magnitude import Magnitude
from heal.transition import is_repair_sensitive, locate, measure
from heal.values import Mask
from tests.heal import nets

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.93, 0.95, 0.97, 0.99)


def _curve(s: np.ndarray, middle: float, steepness: float) -> np.ndarray:
    logit = np.log(s / (1 - s))
    return 1 / (1 + np.exp(-steepness * (np.log(middle / (1 - middle)) - logit)))


@settings(max_examples=50, deadline=None)
@given(middle=st.floats(0.75, 0.97), steepness=st.floats(1.5, 8), classes=st.integers(2, 1000))
def test_a_logistic_is_found_again(middle: float, steepness: float, classes: int) -> None:
    s = np.array(SPARSITIES)
    height = _curve(s, middle, steepness)
    found = locate(SPARSITIES, (1 / classes + height * (0.97 - 1 / classes)).tolist(), classes, plateau=0.97)
    assert found.steepness == pytest.approx(steepness, rel=1e-3)
    low, high = found.band
    assert _curve(np.array([low, high]), middle, steepness) == pytest.approx([0.8, 0.2], abs=1e-3)
    fine = np.arange(1e-4, 1, 1e-4)
    assert found.centre == pytest.approx(fine[np.gradient(_curve(fine, middle, steepness)).argmin()], abs=1e-3)


def test_with_noise_it_is_scipys_least_squares() -> None:
    rng = np.random.default_rng(0)
    s = np.array(SPARSITIES)
    noisy = _curve(s, 0.9, 3) + 0.03 * rng.standard_normal(len(s))
    (middle, steepness), _ = curve_fit(_curve, s, noisy, p0=(0.9, 2))
    found = locate(SPARSITIES, (0.1 + 0.9 * noisy).tolist(), classes=10)
    assert found.steepness == pytest.approx(steepness, rel=1e-3)
    assert _curve(np.array(found.band), middle, steepness) == pytest.approx([0.8, 0.2], abs=1e-3)
    assert found.residual == pytest.approx(np.sqrt(np.mean((_curve(s, middle, steepness) - noisy) ** 2)), rel=1e-3)


def test_a_curve_without_a_transition_is_refused() -> None:
    with pytest.raises(InputError, match="never crosses"):
        locate((0.1, 0.2, 0.3, 0.4), (0.99, 0.98, 0.97, 0.96), classes=10)
    with pytest.raises(InputError, match="four or more"):
        locate((0.5, 0.9), (0.9, 0.1), classes=10)
    for agreements in ((0.1, 0.1, 1.0, 1.0), (1.0, 0.2, 0.9, 0.1)):
        with pytest.raises(InputError, match="does not fall along a logistic"):
            locate((0.5, 0.7, 0.9, 0.95), agreements, classes=10)


def test_the_repair_sensitive_regime_is_where_recalibration_alone_fails() -> None:
    assert is_repair_sensitive(0.2, 0.4, classes=10)
    assert not is_repair_sensitive(0.3, 0.4, classes=10), "recalibration is enough"
    assert not is_repair_sensitive(0.1, 0.2, classes=10), "nothing is"


def test_a_healer_gets_the_mask_that_the_one_before_left() -> None:
    masks: list[Mask] = []

    class Moves:
        unit, needs = "weights", frozenset[str]()

        def heal(self, student: object, teacher: object, images: object, context: HealContext) -> HealingReport:
            assert isinstance(context.pruned, Mask)
            masks.append(context.pruned)
            moved = Mask({layer: ~keep for layer, keep in context.pruned.keep.items()})
            return HealingReport("moves", {}, pruned=moved)

    measure(nets.build("resnet"), nets.images(4), nets.images(4), (0.5,), Uniform(), Magnitude(), [Moves(), Moves()])
    first, second = masks
    assert all((first.keep[layer] == ~keep).all() for layer, keep in second.keep.items())


def test_agreement_falls_with_sparsity_and_is_whole_without() -> None:
    model = nets.build("resnet")
    found = measure(
        model, nets.images(8), nets.images(16, seed=1), (0.0, 0.99), Uniform(), Magnitude(), [BatchnormRecalibration()]
    )
    assert found[0] > found[1]
    assert measure(model, nets.images(4), nets.images(8), (0.0,), Uniform(), Magnitude(), []) == [1.0]
