"""The heat map of the report shows the curves that the allocation rests on."""

from __future__ import annotations

from tasks.heatmap import repairability

EVIDENCE = {
    "densities": [0.1, 0.5, 1.0],
    "raw_damage": {"a": [0.9, 0.4, 0.0]},
    "rr": {"a": [1.4, 1.0, 0.0]},
    "rr_ls": {"a": [0.7, 0.2, 0.0]},
}


def test_it_shows_the_variant_that_allocated() -> None:
    for variant, texts in (("rr", ["1.40", "1.00"]), ("rr_ls", ["0.70", "0.20"])):
        found = repairability(EVIDENCE | {"rests_on": variant})
        assert found is not None and found.densities == ("0.1", "0.5"), "dense, nothing is damaged"
        ((layer, cells),) = found.rows
        assert layer == "a" and [cell.text for cell in cells] == texts
        assert [cell.is_above for cell in cells] == [float(text) > 1 for text in texts]


def test_there_is_none_of_an_allocation_that_asked_for_no_repair() -> None:
    assert repairability(EVIDENCE | {"rests_on": "raw_damage"}) is None
    assert repairability({}) is None
