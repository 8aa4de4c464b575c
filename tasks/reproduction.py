"""How to make a result again: the params that the artifacts were made with, as a file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tasks import source_name
from tasks.facts import Facts
from tasks.healing_reports import last_round
from tasks.table import MOVING

PLAIN = re.compile(r"[A-Za-z][\w./:@-]*")


@dataclass(frozen=True)
class Step:
    """A stage with the method it ran and that method's params, as texts."""

    stage: str
    method: str
    params: tuple[tuple[str, str], ...]


def steps(facts: Facts) -> list[Step]:
    """What every stage was told, in the order of the run."""
    rounds = facts.healer.get("rounds", 1)
    return [
        Step("dense", facts.dense["source"], ()),
        Step("calibration", facts.calibration["source"], (("count", _text(facts.calibration["count"])),)),
        Step(
            "allocation",
            facts.allocation["method"],
            ((f"budget.{facts.budget}", _text(removed(facts))), *_params(facts.allocation["params"])),
        ),
        Step("pruning", facts.pruner.get("pruner", ""), _params(facts.pruner.get("params") or {})),
        *([Step("healing", "in rounds", (("rounds", _text(rounds)),))] if rounds > 1 else []),
        *(Step("healing", report["method"], _params(report["params"])) for report in last_round(facts.healing)),
    ]


def params_file(facts: Facts) -> str:
    """A params.yaml that makes the same artifacts again; files and folders without their path."""
    tree: dict[str, Any] = {}
    for dotted in sorted(facts.params):
        value = facts.params[dotted]
        if value is None:
            continue
        *sections, leaf = dotted.split(".")
        inside = tree
        for name in sections:
            inside = inside.setdefault(name, {})
        inside[leaf] = _public(dotted, value)
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=88) if tree else ""


def names_files(facts: Facts) -> bool:
    """Whether a param is a file or folder, which stands there without its path."""
    return any(value != _public(dotted, value) for dotted, value in facts.params.items())


def removed(facts: Facts) -> float:
    """The fraction that the budget asked to remove; where params do not tell, the shortest that asks for the same."""
    stated = facts.params.get(f"allocation.budget.{facts.budget}")
    if stated is not None:
        return float(stated)
    asked, total = facts.asked, facts.total
    exact = 1 - asked / total if total else 0.0
    spellings = (round(exact, digits) for digits in range(1, 16))
    return next((value for value in spellings if math.floor((1 - value) * total + 0.5) == asked), exact)


def _params(params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, _text(value)) for name, value in params.items())


def _public(dotted: str, value: Any) -> Any:
    """A param without a path of this machine in it."""
    if dotted not in MOVING or not isinstance(value, str):
        return value
    return Path(value).name if dotted == "evaluation.labels" else source_name.public(value)


def _text(value: Any) -> str:
    """As YAML reads it back: JSON, but plain words without quotes."""
    is_plain = isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false")
    return str(value) if is_plain else json.dumps(value, ensure_ascii=False)
