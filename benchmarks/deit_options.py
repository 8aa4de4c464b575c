"""Options of STARFISH and rates of its rivals on DeiT-Tiny, judged without the test images; what the table lacks.

    python benchmarks/deit_options.py --data ../shared/data
    python benchmarks/deit_options.py --starts "vbp, ridge" --share 0.5 --options "as published" "batches of 8"

Heals on 800 of the 1 000 calibration images and judges on the other 200, by agreement with the dense network and by
the divergence of the answers: what is chosen so has seen neither a label nor a test image. Writes deit_options.csv and
deit_options.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.cross import SHARED, device_name  # noqa: E402
from benchmarks.deit_cuts import RANKINGS, RIDGE  # noqa: E402
from benchmarks.deit_masks import ALLOCATIONS, NET, PRUNERS  # noqa: E402
from benchmarks.imagenet import dense_of, read  # noqa: E402
from benchmarks.table import Row, Table  # noqa: E402
from heal.evaluation import agreement, predict  # noqa: E402
from heal.healers.blockwise import Blockwise  # noqa: E402
from heal.healers.distill import Distill  # noqa: E402
from heal.healers.starfish import Starfish  # noqa: E402
from heal.healers.unipts import Unipts  # noqa: E402
from heal.images import shuffled  # noqa: E402
from heal.method import AllocationContext, Allocator, HealContext, Healer, Pruner, taps  # noqa: E402
from heal.pruned import apply  # noqa: E402
from heal.statistics import capture  # noqa: E402
from heal.values import Budget, ChannelCut, Mask  # noqa: E402

HELD_OUT = 200


@dataclass(frozen=True)
class Start:
    """What STARFISH is given. solved: what repairs before it."""

    allocator: Allocator
    pruner: Pruner
    solved: tuple[Healer, ...] = ()


STARTS = {name: Start(ALLOCATIONS[name], pruner) for name, pruner in PRUNERS.items()}
STARTS |= {f"{name}, ridge": Start(*RANKINGS[name], (RIDGE,)) for name in ("vbp", "vbp weighted")}
UNIPTS = Unipts(epochs=2, batch_size=32, warmup_epochs=0, augment=False, mask="fixed")
OPTIONS: dict[str, Healer | None] = {
    "none": None,
    "as published": Starfish(),
    "batches of 8": Starfish(batch_size=8),
    "affine": Starfish(affine=True),
    "kl 0.1": Starfish(kl=0.1),
    "affine, kl 0.1": Starfish(affine=True, kl=0.1),
    "affine, kl 0.5": Starfish(affine=True, kl=0.5),
    "affine, kl 0.1, mse 0.1": Starfish(affine=True, kl=0.1, mse=0.1),
    "affine, kl 0.1, depth 1": Starfish(affine=True, kl=0.1, depth=1.0),
    "affine, kl 0.1, final": Starfish(affine=True, kl=0.1, final=True),
    "affine, kl 0.1, lr 1.5e-3": Starfish(affine=True, kl=0.1, lr=1.5e-3),
    "affine, kl 0.1, batches of 16": Starfish(affine=True, kl=0.1, batch_size=16),
    "affine, kl 0.1, batches of 8": Starfish(affine=True, kl=0.1, batch_size=8),
    "affine, kl 0.1, batches of 16, lr 1e-3": Starfish(affine=True, kl=0.1, batch_size=16, lr=1e-3),
    "affine, kl 0.5, batches of 8": Starfish(affine=True, kl=0.5, batch_size=8),
    "affine, batches of 8": Starfish(affine=True, batch_size=8),
    "affine, kl 0.03, batches of 8": Starfish(affine=True, kl=0.03, batch_size=8),
    "affine, kl 0.03, batches of 8, lr 1e-3": Starfish(affine=True, kl=0.03, batch_size=8, lr=1e-3),
    "affine, kl 0.1, batches of 8, final": Starfish(affine=True, kl=0.1, batch_size=8, final=True),
    "affine, kl 0.1, batches of 8, mse 0.1": Starfish(affine=True, kl=0.1, batch_size=8, mse=0.1),
    "as published, 2 epochs": Starfish(epochs=2),
    "affine, kl 0.03, batches of 8, 2 epochs": Starfish(affine=True, kl=0.03, batch_size=8, epochs=2),
    **{f"unipts loss, 2 epochs, lr {lr:g}": replace(UNIPTS, lr=lr) for lr in (1e-2, 1e-3, 1e-4)},
    **{f"distill, 2 epochs, lr {lr:g}": Distill(epochs=2, lr=lr) for lr in (1.5e-5, 1e-4, 6e-4)},
    **{f"blockwise, 60 steps, lr {lr:g}": Blockwise(steps=60, lr=lr) for lr in (1e-4, 1e-3)},
}
POINT = ("start", "share", "options")
COLUMNS = (*POINT, "agreement", "divergence", "alignment", "seconds", "device")


def main() -> None:
    """Measure what the table lacks, and write its page."""
    asked = _options().parse_args()
    torch.set_num_threads(asked.threads)
    table = Table(HERE / "deit_options.csv", COLUMNS, POINT, _rank)
    dense = dense_of(NET, asked.data).to(asked.device)
    calibration = read(asked.data, dense.pretrained_cfg).views["plain"]  # type: ignore[arg-type]
    chosen = shuffled(len(calibration), 0, "held out of the options")
    healing, judging = calibration[chosen[HELD_OUT:]], calibration[chosen[:HELD_OUT]]
    for start in asked.starts:
        able = [name for name in asked.options if _serves(OPTIONS[name], STARTS[start])]
        missing = [name for name in able if (start, f"{asked.share:g}", name) not in table.known()]
        made = _made(dense, STARTS[start], asked.share, healing) if missing else None
        for name in missing:
            assert made is not None
            row = _row(dense, *made, OPTIONS[name], healing, judging)
            table.add([{**dict(zip(POINT, (start, f"{asked.share:g}", name), strict=True)), **row}])
            print(start, asked.share, name, *row.values(), flush=True)
    (HERE / "deit_options.md").write_text("\n".join(_page(table.rows())) + "\n")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--starts", nargs="*", default=["obs"], choices=list(STARTS))
    parser.add_argument("--share", type=float, default=0.75)
    parser.add_argument("--options", nargs="*", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def _serves(healer: Healer | None, start: Start) -> bool:
    return healer is None or healer.unit in ("any", start.allocator.unit)


def _made(dense: nn.Module, start: Start, share: float, images: Tensor) -> tuple[nn.Module, Mask | ChannelCut]:
    methods: list[Allocator | Pruner | Healer] = [start.allocator, start.pruner, *start.solved]
    statistics = capture(dense, images, taps(dense, methods))
    context = AllocationContext(statistics=statistics, images=images)
    allocation = start.allocator.allocate(dense, Budget(**{start.allocator.unit: share}), context)
    pruned = start.pruner.prune(dense, allocation, statistics)
    student = copy.deepcopy(dense)
    apply(student, pruned)
    for healer in start.solved:
        healer.heal(student, dense, images, HealContext(pruned=pruned, statistics=statistics))
    return student, pruned


def _row(
    dense: nn.Module,
    start: nn.Module,
    pruned: Mask | ChannelCut,
    healer: Healer | None,
    healing: Tensor,
    judging: Tensor,
) -> dict[str, Any]:
    student = copy.deepcopy(start)
    began = time.perf_counter()
    report = healer.heal(student, dense, healing, HealContext(pruned=pruned)) if healer else None
    seconds = time.perf_counter() - began
    ours, theirs = predict(student.eval(), judging, 50), predict(dense, judging, 50)
    apart = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)
    aligned = report.alignment_after.values() if report else ()
    return {
        "agreement": f"{100 * agreement(ours, theirs):.1f}",
        "divergence": f"{float(apart):.3f}",
        "alignment": f"{sum(aligned) / len(aligned):.4f}" if aligned else "",
        "seconds": f"{seconds:.0f}",
        "device": device_name(dense),
    }


def _rank(row: Row) -> tuple[Any, ...]:
    return row["start"], float(row["share"]), list(OPTIONS).index(row["options"])


def _page(rows: list[Row]) -> list[str]:
    """As measured, a line a row."""
    page = [
        "DeiT-Tiny healed with 800 calibration images, by STARFISH where nothing else is named, and judged on the "
        "other 200: agreement with the dense network in per cent (its standard error is 3.5 points, the rows share "
        "the images), KL divergence of the answers.",
        "",
        "| start | gone | options | agreement | divergence | alignment | seconds | device |",
        "|---" * 8 + "|",
    ]
    return page + [f"| {' | '.join(row[name] for name in COLUMNS)} |" for row in rows]


if __name__ == "__main__":
    main()
