"""What relative repairability costs on ResNet-56: its pass over the images, in plain forward passes, and the algebra.

    python benchmarks/repairability_cost.py

Random weights and images: time does not depend on their values. The pass takes the patch moments of all 57 layers;
the algebra is the damage of every layer at 13 densities, with all four repairs. Writes repairability_cost.md; the
bound is 3 passes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.cifar_resnet import resnet56  # noqa: E402
from heal.allocators.pool import Pool  # noqa: E402
from heal.allocators.relative_repairability import RelativeRepairability, curves, measured  # noqa: E402
from heal.compat import timm  # noqa: E402
from heal.images import Replay  # noqa: E402
from heal.method import AllocationContext, taps  # noqa: E402
from heal.statistics import capture  # noqa: E402
from heal.values import Budget  # noqa: E402

BATCH, ROUNDS, IMAGES = 64, 7, 256
METHOD = RelativeRepairability(include=("stem", "classifier"))


def main() -> None:
    """Measure and write the page."""
    torch.manual_seed(0)
    model, images = resnet56().eval(), torch.randn(IMAGES, 3, 32, 32)
    wanted = taps(model, [METHOD])
    ratios, plain = _in_turns(lambda: _forward(model, images), lambda: capture(model, images, wanted, BATCH))
    algebra = [_seconds(lambda: _curves(model, images)) for _ in range(3)]
    low, median, high = statistics.quantiles(ratios, n=4)
    page = [
        f"{torch.get_num_threads()} threads, torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}; "
        f"medians of {ROUNDS} rounds in turns, quartiles in brackets; {IMAGES} images of 32x32, batches of {BATCH}",
        "",
        "| what | plain forward passes | bound |",
        "|---|---|---|",
        f"| the pass over the images, patch moments of all layers | {median:.2f} [{low:.2f}, {high:.2f}] | 3 |",
        f"| the algebra: 57 layers x 13 densities x 4 repairs | {statistics.median(algebra) / plain:.2f} | |",
    ]
    (HERE / "repairability_cost.md").write_text("\n".join(page) + "\n")
    print("\n".join(page))


def _curves(model: nn.Module, images: torch.Tensor, known: dict[str, AllocationContext] = {}) -> None:  # noqa: B006
    if not known:
        statistics_ = capture(model, images, taps(model, [METHOD]), BATCH)
        known["context"] = AllocationContext(statistics=statistics_, images=images)
    context = known["context"]
    pool = Pool.of(model, METHOD.include, Budget(weights=0.9), context)
    curves(pool, measured(model, pool, context))


def _forward(model: nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode():
        for batch in Replay(images, BATCH):
            model(batch)


def _in_turns(base: Callable[[], object], other: Callable[[], object]) -> tuple[list[float], float]:
    """The rounds' ratios other / base, after one round that does not count; the median seconds of `base`."""
    base(), other()
    ratios, plain = [], []
    for turn in range(ROUNDS):
        seconds = {f: _seconds(f) for f in ((base, other) if turn % 2 == 0 else (other, base))}
        ratios.append(seconds[other] / seconds[base])
        plain.append(seconds[base])
    return ratios, statistics.median(plain)


def _seconds(f: Callable[[], object]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
