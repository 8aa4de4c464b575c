"""The tables and the page of a sweep: numbers against the plain arithmetic, texts against what they claim."""

from __future__ import annotations

import csv
import io
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import pareto, sweep_means, sweep_page, sweep_table
from tasks.pareto import Candidate
from tasks.summary import Row, Spread
from tasks.sweep_means import Mean
from tasks.sweep_results import Result
from tests.tasks.page import Page

DENSE = Row("dense", 0.9, 1.0, 1000, 1000, 5_000_000, 4000, 4000)
METHODS = {"uniform": 0.70, "erk+starfish": 0.80, "cut": 0.75}
BUDGETS = {"weights=0.5": 0.5, "weights=0.9": 0.1}
SEEDS = (0, 1, 2)


def _timed(row: Row, factor: float, draw: random.Random) -> Row:
    def spread(seconds: float) -> Spread:
        median = seconds * factor * draw.uniform(0.95, 1.05)
        return Spread(median, 0.9 * median, 1.2 * median)

    return replace(row, latency={1: spread(0.004), 32: spread(0.05)})


def _point(model: str, method: str, budget: str, seed: int, labels: bool = True, timed: bool = True) -> Result:
    draw = random.Random(f"{model} {method} {budget} {seed}")
    kept, is_cut = BUDGETS[budget], method == "cut"
    top1 = METHODS[method] + 0.1 * kept + draw.gauss(0, 0.005)
    healed = replace(
        DENSE,
        name="healed",
        top1=top1,
        agreement=top1 + 0.02,
        nonzeros=int(1000 * kept),
        parameters=int(1000 * kept) if is_cut else 1000,
        bytes=int(4400 * kept),
    )
    dense = DENSE
    if timed:
        dense, healed = _timed(dense, 1, draw), _timed(healed, 0.5 if is_cut else 1, draw)
    if not labels:
        dense, healed = replace(dense, top1=None), replace(healed, top1=None)
    return Result(
        f"{model}/{method}/{budget}/{seed}",
        model,
        method,
        budget,
        seed,
        "finished",
        identity="i",
        run_id=f"run-{seed}",
        dense=dense,
        pruned=replace(healed, name="pruned", top1=None, latency={}),
        healed=healed,
        images=5000,
        images_digest="d",
        seconds=12.5,
        healing_seconds=3.25,
        artifacts={"evaluation": "ab" * 32, "healing": "cd" * 32, "allocation": "ef" * 32},
    )


def _results(models: Sequence[str] = ("small",), labels: bool = True, timed: bool = True) -> list[Result]:
    return [
        _point(model, method, budget, seed, labels, timed)
        for model in models
        for method in METHODS
        for budget in BUDGETS
        for seed in SEEDS
    ]


def _failed(result: Result, error: str = "healing: the loss is nan\nlower the lr") -> Result:
    named = (result.point, result.model, result.method, result.budget, result.seed)
    return Result(*named, status="failed", identity="i", run_id="run", error=error)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_comparing_every_pair_leaves(points: list[tuple[int, int]]) -> None:
    def beaten(point: tuple[int, int]) -> bool:
        return any(cost <= point[0] and gain >= point[1] and (cost, gain) != point for cost, gain in points)

    found = pareto.front([(float(cost), float(gain)) for cost, gain in points])
    assert sorted(found) == [index for index, point in enumerate(points) if not beaten(point)]
    assert [points[index][0] for index in found] == sorted(points[index][0] for index in found)


