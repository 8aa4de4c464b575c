"""How much faster a cut network is than its MACs say: eager and compiled, batches of 1 and 32; the rows that lack.

    python benchmarks/speed.py --data ../shared/data
    python benchmarks/speed.py --net deit_tiny_patch16_224 --shares 0.5 --modes eager

Widths of hidden neurons are decided as presets do, on 64 calibration images; time depends on shapes alone, so nothing
is healed. Dense and cut network take turns in one process. Writes speed.csv and speed.md.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import cifar, deit_cuts, mobile  # noqa: E402
from benchmarks.cross import SHARED, device_name  # noqa: E402
from benchmarks.imagenet import dense_of, read  # noqa: E402
from benchmarks.table import Row, Table  # noqa: E402
from heal import cost  # noqa: E402
from heal.allocators.global_variance import GlobalVariance  # noqa: E402
from heal.method import AllocationContext, taps  # noqa: E402
from heal.pruned import apply  # noqa: E402
from heal.pruners.variance import Variance  # noqa: E402
from heal.statistics import capture  # noqa: E402
from heal.values import Budget  # noqa: E402

IMAGES, ROUNDS = 64, 15
NETS = (deit_cuts.NET, *mobile.NETS, "resnet56")
CUTS = {
    "hidden": GlobalVariance(statistic="weighted"),
    "hidden, multiples of 8": GlobalVariance(statistic="weighted", multiple=8),
    "hidden, qk, v": GlobalVariance(kinds=("mlp", "qk", "v")),
}
OF_TRANSFORMERS = ("hidden, qk, v",)
POINT = ("net", "cut", "share", "batch", "mode", "device")
COLUMNS = (*POINT, "macs", "dense_ms", "cut_ms", "speedup", "low", "high", "of_macs")
"""macs: of the cut over the dense network. speedup: medians' ratio; low, high: with the quartiles that are worst and
best for the cut. of_macs: the share of what the MACs promise that is got."""


def main() -> None:
    """Measure what the table lacks, and write its page."""
    asked = _options().parse_args()
    torch.set_num_threads(asked.threads)
    table = Table(HERE / "speed.csv", COLUMNS, POINT, _rank)
    for net in asked.net:
        dense, images = _network(net, asked.data)
        dense.to(asked.device)
        for share, cut in ((share, cut) for share in asked.shares for cut in asked.cuts):
            if cut not in OF_TRANSFORMERS or net == deit_cuts.NET:
                for row in _rows(net, dense, images, cut, share, asked.modes, table.known()):
                    table.add([row])
                    print(*row.values(), flush=True)
    (HERE / "speed.md").write_text("\n".join(_page(table.rows())) + "\n")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--net", nargs="*", default=list(NETS), choices=NETS)
    parser.add_argument("--cuts", nargs="*", default=list(CUTS), choices=list(CUTS))
    parser.add_argument("--shares", nargs="*", type=float, default=[0.2, 0.3, 0.5])
    parser.add_argument("--modes", nargs="*", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def _network(net: str, data: Path) -> tuple[nn.Module, Tensor]:
    if net == "resnet56":
        return cifar.dense_of(net, data), cifar.images_of(data, 0, 1).views["plain"][:IMAGES]
    dense = dense_of(net, data)
    return dense, read(data, dense.pretrained_cfg).views["plain"][:IMAGES]  # type: ignore[arg-type]


def _rows(
    net: str, dense: nn.Module, images: Tensor, cut: str, share: float, modes: list[str], known: set[tuple[str, ...]]
) -> Iterator[Row]:
    device = device_name(dense)
    wanted = [(batch, mode) for mode in modes for batch in (1, 32)]
    missing = [(b, mode) for b, mode in wanted if (net, cut, f"{share:g}", str(b), mode, device) not in known]
    if not missing:
        return
    smaller = _smaller(dense, images, cut, share)
    macs = cost.macs(smaller, images.shape[1:]) / cost.macs(dense, images.shape[1:])
    for batch, mode in missing:
        row: dict[str, Any] = dict(zip(POINT, (net, cut, f"{share:g}", batch, mode, device), strict=True))
        yield {**row, "macs": f"{macs:.3f}", **_measured(dense, smaller, images[:batch], mode, macs)}


def _smaller(dense: nn.Module, images: Tensor, cut: str, share: float) -> nn.Module:
    allocator = CUTS[cut]
    pruner = Variance(fold_mean=False, statistic=allocator.statistic)
    statistics = capture(dense, images, taps(dense, [allocator, pruner]))
    allocation = allocator.allocate(dense, Budget(neurons=share), AllocationContext(statistics=statistics))
    smaller = copy.deepcopy(dense)
    apply(smaller, pruner.prune(dense, allocation, statistics))
    return smaller.eval()


def _measured(dense: nn.Module, smaller: nn.Module, images: Tensor, mode: str, macs: float) -> dict[str, str]:
    models = {"dense": dense, "cut": smaller}
    if mode == "compiled":
        torch.compiler.reset()
        models = {name: torch.compile(model, dynamic=False) for name, model in models.items()}  # type: ignore[misc]
    found = cost.latency(models, images.contiguous(), ROUNDS)
    before, after = found["dense"], found["cut"]
    speedup = before.median / after.median
    return {
        "dense_ms": f"{1e3 * before.median:.2f}",
        "cut_ms": f"{1e3 * after.median:.2f}",
        "speedup": f"{speedup:.2f}",
        "low": f"{before.low / after.high:.2f}",
        "high": f"{before.high / after.low:.2f}",
        "of_macs": f"{speedup * macs:.2f}",
    }


def _rank(row: Row) -> tuple[Any, ...]:
    return row["device"], row["net"], row["cut"], float(row["share"]), row["mode"], int(row["batch"])


def _page(rows: list[Row]) -> list[str]:
    """A line for every cut, a column for every way to run it."""
    ways = [(mode, batch) for mode in ("eager", "compiled") for batch in ("1", "32")]
    page = [
        "Speed-up of the cut over the dense network, in brackets with the quartiles that are worst and best for it, "
        "then the share of what its MACs promise.",
        "",
        "| network | cut | share | MACs | device | "
        + " | ".join(f"{mode}, batch {batch}" for mode, batch in ways)
        + " |",
        "|---" * (5 + len(ways)) + "|",
    ]
    lines: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
    for row in rows:
        line = lines.setdefault((row["net"], row["cut"], row["share"], row["macs"], row["device"]), {})
        line[row["mode"], row["batch"]] = f"{row['speedup']} [{row['low']}, {row['high']}], {row['of_macs']}"
    page += [f"| {' | '.join((*line, *(cells.get(way, '') for way in ways)))} |" for line, cells in lines.items()]
    return page


if __name__ == "__main__":
    main()
