"""What the methods cost, as ratios within this one process: the pass over activations, its memory, a STARFISH step,
and the speed of a cut network against its multiply-accumulates; and what a run costs that finds all stages cached.

    python benchmarks/cost.py

DeiT-Tiny's shape with random weights: time and memory do not depend on their values. Writes cost.md.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from heal import cost
from heal.compat import timm
from heal.families.lookup import describe
from heal.images import Replay
from heal.modes import evaluating, training_only
from heal.states import TeacherStates, block_outputs, cosine, rows
from heal.statistics import capture
from heal.surgery import shrink, widths

HERE = Path(__file__).resolve().parent
IMAGES, BATCH, ROUNDS = 64, 32, 7


class Noise:
    """`count` images made when they are fetched, so that only the method's own memory grows."""

    def __init__(self, count: int) -> None:
        self.shape = (count, 3, 224, 224)

    def __getitem__(self, indices: torch.Tensor, /) -> torch.Tensor:
        return torch.randn(len(indices), *self.shape[1:], generator=torch.Generator().manual_seed(int(indices[0])))


def main() -> None:
    """Measure everything and write the table."""
    if sys.argv[1:2] == ["--peak"]:
        print(_peak(int(sys.argv[2])))
        return
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224").eval()
    lines = [
        f"{_cpu()}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'unset')}, "
        f"torch {torch.__version__.partition('+')[0]}, timm {timm.__version__}; "
        f"medians of {ROUNDS} rounds in turns, quartiles in brackets",
        "",
        "| what | ratio | bound |",
        "|---|---|---|",
        f"| activations pass (mean, variance) / plain forward, {IMAGES} images | {_activations(model, False)} | 1.15 |",
        f"| the same with second moments (closed form) | {_activations(model, True)} | 1.15, missed |",
        f"| peak memory at 4x the images / at 1x | {_memory():.3f} | 1.10 |",
        f"| STARFISH step, teacher cached / student forward + backward | {_starfish(model)} | 1.10 |",
        *(f"| speed-up at 50 % of MLP neurons / MAC ratio, batch {b} | {_speed(model, b)} | 0.90 |" for b in (1, 32)),
        "",
        _orchestration(),
    ]
    (HERE / "cost.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cpu() -> str:
    """The model's name, where the system tells."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", file.read_text(), re.MULTILINE) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _activations(model: nn.Module, comoment: bool) -> str:
    taps = {f"{pair.consumer}.input": comoment for pair in describe(model).pairs}
    images = torch.randn(IMAGES, 3, 224, 224)

    def plain() -> None:
        with torch.inference_mode():
            for batch in Replay(images, BATCH):
                model(batch)

    return _ratio(plain, lambda: capture(model, images, taps, BATCH))


def _memory() -> float:
    """Peak resident memory of a process of its own that captures second moments; images are made on the fly."""
    peaks = [
        int(subprocess.run([sys.executable, __file__, "--peak", str(n)], capture_output=True, text=True).stdout)
        for n in (64, 256)
    ]
    return peaks[1] / peaks[0]


def _peak(count: int) -> int:
    model = timm.create_model("deit_tiny_patch16_224").eval()
    capture(model, Noise(count), {f"{pair.consumer}.input": True for pair in describe(model).pairs}, BATCH)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _starfish(model: nn.Module) -> str:
    """A whole step (loss, backward, Adam) against forward and backward with the loss's cheapest stand-in."""
    student, family = copy.deepcopy(model), describe(model)
    images = torch.randn(BATCH, 3, 224, 224)
    names = frozenset(f"{layer}.weight" for layer in family.layers)
    replay = Replay(images, BATCH)
    states = TeacherStates(model, replay, 2**31, 0, lambda message: None)
    states.of(0, images)
    optimiser = torch.optim.Adam([p for n, p in student.named_parameters() if n in names], foreach=False)

    def bare() -> None:
        student(images).sum().backward()
        optimiser.zero_grad(set_to_none=True)

    def step() -> None:
        student(images)
        targets = states.of(0, images).units
        terms = [1 - cosine(rows(outputs[block], family.states), targets[block]) for block in family.blocks]
        torch.stack(terms).mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    with evaluating(student), training_only(student, names), block_outputs(student, family.blocks) as outputs:
        return _ratio(bare, step)


def _speed(model: nn.Module, batch: int) -> str:
    cut = copy.deepcopy(model)
    dense = widths(cut)
    shrink(cut, {pair.producer: dense[pair.producer] // 2 for pair in describe(cut).pairs})
    macs = cost.macs(model, (3, 224, 224)) / cost.macs(cut, (3, 224, 224))
    timed = cost.latency(
        {"dense": model, "cut": cut}, torch.randn(batch, 3, 224, 224), rounds=101 if batch == 1 else 11
    )
    speedup = timed["dense"].median / timed["cut"].median
    low, high = timed["dense"].low / timed["cut"].high, timed["dense"].high / timed["cut"].low
    return f"{speedup / macs:.2f} ({speedup:.2f}x [{low:.2f}, {high:.2f}] of {macs:.2f}x)"


def _orchestration() -> str:
    """`regrow run` on digits, the second time; imports as the interpreter itself times them."""
    cheap = ("healing.starfish.epochs=1", "evaluation.latency_rounds=0", "promotion.min_agreement=0.0")
    overrides = [word for override in cheap for word in ("-S", override)]
    command = ["-m", "flows.cli", "run", "--json", "-p", str(HERE.parent / "params.yaml"), *overrides]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "REGROW_HOME": folder, "PYTHONPATH": str(HERE.parent)}
        for options in ((), (), ("-X", "importtime")):
            began = time.perf_counter()
            line = [sys.executable, *options, *command]
            done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
            total = time.perf_counter() - began
        facts = json.loads(done.stdout)
    ran = sum(not stage["cached"] for stage in facts["stages"].values())
    imports = sum(int(self) for self in re.findall(r"^import time:\s+(\d+) \|", done.stderr, re.MULTILINE)) / 1e6
    return (
        f"`regrow run` with every stage cached ({ran} ran): {total:.1f} s, of which imports {imports:.1f} s, "
        f"the rest {total - imports:.1f} s (bound 5 s)."
    )


def _ratio(base: Callable[[], object], other: Callable[[], object]) -> str:
    """Median of the rounds' ratios, the two in turns."""
    base(), other()
    ratios = []
    for turn in range(ROUNDS):
        seconds = {f: _seconds(f) for f in ((base, other) if turn % 2 == 0 else (other, base))}
        ratios.append(seconds[other] / seconds[base])
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def _seconds(f: Callable[[], object]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
