"""What a report knows: read from the artifacts of a run, in plain values."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from tasks import manifest, summary
from tasks.healing_reports import last_round, rounds
from tasks.summary import Row

Json = Any


@dataclass(frozen=True)
class Facts:
    """The artifacts' JSON, with the models of the evaluation as rows.

    `bundle` is the dense bundle.json, `pruner` and `healer` what the pruned and the healed bundle say of their
    methods, `digests` maps a stage to its artifact's digest, `weights` is the SHA-256 of the healed weights file.
    `params` are those that the artifacts were made with, by dotted key, with the names that were looked up among them.
    """

    dense: Mapping[str, Json]
    bundle: Mapping[str, Json]
    calibration: Mapping[str, Json]
    allocation: Mapping[str, Json]
    pruned: Mapping[str, Json]
    pruner: Mapping[str, Json]
    healer: Mapping[str, Json]
    healing: tuple[Mapping[str, Json], ...]
    evaluation: Mapping[str, Json]
    rows: tuple[Row, ...]
    digests: Mapping[str, str]
    weights: str
    params: Mapping[str, Json]

    @property
    def model(self) -> str:
        """The architecture's name."""
        return str(self.bundle["architecture"]["name"])

    @property
    def kind(self) -> str:
        """mask where weights were zeroed, cut where channels or blocks went, none where nothing was pruned."""
        return str(self.pruned["kind"]) if self.pruned["removed"] else "none"

    @property
    def images(self) -> int:
        """How many evaluation images."""
        return int(self.evaluation["images"])

    @property
    def budget(self) -> str:
        """What the budget counts: weights, neurons, blocks, or MACs of one image."""
        return str(self.allocation["budget"]["unit"])

    @property
    def total(self) -> int:
        """How many of these the dense model has in the layers of the budget."""
        return int(self.allocation["budget"]["total"])

    @property
    def asked(self) -> int:
        """How many of them the budget asked to keep."""
        return int(self.allocation["budget"]["asked"])

    @property
    def got(self) -> int:
        """How many of them stay."""
        return int(self.allocation["budget"]["got"]) if self.pruned["removed"] else self.total

    @property
    def healers(self) -> tuple[str, ...]:
        """The healers that took part, in order; `none` is one by name."""
        return tuple(report["method"] for report in last_round(self.healing))

    @property
    def rounds(self) -> int:
        """In how many rounds anything went and was healed."""
        return rounds(self.healing)


def gather(inputs: Mapping[str, Path]) -> Facts:
    """Read the upstream artifacts of the report stage."""
    healing = tuple(_json(inputs["healing"] / "healing.json"))
    evaluation = _json(inputs["evaluation"] / "evaluation.json")
    measured = summary.rows(evaluation, [report["method"] for report in last_round(healing)[:-1]])
    healed = _json(inputs["healing"] / "bundle" / "bundle.json")
    return Facts(
        dense=_json(inputs["dense"] / "dense.json"),
        bundle=_json(inputs["dense"] / "bundle" / "bundle.json"),
        calibration=_json(inputs["calibration"] / "calibration.json"),
        allocation=_json(inputs["allocation"] / "allocation.json"),
        pruned=_json(inputs["pruning"] / "pruned.json"),
        pruner=_json(inputs["pruning"] / "bundle" / "bundle.json")["method"] or {},
        healer=healed["method"] or {},
        healing=healing,
        evaluation=evaluation,
        rows=tuple(replace(row, bytes_float16=_bytes_float16(_weights(row.name, inputs))) for row in measured),
        digests={stage: _digest(folder) for stage, folder in inputs.items()},
        weights=healed["files"]["weights.safetensors"],
        params=_params(inputs.values()),
    )


def forward_order(names: Mapping[str, Json]) -> list[str]:
    """Dotted names with their numbers as numbers: JSON files sort blocks.10 before blocks.2."""
    return sorted(
        names, key=lambda name: [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in _parts(name)]
    )


def _params(folders: Iterable[Path]) -> dict[str, Json]:
    """From the manifests: a folder that the store handed out has one."""
    found: dict[str, Json] = {}
    for folder in folders:
        if (folder / manifest.NAME).is_file():
            ingredients = _json(folder / manifest.NAME)["ingredients"]
            found |= {**ingredients["params"], **ingredients["names"]}
    return found


def _parts(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _json(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(folder: Path) -> str:
    """The artifact's digest, whether or not its manifest lies in the folder."""
    files = manifest.scan(folder)
    return manifest.digest_of({name: file for name, file in files.items() if name != manifest.NAME})


def _weights(name: str, inputs: Mapping[str, Path]) -> Path:
    folders = {"dense": inputs["dense"], "pruned": inputs["pruning"], "healed": inputs["healing"]}
    between = inputs["healing"] / "after" / name.removeprefix("after ")
    return folders.get(name, between) / "bundle" / "weights.safetensors"


def _bytes_float16(weights: Path) -> int:
    """The file's size if its matrices were stored as float16, as `heal.save(dtype="float16")` does: vectors stay."""
    with open(weights, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    halved = [
        prod(entry["shape"])
        for name, entry in header.items()
        if entry.get("dtype") == "F32" and (len(entry["shape"]) > 1 or name.endswith(".compressed"))
    ]
    return int(weights.stat().st_size - 2 * sum(halved))
