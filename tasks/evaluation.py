"""Stage: dense, pruned and healed on the same images: accuracy, agreement, size and measured latency."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heal import cost
from heal.evaluation import agreement, predict, top1
from heal.progress import Report
from tasks import artifacts, models
from tasks.healing_reports import last_round
from tasks.images import load_evaluation

if TYPE_CHECKING:
    from tasks.images import EvaluationImages
    from tasks.params import Params
    from tasks.progress import Progress


def run(params: Params, inputs: dict[str, Path], output: Path, progress: Progress) -> dict[str, float]:
    """Write evaluation.json. Labels are read when `evaluation.labels` allows it, and the log says so."""
    section = params.evaluation
    folders = candidates(inputs)
    allowed = params.dense.adapter_allow
    networks = {name: models.load(folder, allowed, section.device) for name, folder in folders.items()}
    images = load_evaluation(section, inputs["dense"], inputs["calibration"], progress)
    measured: dict[str, Any] = {}
    logits: dict[str, Tensor] = {}
    for name, network in networks.items():
        logits[name] = predict(network, images.array, section.batch_size, _named(name, progress))
        measured[name] = _quality(logits[name], logits["dense"], images.labels)
        measured[name] |= _size(network, folders[name], images.array.shape[1:])
    timings = _latencies({name: networks[name] for name in section.latency_models if name in networks}, images, params)
    for name, timing in timings.items():
        measured[name]["latency"] = timing
    content = {
        "source": images.source,
        "ids_digest": images.digest,
        "images": len(images.array),
        "classes": logits["dense"].shape[1],
        "labels": images.labels is not None,
        "models": measured,
        "subsets": _by_subset(logits, images),
        "budget": _budget(inputs),
        "measured_with": _measured_with(models.device_of(section.device)) if section.latency_rounds else None,
    }
    artifacts.write_json(output / "evaluation.json", content)
    return _metrics(measured)


def _measured_with(device: torch.device) -> str:
    """What speed depends on, in words."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    waiting = f", OMP_WAIT_POLICY={policy}" if (policy := os.environ.get("OMP_WAIT_POLICY")) else ""
    return f"{where} ({platform.machine()}{waiting}), torch {torch.__version__}, timm {metadata.version('timm')}"


def candidates(inputs: Mapping[str, Path]) -> dict[str, Path]:
    """The folders of everything to evaluate, in the order of its making."""
    between = {}
    reports = artifacts.read_json(inputs["healing"] / "healing.json")
    for report in last_round(reports)[:-1]:
        between[f"after {report['method']}"] = inputs["healing"] / "after" / report["method"]
    return {"dense": inputs["dense"], "pruned": inputs["pruning"], **between, "healed": inputs["healing"]}


def _named(name: str, progress: Progress) -> Report:
    return lambda _, done, total: progress.report(name, done, total)


def _quality(logits: Tensor, dense: Tensor, labels: Tensor | None) -> dict[str, float | None]:
    return {"top1": None if labels is None else top1(logits, labels), "agreement": agreement(logits, dense)}


def _size(network: nn.Module, folder: Path, input_size: tuple[int, ...]) -> dict[str, int]:
    return {
        "parameters": cost.parameters(network),
        "nonzeros": cost.nonzeros(network),
        "macs": cost.macs(network, input_size),
        "bytes": (folder / "bundle" / "weights.safetensors").stat().st_size,
        "bytes_unpacked": sum(tensor.nbytes for tensor in network.state_dict().values()),
    }


def _latencies(networks: dict[str, nn.Module], images: EvaluationImages, params: Params) -> dict[str, dict[str, Any]]:
    """Seconds a batch by model and batch size, measured side by side."""
    section = params.evaluation
    timings: dict[str, dict[str, Any]] = {name: {} for name in networks}
    for size in section.latency_batches if section.latency_rounds else ():
        indices = torch.arange(size) % len(images.array)
        for name, timing in cost.latency(networks, images.array[indices], section.latency_rounds).items():
            timings[name][str(size)] = asdict(timing)
    return timings


def _by_subset(logits: Mapping[str, Tensor], images: EvaluationImages) -> dict[str, dict[str, Any]]:
    """Top-1 of every model on every named subset of the labelled images."""
    if images.labels is None or images.subsets is None:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for subset in sorted(set(images.subsets)):
        rows = torch.tensor([i for i, name in enumerate(images.subsets) if name == subset])
        shares = {name: top1(values[rows], images.labels[rows]) for name, values in logits.items()}
        found[subset] = {"images": len(rows), "top1": shares}
    return found


def _budget(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """As allocated; all stays where the pruner took nothing."""
    budget = artifacts.load_allocation(inputs["allocation"]).budget
    budget |= {"unit": "MACs" if budget["unit"] == "macs" else budget["unit"]}
    removed = artifacts.read_json(inputs["pruning"] / "pruned.json")["removed"]
    return budget if removed else budget | {"got": budget["total"]}


def _metrics(measured: Mapping[str, Any]) -> dict[str, float]:
    """dense_top1, after_closed_form_agreement, ...; what was not measured is left out."""
    return {
        f"{name.replace(' ', '_')}_{key}": entry[key]
        for name, entry in measured.items()
        for key in ("top1", "agreement")
        if entry[key] is not None
    }
