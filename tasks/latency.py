"""Bundles and registered versions timed side by side in this process."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heal import bundle, cost
from heal.cost import Latency
from heal.errors import InputError


@dataclass(frozen=True)
class Timed:
    """One model at one batch size; `speedup` is how many times as fast as the first model."""

    model: str
    batch: int
    latency: Latency
    speedup: float


def compare(
    models: Sequence[str], batches: Sequence[int], rounds: int, allow_adapters: Collection[str] = ()
) -> Iterator[Timed]:
    """Measure folders of bundles, or models:/NAME@ALIAS; all on images of the first one's size.

    Raises InputError when that does not say its size.
    """
    folders = {name: _folder(name) for name in models}
    for name, folder in folders.items():
        _refuse_adapter(name, bundle.adapter(folder), allow_adapters)
    networks = {name: bundle.load(folder, allow_adapters) for name, folder in folders.items()}
    size = (bundle.read(folders[models[0]])["preprocessing"] or {}).get("size")
    if size is None:
        raise InputError(f"{models[0]} does not say its input size (preprocessing.size in bundle.json); save it anew")
    _refuse_other_sizes({name: bundle.read(folder)["preprocessing"] or {} for name, folder in folders.items()}, size)
    for batch in batches:
        images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
        timed = cost.latency(networks, images, rounds)
        for name, latency in timed.items():
            yield Timed(name, batch, latency, timed[models[0]].median / latency.median)


def _refuse_other_sizes(preprocessing: Mapping[str, Mapping[str, Any]], size: Sequence[int]) -> None:
    for name, own in preprocessing.items():
        if list(own.get("size") or size) != list(size):
            raise InputError(f"{name} takes images of {own['size']}, the first of these models of {list(size)}")


def _refuse_adapter(name: str, adapter: str | None, allowed: Collection[str]) -> None:
    if adapter is not None and adapter not in allowed:
        raise InputError(
            f"{name} is built by {adapter}, which is code to import; if you trust it, add --allow-adapter {adapter}"
        )


def _folder(name: str) -> Path:
    if not name.startswith("models:/"):
        return Path(name.removeprefix("bundle:"))
    from tasks import registry  # MLflow takes seconds to import

    return registry.fetch_bundle(name)