@given(st.lists(st.tuples(st.floats(0.01, 1000), st.floats(0, 100), st.floats(0, 9)), min_size=2, max_size=9))
def test_all_spots_lie_in_the_plot_in_the_order_of_their_numbers(drawn: list[tuple[float, float, float]]) -> None:
    candidates = [Candidate(str(n), cost, gain, "", off) for n, (cost, gain, off) in enumerate(drawn)]
    made = pareto.trade("t", "cost", "gain", candidates)
    for spot in made.spots:
        assert all(0 <= place <= 100 for place in (spot.x, spot.y, *(spot.whisker or ())))
    for one, other in itertools.pairwise(drawn):
        first, second = made.spots[drawn.index(one)], made.spots[drawn.index(other)]
        assert (first.x - second.x) * (one[0] - other[0]) >= 0
        assert (first.y - second.y) * (one[1] - other[1]) <= 0
    assert [spot.number for spot in made.front] == list(range(1, len(made.front) + 1))
    assert all(0 <= tick.at <= 100 for tick in (*made.x, *made.y)) and len(made.y) >= 2


def test_costs_far_apart_stand_on_a_logarithmic_axis() -> None:
    near = [Candidate(str(cost), cost, 50 + cost, "") for cost in (1.0, 2.0, 3.0)]
    far = [Candidate(str(cost), cost, 50, "") for cost in (1.0, 10.0, 100.0)]
    assert not pareto.trade("t", "c", "g", near).logarithmic
    made = pareto.trade("t", "c", "g", far)
    steps = np.diff([spot.x for spot in made.spots])
    assert made.logarithmic and steps[0] == pytest.approx(steps[1], abs=0.02)


def test_means_are_those_of_numpy() -> None:
    drawn = np.random.default_rng(0).normal(size=7)
    mean = Mean.of(list(drawn))
    assert mean is not None and mean.count == 7
    assert mean.value == pytest.approx(drawn.mean())
    assert mean.deviation == pytest.approx(drawn.std(ddof=1))
    assert Mean.of([2.0]) == Mean(2.0, None, 1) and Mean.of([]) is None


def test_settings_are_dense_then_budget_by_budget_the_best_first() -> None:
    found = sweep_means.settings(_results(("small", "large")))
    ranked = ["erk+starfish", "cut", "uniform"]
    expected = [("dense", ""), *((method, budget) for budget in BUDGETS for method in ranked)]
    for model in ("small", "large"):
        assert [(s.method, s.budget) for s in found if s.model == model] == expected
    assert {setting.seeds for setting in found if not setting.is_dense} == {"3"}


def test_a_failed_seed_is_counted_and_not_averaged() -> None:
    results = _results()
    results[0] = _failed(results[0])
    (found,) = (s for s in sweep_means.settings(results) if s.name == "uniform, weights=0.5")
    assert found.seeds == "2 of 3"
    mean = found.mean(sweep_means.reading("top1"))
    rest = [result.healed.top1 for result in results[1:3] if result.healed and result.healed.top1]
    assert mean is not None and mean.value == pytest.approx(np.mean(rest))


def test_the_table_compares_with_dense_of_the_same_evaluation() -> None:
    results = _results()
    settings = sweep_means.settings(results)
    columns = {column.key: column for column in sweep_table.columns(settings)}
    assert list(columns) == ["top1", "agreement", "bytes", "nonzeros", "macs", "latency1", "latency32", "healing"]
    number = [setting.name for setting in settings].index("cut, weights=0.9")
    own = [result for result in results if (result.method, result.budget) == ("cut", "weights=0.9")]
    top1 = [result.healed.top1 for result in own if result.healed and result.healed.top1]
    cell = columns["top1"].cells[number]
    assert (cell.text, cell.spread) == (f"{100 * np.mean(top1):.2f}", f"± {100 * np.std(top1, ddof=1):.2f}")
    assert cell.note == f"\N{MINUS SIGN}{100 * (0.9 - np.mean(top1)):.2f} points"
    assert columns["bytes"].cells[number].note == f"{440 / 4000:.2f}×"
    ratios = [r.healed.latency[32].median / r.dense.latency[32].median for r in own if r.dense and r.healed]
    assert columns["latency32"].cells[number].note == f"{1 / np.mean(ratios):.2f}× speed"
    masked = [setting.name for setting in settings].index("uniform, weights=0.9")
    assert columns["latency32"].cells[masked].note == "same speed"
    assert columns["bytes"].cells[0].note == "" and columns["healing"].cells[0].value is None


