"""The gate: every criterion has its measured value and limit, and passes at the limit."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.gate import Gate, GateError, Measured, judge
from tasks.params_schema import Promotion

GOOD = Measured(
    images=100,
    agreement=0.95,
    bytes=1000,
    macs=5000,
    dense_top1=0.92,
    champion_top1=0.91,
    challenger_top1=0.9,
    speedup=1.5,
)
GATE = Gate(
    max_drop_dense=0.02,
    max_drop_champion=0.01,
    min_agreement=0.95,
    max_bytes=1000,
    max_macs=5000,
    min_speedup=1.5,
)


def test_everything_passes_at_its_limit() -> None:
    verdict = judge(GOOD, GATE)
    assert verdict.passed
    assert [criterion.name for criterion in verdict.criteria] == [field.name for field in fields(Gate)]
    assert all(criterion.passed for criterion in verdict.criteria)


@pytest.mark.parametrize(
    ("worse", "rejecting"),
    [
        ({"challenger_top1": 0.89}, {"max_drop_dense", "max_drop_champion"}),
        ({"champion_top1": 0.93}, {"max_drop_champion"}),
        ({"agreement": 0.94}, {"min_agreement"}),
        ({"bytes": 1001}, {"max_bytes"}),
        ({"macs": 5001}, {"max_macs"}),
        ({"speedup": 1.49}, {"min_speedup"}),
        ({"speedup": None}, {"min_speedup"}),
        ({"agreement": math.nan}, {"min_agreement"}),
    ],
)
def test_one_criterion_is_enough_to_reject(worse: dict[str, float | None], rejecting: set[str]) -> None:
    verdict = judge(replace(GOOD, **worse), GATE)  # type: ignore[arg-type]
    assert not verdict.passed
    assert {criterion.name for criterion in verdict.criteria if not criterion.passed} == rejecting


def test_a_criterion_says_what_was_measured_and_what_is_allowed() -> None:
    (criterion,) = judge(GOOD, Gate(min_agreement=0.99)).criteria
    assert (criterion.measured, criterion.limit, criterion.passed) == (0.95, 0.99, False)
    assert str(criterion).split() == ["min_agreement", "0.9500", "limit", "0.9900", "rejected"]


def test_without_labels_only_agreement_judges_quality_and_the_verdict_says_so() -> None:
    blind = replace(GOOD, dense_top1=None, champion_top1=None, challenger_top1=None)
    verdict = judge(blind, GATE)
    assert [criterion.name for criterion in verdict.criteria] == [
        "min_agreement",
        "max_bytes",
        "max_macs",
        "min_speedup",
    ]
    assert "no labels" in str(verdict)


def test_without_labels_and_without_agreement_nothing_can_be_judged() -> None:
    blind = replace(GOOD, dense_top1=None, champion_top1=None, challenger_top1=None)
    with pytest.raises(GateError, match="min_agreement"):
        judge(blind, replace(GATE, min_agreement=None))


@pytest.mark.parametrize("gate", [Gate(), Gate(max_bytes=10**9)])
def test_a_gate_without_a_limit_on_quality_is_refused(gate: Gate) -> None:
    with pytest.raises(GateError, match="no limit on quality"):
        judge(GOOD, gate)


def test_without_a_champion_its_criterion_does_not_apply() -> None:
    verdict = judge(replace(GOOD, champion_top1=None), GATE)
    assert "max_drop_champion" not in [criterion.name for criterion in verdict.criteria]
    assert "no champion yet" in str(verdict)


@given(st.integers(1, 10_000), st.data())
def test_a_drop_is_judged_as_if_images_were_counted(images: int, data: st.DataObject) -> None:
    dense, lost, allowed = (data.draw(st.integers(0, images)) for _ in range(3))
    challenger = max(dense - lost, 0)
    measured = replace(GOOD, dense_top1=dense / images, challenger_top1=challenger / images)
    verdict = judge(measured, Gate(max_drop_dense=allowed / images))
    assert verdict.passed == (dense - challenger <= allowed)


def test_the_digest_of_a_verdict_follows_measurements_and_limits() -> None:
    same, other = judge(GOOD, GATE), judge(replace(GOOD, bytes=999), GATE)
    assert judge(GOOD, GATE).digest == same.digest != other.digest
    assert same.gate == other.gate == GATE.digest != Gate(min_agreement=0.95).digest


def test_the_gate_has_the_keys_of_the_params() -> None:
    assert Gate(**Promotion().model_dump()).min_agreement == Promotion().min_agreement
    assert {field.name for field in fields(Gate)} == set(Promotion.model_fields)
