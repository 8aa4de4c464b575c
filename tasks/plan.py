"""What a run would do: which stages are cached, which would run, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.keys import Ingredients, Resolved, StageParams, canonical, stage_key
from tasks.manifest import Record
from tasks.runner import find
from tasks.store import Store
from tasks.table import STAGES, Stage, Stages

SECTIONS = ("params", "resolved", "inputs", "code", "packages")
UNSET = "(unset)"


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan.

    key: None while inputs are unknown. digest: of the cached artifact. why: the reasons to run, one
    line each; empty when cached. record: the finished computation when cached.
    """

    name: str
    cached: bool
    key: str | None
    digest: str | None
    why: list[str]
    record: Record | None = None


def plan(
    params: StageParams, store: Store, resolved: Resolved | None = None, stages: Stages = STAGES
) -> list[PlannedStage]:
    """Every stage in the order of a run. Compares names and sizes of artifacts only; a run hashes them."""
    planned: dict[str, PlannedStage] = {}
    for stage in stages.values():
        waits = [name for name in stage.upstream if not planned[name].cached]
        if waits:
            last = [name for name in waits if not any(name in stages[other].upstream for other in waits)]
            planned[stage.name] = PlannedStage(stage.name, False, None, None, [f"waits for {name}" for name in last])
        else:
            inputs = {name: str(planned[name].digest) for name in stage.upstream}
            planned[stage.name] = _planned(stage, *stage_key(stage, params, inputs, resolved), store)
    return list(planned.values())


def finished(
    params: StageParams, store: Store, resolved: Resolved | None = None, stages: Stages = STAGES
) -> dict[str, Record] | None:
    """The finished computation of every stage, or None when one of them would run; it does not ask why."""
    found: dict[str, Record] = {}
    for stage in stages.values():
        inputs = {name: found[name].digest for name in stage.upstream}
        record = find(stage, stage_key(stage, params, inputs, resolved)[0], store, thorough=False)
        if record is None:
            return None
        found[stage.name] = record
    return found


def _planned(stage: Stage, key: str, ingredients: Ingredients, store: Store) -> PlannedStage:
    found = find(stage, key, store, thorough=False)
    if found is not None:
        return PlannedStage(stage.name, True, key, found.digest, [], found)
    return PlannedStage(stage.name, False, key, None, why(stage, key, ingredients, store))


def why(stage: Stage, key: str, ingredients: Ingredients, store: Store) -> list[str]:
    """What sets a computation apart from the nearest earlier one of its stage (the newest, on ties)."""
    before = store.record(key)
    if before is not None:
        gone = not store.holds(before.digest, thorough=False)
        return ["its artifact is gone or was damaged" if gone else "what it made outside the store is gone"]
    reasons = [list(differences(record.ingredients, ingredients)) for record in store.records(stage.name)]
    return min(reasons, key=len, default=["never run before"])


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """One line for every ingredient that differs."""
    for section in SECTIONS:
        old, new = before.get(section, {}), after[section]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name, UNSET) != new.get(name, UNSET):
                if section == "resolved":
                    yield f"{name} {_shown(after['names'].get(name, ''))}".rstrip() + ": points to something else"
                else:
                    yield _line(section, name, old.get(name, UNSET), new.get(name, UNSET))


def _line(section: str, name: str, old: Any, new: Any) -> str:
    if section == "inputs":
        return f"input {name}: new digest"
    if section == "code":
        note = " (new)" if old == UNSET else " (no longer used)" if new == UNSET else ""
        return f"code: {name}{note}"
    return f"{name} {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else canonical(value)