def test_the_csv_has_every_point_unrounded() -> None:
    results = [*_results(), _failed(_point("small", "uniform", "weights=0.9", 9))]
    lines = list(csv.DictReader(io.StringIO(sweep_table.comma_separated(results))))
    assert [line["point"] for line in lines] == [result.point for result in results]
    for line, result in zip(lines, results, strict=True):
        assert (line["status"], line["budget_unit"], float(line["budget"])) == (
            result.status,
            "weights",
            float(result.budget.partition("=")[2]),
        )
        if result.healed is None or result.dense is None:
            assert line["error"] == "healing: the loss is nan" and line["top1"] == line["bytes"] == ""
            continue
        assert float(line["top1"]) == result.healed.top1 and int(line["bytes"]) == result.healed.bytes
        assert float(line["latency_batch32_high_seconds"]) == result.healed.latency[32].high
        assert float(line["dense_latency_batch1_median_seconds"]) == result.dense.latency[1].median
        assert (line["healing"], line["healing_seconds"], line["seconds"]) == ("cd" * 32, "3.25", "12.5")


def test_markdown_has_a_table_for_each_model_and_says_what_failed() -> None:
    results = _results(("small", "large"))
    results[3] = _failed(results[3])
    text = sweep_table.markdown("digits", results, len(results) + 2)
    assert "35 of 38 points finished, 1 failed, 2 not run yet." in text
    assert text.index("## small") < text.index("## large") < text.index("## Not finished")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1 and len(tables) == 2 * (2 + 1 + 6)
    assert f"* {results[3].point}: healing: the loss is nan\n" in text
    assert "Zeros shrink the file." in text


def test_the_terminal_shows_the_first_rows() -> None:
    from rich.console import Console

    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(sweep_table.terminal(sweep_means.settings(_results()), 3))
    lines = captured.get().splitlines()
    assert [line.split()[0] for line in lines] == ["method", "dense", "erk+starfish", "cut"]
    assert "0.55×" in lines[2] and "4.00 kB" in lines[1] and len(lines[0]) <= 80


def test_nothing_finished_makes_tables_all_the_same() -> None:
    results = [_failed(result) for result in _results()]
    assert "0 of 18 points finished, 18 failed." in sweep_table.markdown("digits", results, 18)
    page = Page(sweep_page.render("digits", results, 18))
    assert "0 of 18 points finished" in page.text and "15 more below." in page.text
    assert sweep_table.terminal(sweep_means.settings(results), 20).row_count == 6
    assert sweep_page.render("digits", [], 18).count("<svg") == 0


@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "unlabelled"])
@pytest.mark.parametrize("models", [("small",), ("small", "large")], ids=len)
def test_the_page_is_well_formed_names_the_front_and_needs_no_network(
    models: Sequence[str], labels: bool, timed: bool
) -> None:
    results = _results(models, labels, timed)
    text = sweep_page.render("digits", results, len(results))
    page = Page(text)
    assert "://" not in text and "url(" not in text and "<script" not in text and "@import" not in text
    ids = [value for _, name, value in page.attributes if name == "id"]
    labelled = {value for _, name, value in page.attributes if name == "aria-labelledby"}
    assert len(ids) == len(set(ids)) and labelled <= set(ids)
    # File and two latencies of each model, and of all where labels make them comparable.
    pictures = (3 if timed else 1) * (len(models) + (1 if labels and len(models) > 1 else 0))
    assert sum(name.startswith("trade") for name in ids) == pictures
    assert ("Top-1 over weights file" if labels else "Agreement with dense over weights file") in page.text
    assert ("Latency was not measured." in page.text) != timed
    assert ("not how often it is right" in page.text) != labels
    shown = {float(value) for value in page.values}
    means = [setting.mean(sweep_means.reading("agreement")) for setting in sweep_means.settings(results)]
    assert {mean.value for mean in means if mean} <= shown
    assert sweep_page.render("digits", results, len(results)) == text


