"""The table of results: order, units, differences, and what is said where nothing was measured."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from rich.console import Console

from tasks import summary
from tasks.verdict import verdict, warnings

SIZES = {
    "parameters": 22050664,
    "nonzeros": 22050000,
    "macs": 4608338304,
    "bytes": 88223704,
    "bytes_unpacked": 88223704,
}
SMALLER = {
    "parameters": 14962600,
    "nonzeros": 14960000,
    "macs": 3219000000,
    "bytes": 59870000,
    "bytes_unpacked": 59870000,
}


def timing(median: float, quartile: float = 0.02) -> dict[str, float]:
    return {"median": median, "low": median * (1 - quartile), "high": median * (1 + quartile), "runs": 30}


def evaluation(**changes: Any) -> dict[str, Any]:
    """As JSON gives it back: models in alphabetical order."""
    models: dict[str, Any] = {
        "after closed_form": {"top1": 0.7, "agreement": 0.78, **SMALLER},
        "dense": {"top1": 0.8, "agreement": 1.0, **SIZES, "latency": {"1": timing(0.12), "32": timing(3.0)}},
        "healed": {"top1": 0.77, "agreement": 0.9, **SMALLER, "latency": {"1": timing(0.08), "32": timing(2.0)}},
        "pruned": {"top1": 0.6, "agreement": 0.7, **SMALLER},
    }
    return {"images": 1000, "labels": True, "models": models | changes, "subsets": {}, "budget": None}


def unlabeled() -> dict[str, Any]:
    found = evaluation()
    found["models"] = {name: entry | {"top1": None} for name, entry in found["models"].items()}
    return found | {"labels": False}


def columns(found: dict[str, Any]) -> dict[str, summary.Column]:
    return {column.key: column for column in summary.columns(summary.rows(found), found["images"])}


def printed(found: dict[str, Any], width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary.table(found))
    return console.export_text()


def test_models_come_in_the_order_of_their_making() -> None:
    assert [row.name for row in summary.rows(evaluation())] == ["dense", "pruned", "after closed_form", "healed"]


def test_healers_come_in_their_order_where_json_sorted_them() -> None:
    found = evaluation(**{"after affine": {"top1": 0.7, "agreement": 0.8, **SMALLER}})
    names = [row.name for row in summary.rows(found, ["closed_form", "affine"])]
    assert names == ["dense", "pruned", "after closed_form", "after affine", "healed"]


def test_without_dense_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="no dense model"):
        summary.rows({"images": 1, "labels": False, "models": {"healed": {}}})


def test_a_column_has_one_unit_and_a_direction() -> None:
    found = columns(evaluation())
    assert (found["macs"].unit, found["macs"].better) == ("G", "lower")
    assert [cell.text for cell in found["parameters"].cells] == ["22.1", "15.0", "15.0", "15.0"]
    assert [cell.value for cell in found["bytes"].cells] == [88223704, 59870000, 59870000, 59870000]
    assert (found["latency1"].unit, found["latency32"].unit) == ("ms", "s")
    assert found["top1"].better == "higher"


def test_differences_are_against_dense() -> None:
    found = columns(evaluation())
    assert [cell.note for cell in found["top1"].cells] == ["", "−20.00 points", "−10.00 points", "−3.00 points"]
    assert found["bytes"].cells[-1].note == "0.68×"
    assert found["latency1"].cells[-1].note == "1.50× speed (1.44–1.56)"


def test_files_are_compared_with_dense_in_full_precision() -> None:
    """The weights of many timm models are exact in float16; what healing trains is not."""
    found = evaluation()
    found["models"]["dense"]["bytes"] //= 2
    assert [cell.note for cell in columns(found)["bytes"].cells] == ["", "0.68×", "0.68×", "0.68×"]
    rows = summary.rows(found)
    assert "the weights file is 32 % smaller".capitalize() in verdict(rows, "cut", 1000)
    assert any("exact in float16" in warning for warning in warnings(rows, "cut", 10, 1000))


def test_a_dense_file_without_its_zeros_is_called_that_and_a_larger_result_is_said() -> None:
    found = evaluation()
    found["models"]["dense"] |= {"bytes": 20_000_000, "nonzeros": 4_000_000}
    (said,) = (text for text in warnings(summary.rows(found), "cut", 10, 1000) if "full precision" in text)
    assert "stored without their zeros" in said and "float16" not in said
    assert said.endswith("The files themselves go from 20.0 to 59.9 MB.")


def test_what_was_not_measured_shows_as_such() -> None:
    found = columns(evaluation())
    assert (found["latency1"].cells[1].text, found["latency1"].cells[1].value) == ("–", None)
    assert "top1" not in columns(unlabeled()) and "bytes_float16" not in found


def test_few_images_show_fewer_decimals() -> None:
    assert summary.percent(0.9722, 359) == "97.2" and summary.percent(0.9722, 5000) == "97.22"


def test_speed_ratios_pair_the_quartiles_at_their_worst_and_best() -> None:
    dense, *_, healed = summary.rows(evaluation())
    ratio = healed.speedup(dense, 1)
    assert ratio is not None
    assert ratio.median == pytest.approx(1.5)
    assert ratio.low == pytest.approx(1.5 * 0.98 / 1.02) and ratio.high == pytest.approx(1.5 * 1.02 / 0.98)
    assert healed.speedup(dense, 8) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0.00"), (4.608, "4.61"), (84.94, "84.9"), (113.1, "113"), (1234.5, "1,234")]
)
def test_digits_are_enough_and_not_more(value: float, text: str) -> None:
    assert summary.digits(value) == text


@pytest.mark.parametrize(("seconds", "unit"), [(2.0, "s"), (0.0123, "ms"), (0.00004, "µs"), (0.0, "µs")])
def test_durations_choose_their_unit(seconds: float, unit: str) -> None:
    assert summary.duration(seconds)[1] == unit


def test_comma_separated_holds_the_unrounded_numbers() -> None:
    table = list(csv.DictReader(io.StringIO(summary.comma_separated(summary.rows(evaluation())))))
    assert [line["model"] for line in table] == ["dense", "pruned", "after closed_form", "healed"]
    assert float(table[3]["latency_batch1_median_seconds"]) == 0.08
    assert table[1]["latency_batch1_median_seconds"] == "" and table[0]["macs"] == "4608338304"


def test_the_terminal_table_fits_and_compares() -> None:
    text = printed(evaluation())
    assert text.index("dense") < text.index("pruned") < text.index("after closed_form") < text.index("healed")
    assert "…" not in printed(evaluation(), 80)
    assert "1.50×" in text and "0.68×" in text and "↑" in text and "↓" in text
    assert "1,000 images" in text


def test_the_terminal_table_says_when_there_are_no_labels() -> None:
    text = printed(unlabeled())
    assert "no labels" in text and "Top-1" not in text


def test_names_are_not_read_as_markup() -> None:
    assert "after [red]x" in printed(evaluation(**{"after [red]x": {"top1": 0.1, "agreement": 0.1, **SMALLER}}))


def sentence(found: dict[str, Any], kind: str = "cut") -> str:
    return verdict(summary.rows(found), kind, found["images"])


def test_a_cut_is_judged_by_measured_time() -> None:
    said = sentence(evaluation())
    assert "the weights file is 32 % smaller" in said.lower() and "measurably faster (1.50×" in said
    assert "top-1 is 77.00 %, 3.00 points below dense, from 60.00 % before healing" in said


def test_a_speed_up_inside_the_spread_is_none() -> None:
    healed = {"top1": 0.8, "agreement": 0.9, **SMALLER, "latency": {"1": timing(0.119)}}
    assert "speed did not measurably change" in sentence(evaluation(healed=healed))


def test_every_batch_is_judged() -> None:
    healed = {"top1": 0.8, "agreement": 0.9, **SMALLER, "latency": {"1": timing(0.119), "32": timing(2.0)}}
    said = sentence(evaluation(healed=healed))
    assert "a batch of 1 runs no measurably faster (1.01×" in said
    assert "a batch of 32 runs measurably faster (1.50×" in said


def test_healing_that_does_harm_is_called_so() -> None:
    def harm(agreement: float) -> list[str]:
        healed = {"top1": 0.77, "agreement": agreement, **SMALLER}
        found = evaluation(healed=healed)
        return [line for line in warnings(summary.rows(found), "cut", 10, found["images"]) if "did harm" in line]

    (line,) = harm(0.70)  # from 0.78: a standard error of the difference is 0.019
    assert 'from "after closed_form" to "healed"' in line and "from 78.00 to 70.00 %" in line
    assert harm(0.76) == [] and harm(0.9) == []


def test_a_slower_cut_is_called_slower() -> None:
    healed = {"top1": 0.8, "agreement": 0.9, **SMALLER, "latency": {"1": timing(0.2)}}
    assert "measurably slower (0.60×" in sentence(evaluation(healed=healed))


def test_nothing_rose_where_nothing_was_healed() -> None:
    found = unlabeled()
    found["models"]["healed"] |= {"agreement": found["models"]["pruned"]["agreement"]}
    assert "before healing" in sentence(unlabeled(), "cut") and "before healing" not in sentence(found, "cut")


def test_a_mask_never_promises_speed() -> None:
    said = sentence(unlabeled(), "mask")
    assert said.startswith("Smaller file, same speed on plain runtimes")
    assert "faster" not in said and "top-1 is unknown" in said


def test_without_pruning_there_is_nothing_to_praise() -> None:
    found = evaluation(healed={"top1": 0.8, "agreement": 1.0, **SIZES})
    assert sentence(found, "none").startswith("Nothing was pruned: top-1 is 80.00 %, the same as dense")
    assert warnings(summary.rows(found), "none", 10, found["images"]) == []


def test_a_file_that_did_not_shrink_is_pointed_out() -> None:
    found = evaluation(healed={"top1": 0.8, "agreement": 0.9, **SIZES})
    assert any("did not get smaller" in text for text in warnings(summary.rows(found), "mask", 10, found["images"]))
    assert sentence(found, "mask").startswith("No smaller file")


@pytest.mark.parametrize(
    ("top1", "classes", "warned"),
    [
        (0.11, 10, True),
        (0.4, 10, False),
        (0.11, 2, True),
        (0.54, 2, True),
        (0.6, 2, False),
        (0.01, 1000, False),
        (0.6, 1, False),
    ],
)
def test_chance_is_relative_to_the_number_of_classes(top1: float, classes: int, warned: bool) -> None:
    found = evaluation(pruned={"top1": top1, "agreement": 0.1, **SMALLER})
    assert any("at chance" in text for text in warnings(summary.rows(found), "cut", classes, 1000)) is warned
