"""Stage: one page for people, report.html, its first sentence, and the same table for machines, summary.csv."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import figures, pages, reproduction, summary
from tasks.facts import Facts, forward_order, gather
from tasks.healing_reports import last_round, named
from tasks.heatmap import repairability
from tasks.summary import Cell, Column
from tasks.verdict import verdict, warnings

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.progress import Progress

DROPPED = ": dropped"
"""How the line of a block ends that is gone."""


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Write report.html (self-contained, the same bytes for the same inputs), summary.csv and verdict.txt."""
    facts = gather(inputs)
    page = render(facts, params.report.title)
    (output / "report.html").write_text(page, encoding="utf-8", newline="\n")
    (output / "summary.csv").write_text(summary.comma_separated(facts.rows), encoding="utf-8", newline="\n")
    said = verdict(facts.rows, facts.kind, facts.images)
    (output / "verdict.txt").write_text(f"{said}\n", encoding="utf-8", newline="\n")
    for line in (said, *_warnings(facts)):
        progress.log(line)
    return {"bytes": float(len(page.encode()))}


def render(facts: Facts, title: str | None = None) -> str:
    """The page as HTML."""
    return pages.template("report.html.j2").render(title=title or facts.model, **_page(facts))


def _page(facts: Facts) -> dict[str, Any]:
    rows, images = facts.rows, facts.images
    columns = summary.columns(rows, images)
    return {
        "facts": facts,
        "verdict": verdict(rows, facts.kind, images),
        "warnings": _warnings(facts),
        "highlights": list(_highlights(facts, columns)),
        "removed": reproduction.removed(facts),
        "names": [row.name for row in rows],
        "columns": columns,
        "subsets": list(_subsets(facts)),
        "steps": reproduction.steps(facts),
        "params_file": reproduction.params_file(facts),
        "names_files": reproduction.names_files(facts),
        "limits": list(_limits(facts)),
        "cuts": [_cut(line) for line in facts.pruned["lines"] if not _is_dropped(line)],
        "dropped": [line.removesuffix(DROPPED) for line in facts.pruned["lines"] if _is_dropped(line)],
        **_charts(facts, columns),
    }


def _warnings(facts: Facts) -> list[str]:
    return warnings(facts.rows, facts.kind, facts.dense["classes"], facts.images, facts.rounds)


def _charts(facts: Facts, columns: Sequence[Column]) -> dict[str, Any]:
    rows = facts.rows
    shares = [column for column in columns if column.key in ("top1", "agreement")]
    return {
        "shares": [figures.shares(column, [row.name for row in rows]) for column in shares],
        "curves": [figures.curve(name, report["losses"]) for name, report in named(facts.healing) if report["losses"]],
        "alignment": _alignment(facts),
        "layers": _layers(facts),
        "heatmap": repairability(facts.allocation.get("evidence", {})),
        "costs": [figures.sizes(rows), *(figures.latencies(rows, batch) for batch in summary.batches(rows))],
    }


def _layers(facts: Facts) -> figures.Bars | None:
    allocation = facts.allocation
    kept = {layer: allocation["kept"][layer] for layer in allocation["layers"]}
    if facts.kind == "none" or allocation["unit"] == "blocks":
        return None
    if facts.kind == "mask":
        return figures.sparsities(kept, allocation["total"])
    return figures.widths(kept, allocation["total"], allocation["unit"])


def _alignment(facts: Facts) -> figures.DotPlot | None:
    last = last_round(facts.healing)
    aligned = [report for report in last if report["alignment_before"] and report["alignment_after"]]
    if not aligned:
        return None
    start = "before healing" if facts.rounds == 1 else f"before healing in round {facts.rounds}"
    states = [(start, aligned[0]["alignment_before"])]
    states += [(f"after {report['method']}", report["alignment_after"]) for report in aligned]
    order = forward_order(states[0][1])
    return figures.alignment(
        [(name, {block: values[block] for block in order if block in values}) for name, values in states]
    )


def _highlights(facts: Facts, columns: Sequence[Column]) -> Iterator[dict[str, str]]:
    """The measures that open the page, last beside dense: accuracy, size, work (weights for a mask), speed."""
    found = {column.key: column for column in columns}
    keys = ("top1" if "top1" in found else "agreement", "bytes", "nonzeros" if facts.kind == "mask" else "macs")
    for column in (found[key] for key in keys if key in found):
        dense, last = column.cells[0], column.cells[-1]
        compared = f"dense {dense.text} {column.unit}".rstrip()
        note = f"{compared}, {last.note}" if last.note else compared
        yield {"label": column.label, "value": last.text, "unit": column.unit, "note": note}
    for batch in summary.batches(facts.rows)[:1]:
        yield _speed(facts, found[f"latency{batch}"], batch)


