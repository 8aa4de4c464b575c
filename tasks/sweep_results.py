"""What one point of a sweep measured: as the numbers that MLflow keeps, and read back from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tasks import summary
from tasks.summary import Row, Spread

Status = Literal["finished", "failed", "running", "interrupted"]

MODELS = ("dense", "pruned", "healed")
SHARES = ("top1", "agreement")
COUNTS = ("parameters", "nonzeros", "macs", "bytes", "bytes_unpacked")
PARTS = ("median", "low", "high")

POINT, IMAGES, ARTIFACTS, ERROR = "regrow.point", "regrow.images", "regrow.artifacts", "regrow.error"
"""Tags of a point's run, beside model, method, budget and seed."""


@dataclass(frozen=True)
class Result:
    """One point, as its MLflow run has it.

    `budget` is UNIT=SHARE. The rows are None where the evaluation did not come about. `images` is how many images it
    had, `images_digest` which, of how many `classes` (0: not recorded). `seconds` is what all stages took when they
    were computed, `healing_seconds` the healers alone. `artifacts` maps a stage to the digest of what it made.
    `is_older`: another code, or another model or data set by the same name, would make it today.
    """

    point: str
    model: str
    method: str
    budget: str
    seed: int
    status: Status
    identity: str
    run_id: str
    error: str = ""
    dense: Row | None = None
    pruned: Row | None = None
    healed: Row | None = None
    images: int = 0
    classes: int = 0
    images_digest: str = ""
    seconds: float | None = None
    healing_seconds: float | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)
    is_older: bool = False


def metrics(evaluation: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """The numbers of an evaluation.json by name, such as evaluation/healed_bytes; `seconds` of all stages.

    The names continue those that the stages log themselves.
    """
    counts = {name: float(evaluation[name]) for name in ("images", "classes") if name in evaluation}
    found = {f"evaluation/{name}": count for name, count in counts.items()} | {"point/seconds": seconds}
    for row in summary.rows(evaluation):
        if row.name in MODELS:
            found |= {f"evaluation/{row.name}_{name}": value for name, value in _numbers(row).items()}
    return found


def tags(evaluation: Mapping[str, Any], artifacts: Mapping[str, str]) -> dict[str, str]:
    """What a finished point is to be told from others by."""
    return {IMAGES: evaluation["ids_digest"], ARTIFACTS: json.dumps(dict(artifacts), sort_keys=True)}


def result(run_id: str, identity: str, status: Status, tags: Mapping[str, str], metrics: Mapping[str, float]) -> Result:
    """The point of a run with these tags and metrics; of a run that did not finish only who it is, and why."""
    named = (tags[POINT], tags["model"], tags["method"], tags["budget"], int(tags["seed"]))
    made = Result(*named, status=status, identity=identity, run_id=run_id)
    if status != "finished":
        return replace(made, error=tags.get(ERROR, ""))
    return replace(
        made,
        dense=_row("dense", metrics),
        pruned=_row("pruned", metrics),
        healed=_row("healed", metrics),
        images=int(metrics["evaluation/images"]),
        classes=int(metrics.get("evaluation/classes", 0)),
        images_digest=tags[IMAGES],
        seconds=metrics["point/seconds"],
        healing_seconds=sum(value for name, value in metrics.items() if re.fullmatch(r"healing/\w+_seconds", name)),
        artifacts=json.loads(tags[ARTIFACTS]),
    )


def _numbers(row: Row) -> dict[str, float]:
    """The row's numbers by name; what was not measured is left out."""
    found = {name: getattr(row, name) for name in (*SHARES, *COUNTS)}
    for batch, spread in row.latency.items():
        found |= {f"latency_batch{batch}_{part}_seconds": getattr(spread, part) for part in PARTS}
    return {name: float(value) for name, value in found.items() if value is not None}


def _row(name: str, metrics: Mapping[str, float]) -> Row:
    """What `_numbers` gave, under evaluation/NAME_."""
    prefix = f"evaluation/{name}_"
    own = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    batches = sorted(int(found[1]) for key in own if (found := re.fullmatch(r"latency_batch(\d+)_median_seconds", key)))
    spreads = {batch: Spread(*(own[f"latency_batch{batch}_{part}_seconds"] for part in PARTS)) for batch in batches}
    counts = {key: int(own[key]) for key in COUNTS}
    return Row(name, top1=own.get("top1"), agreement=own.get("agreement"), latency=spreads, **counts)
