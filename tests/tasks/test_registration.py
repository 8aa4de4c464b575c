"""The registration stage: one version for one bundle, and all that made it in the record of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from heal import bundle
from tasks import artifacts, mlflow_client, params, registration, registry, state, tracking
from tasks.manifest import DamagedError
from tasks.mlflow_store import UnreachableError
from tasks.params import Params
from tasks.progress import Progress
from tasks.table import STAGES

pytest_plugins = ["tests.tasks.registries"]

NAME = "tiny-vit"
LOSSES = [1 / step for step in range(1, 1500)]


@pytest.fixture
def inputs(tmp_path: Path, bundles: dict[str, Path]) -> dict[str, Path]:
    """What the stages before it publish."""
    folders = {stage: tmp_path / "inputs" / stage for stage in STAGES["registration"].upstream}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for stage, which in (("dense", "dense"), ("pruning", "ruined")):
        shutil.copytree(bundles[which], folders[stage] / "bundle")
    metadata = {"parent_digest": "d" * 64, "calibration_digest": "c" * 64, "licence": "MIT"}
    bundle.save(bundle.load(bundles["healed"]), folders["healing"] / "bundle", metadata=metadata)
    size = {"parameters": 10, "nonzeros": 9, "macs": 8, "bytes": 7}
    timing = {"1": {"median": 0.5, "low": 0.4, "high": 0.6, "runs": 30}}
    models = {
        name: {"top1": 0.9, "agreement": 1.0, **size, "latency": timing} for name in ("dense", "after closed_form")
    }
    models["healed"] = {"top1": None, "agreement": 0.8, **size}
    reports: list[dict[str, Any]] = [{"method": "closed_form", "params": {"ridge": 0.1}, "losses": []}]
    reports.append({"method": "starfish", "params": {"lr": 6e-4, "steps": 1499}, "losses": LOSSES})
    contents: dict[str, Any] = {
        "dense/dense.json": {"source": "timm:vit"},
        "calibration/calibration.json": {"source": "digits", "count": 512, "ids_digest": "e" * 64},
        "allocation/allocation.json": {"method": "global_variance", "kept": {"blocks.0": 5}},
        "healing/healing.json": reports,
        "evaluation/evaluation.json": {
            "source": "imagefolder:validation",
            "ids_digest": "e" * 64,
            "images": 64,
            "labels": True,
            "models": models,
        },
        "healing/manifest.json": {"key": "k" * 64, "stage": "healing", "files": {"healing.json": {}}},
    }
    for name, content in contents.items():
        artifacts.write_json(tmp_path / "inputs" / name, content)
    (folders["report"] / "report.html").write_text("<p>")
    (folders["report"] / "verdict.txt").write_text("Half the size.\n")
    return folders


@pytest.fixture
def declared() -> Params:
    """The params, restricted to what the stage declares."""
    return params.load(None, [f"registration.name={NAME}"]).restrict(STAGES["registration"].params)


def run(declared: Params, inputs: dict[str, Path], tmp_path: Path, attempt: str = "output") -> dict[str, Any]:
    output = tmp_path / attempt
    output.mkdir()
    registration.run(declared, inputs, output, Progress(tmp_path / "checkpoints"))
    found: dict[str, Any] = artifacts.read_json(output / "registration.json")
    return found


def test_the_version_is_the_healed_bundle(
    home: Path, declared: Params, inputs: dict[str, Path], tmp_path: Path
) -> None:
    registered = run(declared, inputs, tmp_path)
    digest = bundle.digest(inputs["healing"] / "bundle")
    assert registered.keys() == {"name", "version", "model_uri", "bundle_digest", "run_id"}
    assert (registered["name"], registered["version"], registered["bundle_digest"]) == (NAME, "1", digest)
    assert registry.resolve(registered["model_uri"]) == digest
    assert mlflow_client.client().get_run(registered["run_id"]).info.status == "FINISHED"


def test_the_run_tells_what_made_it(home: Path, declared: Params, inputs: dict[str, Path], tmp_path: Path) -> None:
    found = mlflow_client.client().get_run(run(declared, inputs, tmp_path)["run_id"])
    assert found.data.params == {
        "dense.source": "timm:vit",
        "calibration.source": "digits",
        "calibration.count": "512",
        "allocation.method": "global_variance",
        "healing.methods": "closed_form, starfish",
        "healing.closed_form.ridge": "0.1",
        "healing.starfish.lr": "0.0006",
        "healing.starfish.steps": "1499",
    }
    assert found.data.metrics["dense/top1"] == 0.9
    assert found.data.metrics["after closed_form/latency_batch1_seconds"] == 0.5
    assert "healed/top1" not in found.data.metrics
    curve = mlflow_client.client().get_metric_history(found.info.run_id, "healing/starfish/loss")
    assert [point.value for point in sorted(curve, key=lambda point: point.step)] == LOSSES
    assert found.inputs is not None
    read = {(data.dataset.name, data.tags[0].value) for data in found.inputs.dataset_inputs}
    assert read == {("digits", "calibration"), ("imagefolder:validation", "evaluation")}
    kept = {path.name: path for path in state.mlflow_artifacts().rglob("*.*") if "models" not in path.parts}
    assert kept.keys() == {"report.html", "allocation.json", "lineage.json"}
    assert json.loads(kept["lineage.json"].read_text())["stages"]["healing"] == {"key": "k" * 64, "stage": "healing"}


def test_the_version_names_its_parents(home: Path, declared: Params, inputs: dict[str, Path], tmp_path: Path) -> None:
    tags = registry.version_of(run(declared, inputs, tmp_path)["model_uri"]).tags
    assert (tags["regrow.parent"], tags["regrow.calibration"], tags["regrow.licence"]) == ("d" * 64, "c" * 64, "MIT")
    assert json.loads(tags["regrow.artifacts"]).keys() == inputs.keys()
    assert registry.referenced_artifacts() == set(json.loads(tags["regrow.artifacts"]).values())


def test_again_is_the_same_version_and_the_same_run(
    home: Path, declared: Params, inputs: dict[str, Path], tmp_path: Path
) -> None:
    assert run(declared, inputs, tmp_path, "first") == run(declared, inputs, tmp_path, "second")
    assert len(registry.complete_versions(NAME)) == 1


def test_the_run_of_the_flow_is_used_and_left_open(
    home: Path, declared: Params, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow = tracking.open_run("flow-1", {"healing.starfish.lr": 6e-4, "healing.methods": "closed_form, starfish"})
    monkeypatch.setenv("MLFLOW_RUN_ID", flow)
    assert run(declared, inputs, tmp_path)["run_id"] == flow
    assert mlflow_client.client().get_run(flow).info.status == "RUNNING"


def test_a_registration_is_valid_while_its_version_is(
    home: Path, declared: Params, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    registered = run(declared, inputs, tmp_path)
    assert registration.still_valid(output)
    monkeypatch.setenv("REGROW_HOME", str(tmp_path / "another"))
    assert not registration.still_valid(output)
    monkeypatch.setenv("REGROW_HOME", str(home))
    mlflow_client.client().delete_model_version(NAME, registered["version"])
    assert not registration.still_valid(output)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError):
        registration.still_valid(output)


def test_a_damaged_input_is_not_registered(
    home: Path, declared: Params, inputs: dict[str, Path], tmp_path: Path
) -> None:
    (inputs["report"] / "link").symlink_to("report.html")
    with pytest.raises(DamagedError):
        run(declared, inputs, tmp_path)
    assert registry.complete_versions(NAME) == []
