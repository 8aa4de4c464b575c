"""Runs as the report finds them: the folders of its upstream stages, made up but in their layouts."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEIT = (1022, 1369, 1222, 1103, 988, 924, 794, 539, 286, 307, 160, 502)  # hidden units of 1536 that go, by block
LARGEST = 2**21  # bytes of a weights file: hashing whole ones would take the tests' time


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, sort_keys=True))


def bundle(
    folder: Path, name: str, classes: list[str] | None, size: int, method: Mapping[str, Any] | None = None
) -> None:
    """A bundle whose weights file has the right size and header; nobody here reads the weights."""
    description = {"architecture": {"source": "timm", "name": name, "kwargs": {}}, "class_names": classes}
    write(folder / "bundle.json", description | {"method": method, "files": {"weights.safetensors": "ab" * 32}})
    size = min(size, LARGEST)
    vector, matrix = 4000, size // 4 - 1100
    entries = {"b": {"dtype": "F32", "shape": [vector // 4], "data_offsets": [0, vector]}}
    entries["w"] = {"dtype": "F32", "shape": [matrix, 1], "data_offsets": [vector, vector + 4 * matrix]}
    header = json.dumps(entries).encode()
    with open(folder / "weights.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(size)


def model(top1: float | None, agreement: float, size: tuple[int, int, int, int], *times: float) -> dict[str, Any]:
    parameters, nonzeros, macs, stored = size
    spread = {"1": 0.021, "32": 0.034}
    latency = {
        batch: {"median": t, "low": t * (1 - spread[batch]), "high": t * (1 + 1.3 * spread[batch]), "runs": 30}
        for batch, t in zip(spread, times, strict=False)
    }
    sizes = {"parameters": parameters, "nonzeros": nonzeros, "macs": macs, "bytes": stored, "bytes_unpacked": stored}
    return {"top1": top1, "agreement": agreement, **sizes} | ({"latency": latency} if times else {})


def healing(method: str, blocks: int, before: float, after: float, steps: int, **params: Any) -> dict[str, Any]:
    draw = random.Random(method)
    start = {f"blocks.{i}": before + (0.99 - before) * (1 - i / blocks) + draw.uniform(-0.02, 0) for i in range(blocks)}
    end = {block: 1 - (1 - value) * (1 - after) / (1 - before) for block, value in start.items()}
    losses = [0.06 + 0.3 * math.exp(-6 * step / steps) + draw.gauss(0, 0.008) for step in range(steps)] if steps else []
    aligned = {"alignment_before": start, "alignment_after": end}
    return {"method": method, "params": params, "losses": losses, "notes": [], **aligned}


def publish(
    root: Path,
    name: str,
    source: str,
    models: dict[str, Any],
    kept: dict[str, int],
    total: dict[str, int],
    reports: list[dict[str, Any]],
    kind: str = "cut",
    images: int = 5000,
    classes: list[str] | None = None,
) -> dict[str, Path]:
    """The folders of the report's upstream stages, as those stages write them."""
    inputs = {s: root / s for s in ("dense", "calibration", "allocation", "pruning", "healing", "evaluation")}
    unit, pruner = ("neurons", "variance") if kind == "cut" else ("weights", "magnitude")
    small = models["healed"]["bytes"]
    bundle(inputs["dense"] / "bundle", name, classes, models["dense"]["bytes"])
    bundle(inputs["pruning"] / "bundle", name, classes, small, {"pruner": pruner, "params": {}})
    bundle(inputs["healing"] / "bundle", name, classes, small)
    for between in reports[:-1]:
        bundle(inputs["healing"] / "after" / between["method"] / "bundle", name, classes, small)
    write(
        inputs["dense"] / "dense.json",
        {"source": source, "digest": "cd" * 32, "family": "vit", "classes": len(classes or ()) or 1000},
    )
    write(
        inputs["calibration"] / "calibration.json",
        {"source": "digits", "count": 512, "ids_digest": "ef" * 32, "preprocessing": {}, "skipped": []},
    )
    asked = sum(kept.values())
    budget = {"unit": unit, "asked": asked, "got": sum(kept.values()), "total": sum(total.values())}
    allocation = {"method": "global_variance", "params": {"multiple": 1}, "unit": unit, "asked": asked, "got": asked}
    write(
        inputs["allocation"] / "allocation.json",
        allocation | {"kept": kept, "total": total, "layers": list(kept), "cost": {}, "budget": budget},
    )
    arrow = (lambda layer: f"{layer} -> {layer.replace('fc1', 'fc2')}") if kind == "cut" else str
    ending = "" if kind == "cut" else " weights"
    lines = [f"{arrow(layer)}: {kept[layer]} of {total[layer]}{ending}" for layer in kept]
    write(
        inputs["pruning"] / "pruned.json",
        {"kind": kind, "names": list(kept), "lines": lines, "total": total, "removed": 1},
    )
    write(inputs["healing"] / "healing.json", reports)
    evaluation = {"images": images, "labels": models["dense"]["top1"] is not None, "models": models, "subsets": {}}
    evaluation |= {"budget": None, "measured_with": "2 CPU threads, torch 2.13.0"}
    evaluation |= {"source": "imagefolder:validation", "ids_digest": "e" * 64}
    write(inputs["evaluation"] / "evaluation.json", evaluation)
    return inputs