def _speed(facts: Facts, column: Column, batch: int) -> dict[str, str]:
    ratio = facts.rows[-1].speedup(facts.rows[0], batch)
    label = f"Measured speed, batch of {batch}"
    if ratio is None:
        return {"label": label, "value": summary.MISSING, "unit": "", "note": "not measured on both models"}
    dense, last = column.cells[0].text, column.cells[-1].text
    quartiles = summary.span(ratio, lambda value: f"{value:.2f}")
    note = f"quartiles {quartiles}; {last} {column.unit}, dense {dense} {column.unit}"
    return {"label": label, "value": summary.times(ratio.median), "unit": "", "note": note}


def _subsets(facts: Facts) -> Iterator[dict[str, Any]]:
    for name, entry in sorted((facts.evaluation.get("subsets") or {}).items()):
        images = entry["images"]
        values = [entry["top1"].get(row.name) for row in facts.rows]
        cells = [Cell(summary.MISSING, None) if v is None else Cell(summary.percent(v, images), v) for v in values]
        yield {"name": name, "images": images, "cells": cells}


def _is_dropped(line: str) -> bool:
    return line.endswith(DROPPED)


def _cut(line: str) -> dict[str, Any]:
    """`producer -> consumer: kept of all` taken apart for a table."""
    names, _, counts = line.rpartition(": ")
    producer, _, consumer = names.partition(" -> ")
    kept, _, total = counts.partition(" of ")
    return {"producer": producer, "consumer": consumer, "kept": int(kept), "total": int(total.split(" ")[0])}


def _limits(facts: Facts) -> Iterator[str]:
    """What the figures do not say."""
    yield from _labels(facts)
    share = facts.rows[-1].top1 if facts.evaluation["labels"] else facts.rows[-1].agreement
    if share is not None:
        error = 100 * sqrt(share * (1 - share) / facts.images)
        yield f"On {facts.images:,} images, a share of {100 * share:.1f} % has a standard error of {error:.1f} points."
    if facts.kind == "mask":
        yield "Zeros shrink the file. They do not speed up a runtime that has no sparse kernels."
    if facts.rounds > 1:
        yield (
            f'What goes was taken away in {facts.rounds} rounds, each healed. "pruned" is all of it at once, a network '
            'that no healer saw; "after" is within the last round.'
        )
    yield from _passed_over(facts)
    yield _timing(facts)
    yield "MACs are counted for one image, zeros included: linear and convolution layers and the attention products."
    yield from (
        note for name, report in named(facts.healing) for note in (f"{name}: {text}" for text in report["notes"])
    )


def _labels(facts: Facts) -> Iterator[str]:
    """What labels were read for."""
    allowed = bool(facts.calibration.get("labels"))
    if facts.evaluation["labels"]:
        yield (
            f"Top-1 uses the labels of the {facts.images:,} evaluation images. The calibration set that pruning and "
            f"healing saw {'' if allowed else 'holds images only, and '}shares none with the evaluation."
        )
    else:
        yield (
            f"No labels were used{' to measure' if allowed else ', not even to measure'}. Agreement says how often the "
            "answer is the dense model's, not how often it is right."
        )
    if allowed:
        judged = bool(facts.allocation.get("evidence", {}).get("labels"))
        yield (
            "The calibration set holds the labels of its images (calibration.labels): "
            f"{'the allocation was chosen by them, pruning and healing saw none' if judged else 'no method read them'}."
        )


def _passed_over(facts: Facts) -> Iterator[str]:
    for key, reason in (("skipped", "could not be decoded"), ("duplicates", "are also among the evaluation images")):
        if facts.calibration.get(key):
            yield f"Images that calibration passed over because they {reason}: {len(facts.calibration[key]):,}."


def _timing(facts: Facts) -> str:
    if not summary.batches(facts.rows):
        return "Latency was not measured."
    return (
        "Latency was measured in eager PyTorch on the machine that ran the evaluation, the models taking turns in one "
        "process; other runtimes and machines give other ratios. The range of a ratio pairs the quartiles at their "
        f"worst and best. Measured with {facts.evaluation['measured_with']}."
    )
