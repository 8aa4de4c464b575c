"""How values are written into artifacts and read back: safetensors for numbers, JSON for names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from heal.values import NM, Allocation, ChannelCut, LayerStats, Mask, Statistics


def write_json(path: Path, content: Any) -> None:
    """Sorted, indented, with a newline at the end: the same content gives the same bytes."""
    path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text())


def save_statistics(statistics: Statistics, folder: Path) -> None:
    """statistics.safetensors (float64) and statistics.json (counts of rows and images)."""
    tensors: dict[str, Tensor] = {}
    for tap, stats in statistics.items():
        tensors[f"{tap}/mean"], tensors[f"{tap}/m2"] = stats.mean, stats.m2
        if stats.comoment is not None:
            tensors[f"{tap}/comoment"] = stats.comoment
    _save(tensors, folder / "statistics.safetensors")
    counts = {tap: {"count": stats.count, "images": stats.images} for tap, stats in statistics.items()}
    write_json(folder / "statistics.json", counts)


def load_statistics(folder: Path, comoments: bool = True) -> dict[str, LayerStats]:
    """What `save_statistics` wrote; without the second moments, which are large, when nobody reads them."""
    with safe_open(folder / "statistics.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if comoments or not name.endswith("/comoment")]  # noqa: SIM118
        tensors = {name: file.get_tensor(name) for name in names}
    counts = read_json(folder / "statistics.json")
    return {
        tap: LayerStats(
            entry["count"],
            tensors[f"{tap}/mean"],
            tensors[f"{tap}/m2"],
            tensors.get(f"{tap}/comoment"),
            entry["images"],
        )
        for tap, entry in counts.items()
    }


def save_labels(labels: Tensor, folder: Path) -> None:
    """labels.safetensors: class indices [n], int64, in the order of the images."""
    _save({"labels": labels}, folder / "labels.safetensors")


def load_labels(folder: Path) -> Tensor:
    """What `save_labels` wrote."""
    return load_file(folder / "labels.safetensors")["labels"]


def save_allocation(allocation: Allocation, method: str, params: Mapping[str, Any], folder: Path) -> None:
    """allocation.json."""
    content = {
        "method": method,
        "params": dict(params),
        "unit": allocation.unit,
        "asked": allocation.asked,
        "got": allocation.got,
        "budget": allocation.budget,
        "kept": dict(allocation.kept),
        "total": dict(allocation.total),
        "layers": list(allocation.kept),
        "cost": dict(allocation.cost),
        "evidence": dict(allocation.evidence),
        "pattern": _text(allocation.pattern),
    }
    write_json(folder / "allocation.json", content)


def load_allocation(folder: Path) -> Allocation:
    """What `save_allocation` wrote; layers in forward order."""
    content = read_json(folder / "allocation.json")
    kept = {layer: content["kept"][layer] for layer in content["layers"]}
    total = {layer: content["total"][layer] for layer in kept}
    evidence, pattern = content["evidence"], _pattern(content["pattern"])
    return Allocation(content["unit"], kept, total, content["asked"], content["cost"], evidence, pattern)


def save_pruned(pruned: Mask | ChannelCut, lines: tuple[str, ...], folder: Path) -> None:
    """pruned.safetensors and pruned.json: what stays, how much goes, and a line for people on each layer."""
    tensors = {f"keep/{name}": keep for name, keep in pruned.keep.items()}
    tensors |= {f"update/{name}": value for name, value in pruned.updates.items()}
    _save(tensors, folder / "pruned.safetensors")
    content: dict[str, Any] = {"kind": "mask", "names": list(pruned.keep), "lines": list(lines)}
    content |= {"removed": pruned.zeros if isinstance(pruned, Mask) else pruned.removed}
    if isinstance(pruned, ChannelCut):
        content |= {"kind": "cut", "total": dict(pruned.total), "dropped": list(pruned.dropped)}
    else:
        content |= {"pattern": _text(pruned.pattern)}
    write_json(folder / "pruned.json", content)


def load_pruned(folder: Path) -> Mask | ChannelCut:
    """What `save_pruned` wrote."""
    content, tensors = read_json(folder / "pruned.json"), load_file(folder / "pruned.safetensors")
    keep = {name: tensors[f"keep/{name}"] for name in content["names"]}
    updates = {name.removeprefix("update/"): value for name, value in tensors.items() if name.startswith("update/")}
    if content["kind"] == "cut":
        return ChannelCut(keep, content["total"], updates, tuple(content["dropped"]))
    return Mask(keep, updates, _pattern(content["pattern"]))


def _text(pattern: NM | None) -> str | None:
    return None if pattern is None else str(pattern)


def _pattern(text: str | None) -> NM | None:
    return None if text is None else NM.of(text)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().to(torch.device("cpu")).contiguous() for name, tensor in tensors.items()}, path)