def test_what_another_beats_is_grey_and_the_front_is_listed() -> None:
    results = _results(timed=False)
    text = sweep_page.render("digits", results, len(results))
    listed = text[text.index('<ol class="front">') : text.index("</ol>")]
    # Of equal size, so of each budget only the best; and dense, which is the most accurate.
    assert listed.count("<li>") == 3
    assert "erk+starfish, weights=0.9" in listed and "erk+starfish, weights=0.5" in listed and ">dense<" in listed
    figure = text[text.index("<figure>") : text.index("</figure>")]
    assert figure.count('class="front" r=') == 2 and figure.count('class="dominated" r=') == 4
    assert figure.count('<rect class="front"') == 1


def test_noise_makes_no_mask_fast_in_the_picture() -> None:
    """Masks are timed within 5 % of dense, and their quartiles are wider; the cut takes half the time."""
    results = _results()
    text = sweep_page.render("digits", results, len(results))
    figure = text[text.index("Top-1 over latency, batch of 32") :]
    listed = figure[figure.index('<ol class="front">') : figure.index("</ol>")]
    assert "cut, weights=0.5" in listed and ">dense<" in listed
    assert "uniform" not in listed and "erk" not in listed
    assert figure.count("at 1.00 × dense</title>") >= 5


def test_hostile_names_and_errors_stay_text() -> None:
    hostile = "<script>alert('x')</script>"
    results = [*_results(), _failed(_point("small", "uniform", "weights=0.5", 7), f"dense: {hostile}")]
    text = sweep_page.render(hostile, results, len(results))
    assert "<script" not in text and hostile in Page(text).text


def _falling(method: str, middle: float, labels: bool = True) -> list[Result]:
    """A method whose agreement falls along a logistic in logit(sparsity), steepness 3, to chance of 1 in 10."""
    made = []
    for removed in (0.5, 0.7, 0.8, 0.9, 0.95, 0.97):
        height = 1 / (1 + np.exp(3 * (np.log(removed / (1 - removed)) - np.log(middle / (1 - middle)))))
        base = replace(_point("small", "uniform", "weights=0.9", 0, labels), method=method, classes=10)
        assert base.healed is not None
        healed = replace(base.healed, agreement=0.1 + 0.9 * float(height))
        made.append(replace(base, point=f"small/{method}/{removed}", budget=f"weights={removed:g}", healed=healed))
    return made


def test_the_transition_of_a_method_is_told_without_labels() -> None:
    results = [*_falling("early", 0.8, labels=False), *_falling("late", 0.93, labels=False)]
    text = sweep_table.markdown("s", results, len(results))
    found = {
        name: (float(low), float(high))
        for name, low, high in re.findall(r"^\* (\w+): ([\d.]+) to ([\d.]+) %, centre", text, re.MULTILINE)
    }
    for name, middle in (("early", 0.8), ("late", 0.93)):
        odds, reach = np.log(middle / (1 - middle)), np.log(4) / 3
        expected = [100 / (1 + np.exp(-(odds + step))) for step in (-reach, reach)]
        assert found[name] == pytest.approx(expected, abs=1.0), "the plateau is the best point, not 1"
    assert "Recoverability transition" in sweep_page.render("s", results, len(results))


def test_no_transition_is_told_of_few_sparsities_or_of_an_unknown_number_of_classes() -> None:
    few = _falling("early", 0.8)[:3]
    unknown = [replace(result, classes=0) for result in _falling("early", 0.8)]
    for results in (few, unknown):
        assert "transition" not in sweep_table.markdown("s", results, len(results))


def test_points_of_older_code_are_counted_and_marked() -> None:
    results = _results()
    results[0] = replace(results[0], is_older=True)
    assert "1 by older code or of other inputs" in sweep_table.standing(results, len(results))
    assert "older" not in sweep_table.standing(_results(), len(results))
    rows = list(csv.DictReader(io.StringIO(sweep_table.comma_separated(results))))
    assert [row["is_older"] for row in rows].count("True") == 1
