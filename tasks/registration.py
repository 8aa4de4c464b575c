"""Stage: the healed bundle as a version in the registry, and what made it in the record of the run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heal import bundle
from tasks import artifacts, manifest
from tasks.healing_reports import last_round, named
from tasks.mlflow_store import RegistryError, UnreachableError

if TYPE_CHECKING:
    from tasks.params import Params
    from tasks.progress import Progress

MEASURES = ("top1", "agreement", "parameters", "nonzeros", "macs", "bytes")


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Register the healed bundle, once, and write registration.json.

    The run is the one that the flow opened (MLFLOW_RUN_ID); without one, a run of the bundle's own.
    """
    from tasks import registry, tracking  # they bring MLflow, which takes seconds

    section, healed = params.registration, inputs["healing"] / "bundle"
    digest = bundle.digest(healed)
    with tracking.joined_run(f"{section.name} {digest}") as run_id:
        _record(run_id, inputs, output)
        tags = _tags(inputs, section.licence)
        allowed = params.dense.adapter_allow
        said = (inputs["report"] / "verdict.txt").read_text().strip()
        version = registry.register(
            healed, section.name, run_id=run_id, tags=tags, allow_adapters=allowed, description=said
        )
    progress.log(f"registered as {version.uri}")
    registered = {"name": version.name, "version": version.version, "model_uri": version.uri}
    artifacts.write_json(output / "registration.json", registered | {"bundle_digest": digest, "run_id": run_id})
    return {"version": float(version.version)}


def still_valid(output: Path) -> bool:
    """Whether the version is in the registry of today, complete and of the same bundle."""
    from tasks import registry

    registered = artifacts.read_json(output / "registration.json")
    try:
        return bool(registry.resolve(registered["model_uri"]) == registered["bundle_digest"])
    except UnreachableError:  # that says nothing about the version
        raise
    except RegistryError:
        return False


def _record(run_id: str, inputs: Mapping[str, Path], output: Path) -> None:
    """Params, metrics, curves, data sets and files, from what the artifacts say."""
    from tasks import tracking

    tracking.log_params(run_id, dict(_params(inputs)))
    tracking.log_metrics(run_id, dict(_metrics(inputs)))
    for name, report in named(artifacts.read_json(inputs["healing"] / "healing.json")):
        tracking.log_curve(run_id, f"healing/{name}/loss", report["losses"])
    calibration = artifacts.read_json(inputs["calibration"] / "calibration.json")
    tracking.log_dataset(run_id, calibration["source"], calibration["ids_digest"], "calibration")
    evaluation = artifacts.read_json(inputs["evaluation"] / "evaluation.json")
    tracking.log_dataset(run_id, evaluation["source"], evaluation["ids_digest"], "evaluation")
    tracking.log_artifact(run_id, inputs["report"] / "report.html")
    tracking.log_artifact(run_id, inputs["allocation"] / "allocation.json")
    artifacts.write_json(output / "lineage.json", _lineage(inputs))
    tracking.log_artifact(run_id, output / "lineage.json")


def _params(inputs: Mapping[str, Path]) -> Iterator[tuple[str, Any]]:
    dense = artifacts.read_json(inputs["dense"] / "dense.json")
    calibration = artifacts.read_json(inputs["calibration"] / "calibration.json")
    allocation = artifacts.read_json(inputs["allocation"] / "allocation.json")
    reports = artifacts.read_json(inputs["healing"] / "healing.json")
    yield "dense.source", dense["source"]
    yield "calibration.source", calibration["source"]
    yield "calibration.count", calibration["count"]
    yield "allocation.method", allocation["method"]
    if rounds := (bundle.read(inputs["healing"] / "bundle")["method"] or {}).get("rounds"):
        yield "healing.rounds", rounds
    last = last_round(reports)
    yield "healing.methods", ", ".join(report["method"] for report in last)
    for report in last:
        for name, value in report["params"].items():
            yield f"healing.{report['method']}.{name}", value


def _metrics(inputs: Mapping[str, Path]) -> Iterator[tuple[str, float]]:
    """MODEL/MEASURE for every model that was evaluated; latency in seconds a batch."""
    for model, measured in artifacts.read_json(inputs["evaluation"] / "evaluation.json")["models"].items():
        for name in MEASURES:
            if measured.get(name) is not None:
                yield f"{model}/{name}", float(measured[name])
        for batch, timing in (measured.get("latency") or {}).items():
            yield f"{model}/latency_batch{batch}_seconds", float(timing["median"])


def _tags(inputs: Mapping[str, Path], licence: str | None) -> dict[str, str]:
    """What a version is asked for most; all the rest is in lineage.json of its run."""
    described = bundle.read(inputs["healing"] / "bundle")
    tags = {
        "regrow.parent": described["parent_digest"],
        "regrow.calibration": described["calibration_digest"],
        "regrow.licence": licence or described["licence"],
        "regrow.commit": _commit(),
        "regrow.artifacts": json.dumps({stage: _digest(folder) for stage, folder in inputs.items()}),
    }
    return {name: value for name, value in tags.items() if value is not None}


def _lineage(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Enough to run it again: the commit, and of every stage its key with all that went into it."""
    records = {}
    for stage, folder in inputs.items():
        if (folder / manifest.NAME).is_file():
            record = artifacts.read_json(folder / manifest.NAME)
            records[stage] = {name: value for name, value in record.items() if name != "files"}
    return {"commit": _commit(), "stages": records}


def _digest(folder: Path) -> str:
    """The artifact's digest: a folder that the store handed out carries its manifest."""
    files = manifest.scan(folder)
    return manifest.digest_of({name: file for name, file in files.items() if name != manifest.NAME})


def _commit() -> str | None:
    """The commit of the working directory, with `-dirty` when it has changes; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
