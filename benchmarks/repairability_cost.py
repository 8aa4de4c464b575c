"""What relative repairability costs on ResNet-56: its pass over the images, in plain forward passes, and the algebra.

    python benchmarks/repairability_cost.py

Random weights and images: time does not depend on their values. The pass takes the patch moments of all 57 layers: what
twice the images cost more than once. The algebra is the rest, which no image adds to: the moments put together, and the
damage of every layer at 13 densities with all four repairs. On one thread, and on as many as there are cores. Writes
repairability_cost.md; the bound is 3 passes.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

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

T = TypeVar("T")

BATCH, ROUNDS, IMAGES = 64, 7, 256
METHOD = RelativeRepairability(include=("stem", "classifier"))


def main() -> None:
    """Measure and write the page."""
    torch.manual_seed(0)
    model, images = resnet56().eval(), torch.randn(2 * IMAGES, 3, 32, 32)
    cores = torch.get_num_threads()
    page = [
        f"torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}; medians of {ROUNDS} rounds, "
        f"quartiles in brackets; {IMAGES} images of 32x32, batches of {BATCH}",
        "",
        "| in plain forward passes | threads | | bound |",
        "|---|---|---|---|",
    ]
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        passes, algebra = zip(*[_round(model, images) for _ in range(ROUNDS + 1)][1:], strict=True)
        page += [
            f"| the pass over the images, patch moments of all layers | {threads} | {_shown(passes)} | 3 |",
            f"| the algebra: 57 layers x 13 densities x 4 repairs | {threads} | {_shown(algebra)} | |",
        ]
    (HERE / "repairability_cost.md").write_text("\n".join(page) + "\n")
    print("\n".join(page))


def _round(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """(pass, algebra), in plain forward passes over half of the images."""
    half, wanted = images[:IMAGES], taps(model, [METHOD])
    # Taken alike: each once, the forward pass by the same difference of two.
    forward = _seconds(lambda: _forward(model, half))
    once, found = _timed(lambda: capture(model, half, wanted, BATCH))
    plain = _seconds(lambda: _forward(model, images)) - forward
    twice = _seconds(lambda: capture(model, images, wanted, BATCH))
    context = AllocationContext(statistics=found, images=half)
    pool = Pool.of(model, METHOD.include, Budget(weights=0.9), context)
    drawn = _seconds(lambda: curves(pool, measured(model, pool, context)))
    return (twice - once) / plain, (2 * once - twice + drawn) / plain


def _forward(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        for batch in Replay(images, BATCH):
            model(batch)


def _shown(values: Sequence[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def _timed(f: Callable[[], T]) -> tuple[float, T]:
    began = time.perf_counter()
    found = f()
    return time.perf_counter() - began, found


def _seconds(f: Callable[[], object]) -> float:
    return _timed(f)[0]


if __name__ == "__main__":
    main()
