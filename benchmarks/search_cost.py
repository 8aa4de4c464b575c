"""What judging one candidate costs the allocators that search, as a ratio within this one process: masking, BatchNorm
pass, forward pass and comparison, against a bare BatchNorm pass and a bare forward pass over the same images.

    python benchmarks/search_cost.py

Random weights: time does not depend on their values. Prints a table; the bound is 1.2.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from heal.allocators.pool import Pool
from heal.allocators.trial import Trial
from heal.batchnorm import reestimate
from heal.compat import timm
from heal.families.discovery import batch_norms
from heal.images import Replay
from heal.method import AllocationContext
from heal.values import Budget

BATCH, ROUNDS = 16, 9
POINTS = (("resnet18", 224, 16), ("resnet18", 32, 256), ("deit_tiny_patch16_224", 224, 16))


def main() -> None:
    """Measure every network and print the table."""
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__.partition('+')[0]}, timm {timm.__version__};")
    print(f"medians of {ROUNDS} rounds in turns, quartiles in brackets\n")
    print("| network | images | candidate / (BatchNorm pass + forward pass) | seconds a candidate |\n|---|---|---|---|")
    for name, size, count in POINTS:
        ratio, seconds = _candidate(timm.create_model(name).eval(), torch.randn(count, 3, size, size))
        print(f"| {name} | {count} of {size}x{size} | {ratio} | {seconds:.2f} |")


def _candidate(model: nn.Module, images: torch.Tensor) -> tuple[str, float]:
    pool = Pool.of(model, ("stem", "depthwise", "classifier"), Budget(weights=0.5), AllocationContext())
    trial = Trial(model, pool.weights, images, BATCH, "agreement", "cumulative")
    densities = iter(torch.linspace(0.3, 0.7, ROUNDS + 1).tolist())

    def judged() -> None:
        density = next(densities)  # another one each time, for the same would not be tried again
        trial.fitness({layer: int(density * total) for layer, total in pool.totals.items()})

    def bare() -> None:
        if batch_norms(trial.network):
            reestimate(trial.network, images, "cumulative", BATCH)
        with torch.inference_mode():
            for batch in Replay(images, BATCH):
                trial.network(batch)

    return _ratio(bare, judged)


def _ratio(base: Callable[[], None], other: Callable[[], None]) -> tuple[str, float]:
    """Median of the rounds' ratios, the two in turns, after one round that does not count; seconds of `other`."""
    base(), other()
    ratios, taken = [], []
    for turn in range(ROUNDS):
        seconds = {f: _seconds(f) for f in ((base, other) if turn % 2 == 0 else (other, base))}
        ratios.append(seconds[other] / seconds[base])
        taken.append(seconds[other])
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.3f} [{low:.3f}, {high:.3f}]", statistics.median(taken)


def _seconds(f: Callable[[], None]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
