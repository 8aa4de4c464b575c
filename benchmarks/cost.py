"""What the methods cost, as ratios within this one process: the pass over activations, its memory, steps and whole
runs of training, the solves, and the speed of a cut network against its multiply-accumulates; and what a run costs that
finds all stages cached.

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
from heal.allocators.uniform import Uniform
from heal.compat import timm
from heal.families.lookup import describe
from heal.healers.blockwise import Blockwise
from heal.healers.closed_form import ClosedForm
from heal.healers.starfish import Starfish
from heal.images import Replay
from heal.method import AllocationContext, HealContext, taps
from heal.modes import evaluating, training_only, without_fused_attention
from heal.pruned import apply
from heal.pruners.obs import Obs
from heal.states import TeacherStates, block_outputs, cosine, rows
from heal.statistics import capture
from heal.surgery import shrink, widths
from heal.training import Adam
from heal.values import Budget, ChannelCut

HERE = Path(__file__).resolve().parent
IMAGES, BATCH, ROUNDS = 64, 32, 7
STARFISH, IN_EIGHTS = (Starfish(batch_size=size, precision="float32") for size in (BATCH, 8))
BLOCKWISE = Blockwise(steps=10, batch_size=BATCH)


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
        f"| step in bfloat16, attention written out / torch's fused | {_written_out(model)} | 1.00 |",
        f"| block-wise step / the block's forward + backward | {_blockwise(model)} | 1.10 |",
        f"| STARFISH in all, 10 epochs / its passes and no more | {_in_all(model, STARFISH)} | 1.10 |",
        f"| the same in batches of 8 | {_in_all(model, IN_EIGHTS)} | 1.10 |",
        f"| block-wise in all, 10 steps an image / its passes and no more | {_in_all(model, BLOCKWISE)} | 1.10 |",
        *(f"| speed-up at 50 % of MLP neurons / MAC ratio, batch {b} | {_speed(model, b)} | 0.90 |" for b in (1, 32)),
        "",
        _solves(model),
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
    optimiser = Adam().over({name: p for name, p in student.named_parameters() if name in names})

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


def _written_out(model: nn.Module) -> str:
    """Forward and backward as STARFISH does them in bfloat16, with the attention that it takes and with torch's."""
    student, images = copy.deepcopy(model), torch.randn(BATCH, 3, 224, 224)
    names = frozenset(f"{layer}.weight" for layer in describe(model).layers)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            total = student(images).sum()
        total.backward()
        student.zero_grad(set_to_none=True)

    def written_out() -> None:
        with without_fused_attention(student):
            step()

    with training_only(student, names):
        return _ratio(step, written_out)


def _blockwise(model: nn.Module) -> str:
    """A whole step on a pair that is at hand against forward and backward with the cheapest loss."""
    block = copy.deepcopy(model.get_submodule("blocks.0")).eval()
    entered, wanted = torch.randn(BATCH, 197, 192), torch.randn(BATCH, 197, 192)
    optimiser = Adam().over(dict(block.named_parameters()))

    def bare() -> None:
        block(entered).sum().backward()
        optimiser.zero_grad(set_to_none=True)

    def step() -> None:
        error = block(entered).sub(wanted).square().mean() / wanted.square().mean()
        error.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return _ratio(bare, step)


def _in_all(model: nn.Module, healer: Starfish | Blockwise) -> str:
    """Everything that a healer does against the passes that it cannot do without: forward and backward, of the whole
    network or of all its blocks, as often as it trains on an image; forward alone of both networks for the report
    before and after, and of the teacher, block-wise of the student too, for what it trains on."""
    images, student = torch.randn(BATCH, 3, 224, 224), copy.deepcopy(model)
    cut = _half(model)
    apply(student, cut)
    if isinstance(healer, Starfish):
        epochs, student_alone = healer.epochs, 2
    else:
        epochs, student_alone = healer.steps * healer.batch_size // len(images), 3
    forward_alone = [model] * 3 + [student] * student_alone
    names = frozenset(f"{layer}.weight" for layer in describe(student).layers)

    def floor() -> None:
        with torch.inference_mode():
            for network in forward_alone:
                network(images)
        with evaluating(student), training_only(student, names):
            for batch in (batch for _ in range(epochs) for batch in Replay(images, healer.batch_size)):
                student(batch).sum().backward()
        student.zero_grad(set_to_none=True)

    return _ratio(floor, lambda: healer.heal(copy.deepcopy(student), model, images, HealContext(pruned=cut)), rounds=3)


def _half(model: nn.Module) -> ChannelCut:
    groups = [name for name, group in describe(model).cuttable.items() if group.kind == "mlp"]
    return ChannelCut({name: torch.arange(384) for name in groups}, dict.fromkeys(groups, 768))


def _solves(model: nn.Module) -> str:
    """Seconds of what is solved and not trained, on DeiT-Tiny; they do not depend on the number of images."""
    images, cut, student = torch.randn(IMAGES, 3, 224, 224), _half(model), copy.deepcopy(model)
    apply(student, cut)
    ridge, obs = ClosedForm(), Obs()
    statistics = capture(model, images, taps(model, [ridge, obs]), BATCH)
    report = ridge.heal(student, model, images, HealContext(pruned=cut, statistics=statistics))
    allocation = Uniform().allocate(model, Budget(weights=0.5), AllocationContext())
    masked = _seconds(lambda: obs.prune(model, allocation, statistics))
    return (
        f"Solves on DeiT-Tiny, after the pass over activations: closed form of all fc2 {report.seconds:.1f} s with its "
        f"report on {IMAGES} images; OBS of all layers {masked:.0f} s (bound 600 s)."
    )


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


def _ratio(base: Callable[[], object], other: Callable[[], object], rounds: int = ROUNDS) -> str:
    """Median of the rounds' ratios, the two in turns."""
    base(), other()
    ratios = []
    for turn in range(rounds):
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