def deit(root: Path) -> dict[str, Path]:
    dense, cut = (22050664, 22049000, 4608338304, 88223704), (14962600, 14961000, 3219000000, 59870000)
    models = {
        "dense": model(0.79852, 1.0, dense, 0.1131, 3.21),
        "pruned": model(0.66184, 0.7342, cut),
        "after closed_form": model(0.70254, 0.7796, cut),
        "healed": model(0.77118, 0.8826, cut, 0.0851, 2.29),
    }
    kept = {f"blocks.{block}.mlp.fc1": 1536 - gone for block, gone in enumerate(DEIT)}
    reports = [
        healing("closed_form", 12, 0.61, 0.78, 0, damping=0.01),
        healing("starfish", 12, 0.78, 0.94, 1600, epochs=10, batch_size=32, lr=6e-4, min_lr=1e-6, precision="auto"),
    ]
    total = dict.fromkeys(kept, 1536)
    return publish(root, "deit_small_patch16_224", "timm:deit_small_patch16_224", models, kept, total, reports)


def digits(root: Path, name: str = "vit_tiny", classes: list[str] | None = None) -> dict[str, Path]:
    dense, cut = (281290, 281200, 18723840, 1132760), (207370, 207300, 13998080, 838100)
    models = {
        "dense": model(0.9833, 1.0, dense),
        "pruned": model(0.1002, 0.1058, cut),
        "healed": model(0.9722, 0.9805, cut),
    }
    kept = {f"blocks.{block}.mlp.fc1": width for block, width in enumerate((96, 141, 128, 120, 147, 136))}
    reports = [healing("starfish", 6, 0.4, 0.97, 160, epochs=10, lr=6e-4)]
    names = classes or [str(digit) for digit in range(10)]
    total = dict.fromkeys(kept, 256)
    return publish(root, name, "models:/digits-vit@dense", models, kept, total, reports, images=359, classes=names)


def masked(root: Path) -> dict[str, Path]:
    dense, mask = (5717416, 5717000, 1258000000, 22883496), (5717416, 3063000, 1258000000, 13130224)
    models = {
        "dense": model(None, 1.0, dense, 0.0412, 0.97),
        "pruned": model(None, 0.4119, mask),
        "healed": model(None, 0.9021, mask, 0.0409, 0.975),
    }
    shapes = {"attn.qkv": 110592, "attn.proj": 36864, "mlp.fc1": 147456, "mlp.fc2": 147456}
    total = {f"blocks.{block}.{layer}": size for block in range(12) for layer, size in shapes.items()}
    draw = random.Random(0)
    kept = {layer: round(size * draw.uniform(0.3, 0.7)) for layer, size in total.items()}
    reports = [healing("starfish", 12, 0.55, 0.93, 900, epochs=5, lr=6e-4)]
    return publish(root, "deit_tiny_patch16_224", "timm:deit_tiny_patch16_224", models, kept, total, reports, "mask")


def baseline(root: Path) -> dict[str, Path]:
    """Nothing pruned, nothing healed."""
    size = (281290, 281200, 18723840, 1132760)
    models = {name: model(0.9833, 1.0, size) for name in ("dense", "pruned", "healed")}
    empty: dict[str, Any] = {"params": {}, "losses": [], "notes": [], "alignment_before": {}, "alignment_after": {}}
    kept = {"blocks.0.mlp.fc1": 128}
    inputs = publish(
        root,
        "vit_tiny",
        "file:weights.safetensors",
        models,
        kept,
        {"blocks.0.mlp.fc1": 256},
        [{"method": "none", **empty}],
    )
    write(inputs["pruning"] / "pruned.json", {"kind": "mask", "names": [], "lines": [], "removed": 0})
    return inputs


CASES = {"deit": deit, "digits": digits, "masked": masked, "baseline": baseline}
