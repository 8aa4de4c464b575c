"""How to make a result again: the params that the artifacts remember, and the command that sets them."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.facts import Facts

PLAIN = re.compile(r"[A-Za-z][\w./:@-]*")


@dataclass(frozen=True)
class Step:
    """A stage with the method it ran and that method's params, as texts."""

    stage: str
    method: str
    params: tuple[tuple[str, str], ...]


def steps(facts: Facts) -> list[Step]:
    """What every stage was told, in the order of the run."""
    unit = facts.allocation["unit"]
    return [
        Step("dense", facts.dense["source"], ()),
        Step("calibration", facts.calibration["source"], (("count", _text(facts.calibration["count"])),)),
        Step(
            "allocation",
            facts.allocation["method"],
            ((f"budget.{unit}", _text(removed(facts))), *_params(facts.allocation["params"])),
        ),
        Step("pruning", facts.pruner.get("pruner", ""), _params(facts.pruner.get("params") or {})),
        *(Step("healing", report["method"], _params(report["params"])) for report in facts.healing),
    ]


def overrides(facts: Facts) -> Iterator[str]:
    """The same as `-S` overrides."""
    unit = facts.allocation["unit"]
    yield f"dense.source={_text(facts.dense['source'])}"
    yield f"calibration.source={_text(facts.calibration['source'])}"
    yield f"calibration.count={facts.calibration['count']}"
    yield f"allocation.method={facts.allocation['method']}"
    yield f"allocation.budget={_flow({unit: removed(facts)})}"
    yield from _options("allocation", facts.allocation["method"], facts.allocation["params"])
    if "pruner" in facts.pruner:
        yield f"pruning.method={facts.pruner['pruner']}"
        yield from _options("pruning", facts.pruner["pruner"], facts.pruner.get("params") or {})
    yield f"healing.methods={_flow(list(facts.healers))}"
    for report in facts.healing:
        yield from _options("healing", report["method"], report["params"])


def command(facts: Facts) -> str:
    """`regrow run` with every override, a line each, quoted for a shell."""
    return " \\\n  ".join(["regrow run", *(f"-S {shlex.quote(text)}" for text in overrides(facts))])


def names_files(facts: Facts) -> bool:
    """Whether a source is a file or folder: artifacts name these without their path."""
    sources = (facts.dense["source"], facts.calibration["source"])
    return any(source.partition(":")[0] in ("file", "bundle", "imagefolder", "parquet") for source in sources)


def removed(facts: Facts) -> float:
    """The fraction that the budget asked to remove, in its shortest spelling that asks for the same number."""
    asked, total = facts.allocation["asked"], facts.total
    exact = 1 - asked / total if total else 0.0
    spellings = (round(exact, digits) for digits in range(1, 16))
    return next((value for value in spellings if math.floor((1 - value) * total + 0.5) == asked), exact)


def _params(params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((name, _text(value)) for name, value in params.items())


def _options(section: str, method: str, params: Mapping[str, Any]) -> Iterator[str]:
    for name, value in params.items():
        yield f"{section}.{method}.{name}={_text(value)}"


def _text(value: Any) -> str:
    """As YAML reads it back: JSON, but plain words without quotes."""
    is_plain = isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false")
    return str(value) if is_plain else _flow(value)


def _flow(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
