"""What healing.json holds: the reports of all healers of all rounds, in the order in which they ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]


def round_of(report: Report) -> int:
    """In which round the healer ran, from 1; a report of a cut at once does not say."""
    return int(report.get("round", 1))


def rounds(reports: Sequence[Report]) -> int:
    """In how many rounds anything went; there may have been more, in which nothing did."""
    return len({round_of(report) for report in reports}) or 1


def last_round(reports: Sequence[Report]) -> list[Report]:
    """Those that ran after the last step, when everything was gone; only of these there are bundles."""
    last = max(map(round_of, reports), default=1)
    return [report for report in reports if round_of(report) == last]


def named(reports: Sequence[Report]) -> list[tuple[str, Report]]:
    """Every report under its healer's name, with the round where there are several."""
    several = rounds(reports) > 1
    return [(f"{r['method']} round {round_of(r)}" if several else str(r["method"]), r) for r in reports]
