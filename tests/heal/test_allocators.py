"""Budgets met to one weight and one neuron, against a ranking written out by hand."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heal.allocators.global_variance import GlobalVariance
from heal.allocators.uniform import Uniform
from heal.allocators.widths import ranked_globally, rounded, shared_evenly
from heal.errors import BudgetError, MethodError
from heal.families.lookup import describe
from heal.method import AllocationContext
from heal.statistics import capture
from heal.values import Budget
from tests.heal import nets

WITH_PAIRS = ["vit", "deit", "swin", "swinv2", "convnext"]
SCORES = st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=20), min_size=1, max_size=5)


def _tensors(scores: list[list[int]]) -> dict[str, Tensor]:
    return {f"layer{i}": torch.tensor(row, dtype=torch.float64) for i, row in enumerate(scores)}


@settings(max_examples=200, deadline=None)
@given(scores=SCORES, share=st.floats(0, 1))
def test_global_ranking_is_the_one_written_out_by_hand(scores: list[list[int]], share: float) -> None:
    total = sum(len(row) for row in scores)
    kept = max(len(scores), round(share * total))
    by_hand = sorted((score, layer, index) for layer, row in enumerate(scores) for index, score in enumerate(row))
    # Every layer keeps its own best; the others are ranked together.
    protected = {(layer, max(range(len(row)), key=lambda i: (row[i], i))) for layer, row in enumerate(scores)}
    rest = [entry for entry in by_hand if (entry[1], entry[2]) not in protected]
    stays = rest[len(rest) - (kept - len(protected)) :] if kept > len(protected) else []
    expected = [1 + sum(layer == entry[1] for entry in stays) for layer in range(len(scores))]
    assert list(ranked_globally(_tensors(scores), kept, 1).values()) == expected


@settings(max_examples=200, deadline=None)
@given(totals=st.lists(st.integers(1, 500), min_size=1, max_size=8), share=st.floats(0, 1))
def test_an_even_share_is_exact_and_even(totals: list[int], share: float) -> None:
    kept = round(share * sum(totals))
    counts = shared_evenly({f"l{i}": total for i, total in enumerate(totals)}, kept)
    assert sum(counts.values()) == kept
    for (_, count), total in zip(counts.items(), totals, strict=True):
        assert abs(count - kept * total / sum(totals)) < 1


@settings(max_examples=200, deadline=None)
@given(totals=st.lists(st.integers(1, 500), min_size=1, max_size=8), share=st.floats(0, 1), minimum=st.integers(1, 40))
def test_an_even_share_leaves_every_layer_its_minimum(totals: list[int], share: float, minimum: int) -> None:
    least = [min(minimum, total) for total in totals]
    kept = max(sum(least), round(share * sum(totals)))
    counts = list(shared_evenly({f"l{i}": total for i, total in enumerate(totals)}, kept, minimum).values())
    assert sum(counts) == kept
    low, high = 0.0, 1.0  # the one share of all layers, of which a layer below its least takes that
    for _ in range(60):
        tried = (low + high) / 2
        too_few = sum(max(few, tried * total) for few, total in zip(least, totals, strict=True)) < kept
        low, high = (tried, high) if too_few else (low, tried)
    exact = [max(few, high * total) for few, total in zip(least, totals, strict=True)]
    assert all(abs(count - wanted) < 1 + 1e-6 for count, wanted in zip(counts, exact, strict=True))
    assert all(few <= count <= total for few, count, total in zip(least, counts, totals, strict=True))


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.integers(1, 40), min_size=1, max_size=6), share=st.floats(0, 1))
def test_layers_of_an_even_share_have_multiples_but_for_one(parts: list[int], share: float) -> None:
    totals = {f"l{i}": 8 * part for i, part in enumerate(parts)}
    kept = max(8 * len(parts), round(share * sum(totals.values())))
    scores = {layer: torch.arange(total).double() for layer, total in totals.items()}
    widths = rounded(scores, shared_evenly(totals, kept, 8), 8)
    assert sum(widths.values()) == kept
    assert sum(width % 8 > 0 for width in widths.values()) <= 1


@settings(max_examples=200, deadline=None)
@given(scores=SCORES, share=st.floats(0, 1), multiple=st.integers(1, 4))
def test_rounding_keeps_the_sum_and_leaves_one_odd_width_at_most(
    scores: list[list[int]], share: float, multiple: int
) -> None:
    tensors = {name: score.repeat(multiple) for name, score in _tensors(scores).items()}
    total = sum(len(score) for score in tensors.values())
    counts = ranked_globally(tensors, max(len(scores) * multiple, round(share * total)), multiple)
    widths = rounded(tensors, counts, multiple)
    assert sum(widths.values()) == sum(counts.values())
    assert sum(width % multiple > 0 for width in widths.values()) <= 1
    assert all(0 < width <= len(tensors[name]) for name, width in widths.items())


@settings(max_examples=200, deadline=None)
@given(scores=SCORES, share=st.floats(0, 1), multiple=st.integers(1, 30))
def test_rounding_keeps_the_sum_of_layers_of_any_width(scores: list[list[int]], share: float, multiple: int) -> None:
    tensors = _tensors(scores)
    kept = max(len(scores), round(share * sum(len(row) for row in scores)))
    counts = ranked_globally(tensors, kept, 1)
    widths = rounded(tensors, counts, multiple)
    assert sum(widths.values()) == kept
    assert all(0 < width <= len(tensors[name]) for name, width in widths.items())


@pytest.mark.parametrize("name", WITH_PAIRS)
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.73])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_neuron_budget_is_exact(name: str, fraction: float, scope: str) -> None:
    model = nets.build(name)
    allocator = GlobalVariance(multiple=4, scope=scope)  # type: ignore[arg-type]
    statistics = capture(model, nets.images(4), {f"{p.consumer}.input": False for p in describe(model).pairs})
    allocation = allocator.allocate(model, Budget(neurons=fraction), AllocationContext(statistics=statistics))
    total = sum(allocation.total.values())
    assert allocation.got == allocation.asked == int((1 - fraction) * total + 0.5)
    assert sum(width % 4 > 0 for width in allocation.kept.values()) <= 1


@pytest.mark.parametrize("name", list(nets.NETS))
@pytest.mark.parametrize("fraction", [0.5, 0.755])
def test_the_weight_budget_is_exact_in_every_family(name: str, fraction: float) -> None:
    model = nets.build(name)
    allocation = Uniform().allocate(model, Budget(weights=fraction), AllocationContext())
    total = sum(model.get_parameter(f"{layer}.weight").numel() for layer in describe(model).layers)
    assert allocation.got == int((1 - fraction) * total + 0.5)


@pytest.mark.parametrize("fraction", ["0.9", "0.7", "0.3", "0.5", "0.75", "0.001"])
def test_what_stays_is_rounded_half_up_as_decimals_are(fraction: str) -> None:
    for total in range(1, 400):
        exact = ((1 - Decimal(fraction)) * total).to_integral_value(ROUND_HALF_UP)
        assert Budget(blocks=float(fraction)).kept(total) == exact


def test_the_preactivation_ranking_reads_the_producers_output() -> None:
    model = nets.build("vit")
    allocator = GlobalVariance(statistic="pre")
    assert allocator.needs - {"cuts mlp", "cuts inner"} == {"preactivation_moments"}
    pairs = describe(model).pairs
    statistics = capture(model, nets.images(4), {f"{pair.producer}.output": False for pair in pairs})
    allocation = allocator.allocate(model, Budget(neurons=0.5), AllocationContext(statistics=statistics))
    pooled = sorted(float(v) for pair in pairs for v in statistics[f"{pair.producer}.output"].variance)
    threshold = pooled[len(pooled) // 2]
    for pair in pairs:
        expected = int((statistics[f"{pair.producer}.output"].variance >= threshold).sum())
        assert allocation.kept[pair.producer] == expected


def test_a_budget_that_cannot_be_met_says_what_would() -> None:
    model = nets.build("vit")
    statistics = capture(model, nets.images(2), {f"{p.consumer}.input": False for p in describe(model).pairs})
    with pytest.raises(BudgetError, match=r"neurons = 0\.99 cannot be met.*remove less"):
        GlobalVariance(multiple=8).allocate(model, Budget(neurons=0.99), AllocationContext(statistics=statistics))


@pytest.mark.parametrize("wrong", [50, 1.0, -0.1])
def test_a_budget_is_a_fraction(wrong: float) -> None:
    with pytest.raises(BudgetError, match="fraction in"):
        Budget(weights=wrong)


def test_fifty_is_taken_for_a_half() -> None:
    with pytest.raises(BudgetError, match=r"did you mean 0\.5\?"):
        Budget(neurons=50)


def test_a_budget_has_one_unit() -> None:
    with pytest.raises(BudgetError, match="exactly one unit"):
        Budget()
    with pytest.raises(BudgetError, match="exactly one unit"):
        Budget(weights=0.5, neurons=0.5)


def test_a_multiple_below_one_is_refused() -> None:
    with pytest.raises(MethodError, match="at least 1"):
        GlobalVariance(multiple=0)
