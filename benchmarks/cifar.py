"""ResNet-20 and ResNet-56 on CIFAR-10: every allocation x every training-free repair, over sparsities.

    python benchmarks/cifar.py --data ../shared/data                     # what the table lacks
    python benchmarks/cifar.py --data ../shared/data --net resnet20 --sparsities 0.9 0.95 --seeds 0 1 2

The whole cross is run by the library in one process, because it is thousands of points; the points that decide
are runs of the pipeline (presets/). A row names its images: the test images are the first N of the test set, and
agreement is measured on held-out training images as well, which need no label. Writes cifar.csv and cifar.md
beside this file.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import cifar_resnet  # noqa: E402
from heal.allocators.erk import Erk  # noqa: E402
from heal.allocators.erk_capped import ErkCapped  # noqa: E402
from heal.allocators.evolutionary import Evolutionary  # noqa: E402
from heal.allocators.global_magnitude import GlobalMagnitude  # noqa: E402
from heal.allocators.l2_normalised import L2Normalised  # noqa: E402
from heal.allocators.lamp import Lamp  # noqa: E402
from heal.allocators.raw_damage import RawDamage  # noqa: E402
from heal.allocators.relative_repairability import RelativeRepairability  # noqa: E402
from heal.allocators.sequence import Sequence  # noqa: E402
from heal.allocators.uniform import Uniform  # noqa: E402
from heal.allocators.uniform_plus import UniformPlus  # noqa: E402
from heal.errors import BudgetError  # noqa: E402
from heal.evaluation import agreement, predict, top1  # noqa: E402
from heal.healers.batchnorm_recalibration import BatchnormRecalibration  # noqa: E402
from heal.healers.layerwise_variance import LayerwiseVariance  # noqa: E402
from heal.healers.signal_resuscitation import SignalResuscitation  # noqa: E402
from heal.healers.variance_matching import VarianceMatching  # noqa: E402
from heal.images import shuffled  # noqa: E402
from heal.method import AllocationContext, Allocator, HealContext, Healer, Statistics, taps  # noqa: E402
from heal.pruned import apply  # noqa: E402
from heal.pruners.magnitude import Magnitude  # noqa: E402
from heal.statistics import capture  # noqa: E402
from heal.values import Allocation, Budget  # noqa: E402

COLUMNS = (
    "net",
    "sparsity",
    "allocation",
    "repair",
    "seed",
    "top1",
    "agreement",
    "held_out_agreement",
    "test_images",
    "calibration_images",
    "seconds",
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDS = ("stem", "classifier")
CALIBRATION, HELD_OUT = 1024, 1000

ALLOCATIONS: dict[str, Allocator] = {
    "uniform": Uniform(include=ENDS),
    "uniform_plus": UniformPlus(),
    "erk": Erk(include=ENDS),
    "erk_capped 0.5": ErkCapped(include=ENDS),
    "lamp": Lamp(include=ENDS),
    "global_magnitude": GlobalMagnitude(include=ENDS),
    "l2_normalised": L2Normalised(include=ENDS),
    "sequence": Sequence(include=ENDS),
    "evolutionary 16x8": Evolutionary(include=ENDS, population=16, generations=8, images=CALIBRATION),
    "raw_damage prior": RawDamage(include=ENDS),
    "raw_damage greedy": RawDamage(include=ENDS, rule="greedy"),
    **{
        f"{variant} {rule}": RelativeRepairability(include=ENDS, variant=variant, rule=rule)
        for variant in ("rr", "rr_asr", "rr_nomean", "rr_ls")
        for rule in ("prior", "greedy")
    },
}
EMA = BatchnormRecalibration(mode="ema_reset", batches=20)
REPAIRS: dict[str, tuple[Healer, ...]] = {
    "none": (),
    "bn cumulative": (BatchnormRecalibration(),),
    "bn exact": (BatchnormRecalibration(mode="exact"),),
    "bn ema_reset": (EMA,),
    "variance_matching": (VarianceMatching(),),
    "asr": (SignalResuscitation(),),
    "lw + bn ema_reset": (LayerwiseVariance(), EMA),
    "asr + bn ema_reset": (SignalResuscitation(), EMA),
}
COARSE = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97)


@dataclass(frozen=True)
class Images:
    """calibration [n, 3, 32, 32], held_out, test and its labels; all normalised."""

    calibration: Tensor
    held_out: Tensor
    test: Tensor
    labels: Tensor


def main() -> None:
    """Run the points that the table lacks."""
    options = _options()
    rows = _known()
    done = {_point(row) for row in rows}
    for net in options.net:
        dense = _dense(net, options.data)
        for seed in options.seeds:
            images = _images(options.data, seed, options.test_images)
            bench = _Bench(net, dense, images, seed)
            for sparsity in options.sparsities:
                for name in options.allocations:
                    for row in bench.rows(name, sparsity, options.repairs, done):
                        rows.append(row)
                        _write(rows)
                        print(*(f"{key}={row[key]}" for key in COLUMNS[:8]), flush=True)


class _Bench:
    """One network with one draw of calibration images."""

    def __init__(self, net: str, dense: nn.Module, images: Images, seed: int) -> None:
        self.net, self.dense, self.images, self.seed = net, dense, images, seed
        needing = [method for method in ALLOCATIONS.values() if method.needs]
        self.statistics: Statistics = capture(dense, images.calibration[:256], taps(dense, needing))
        self.answers = {"test": predict(dense, images.test, 250), "held_out": predict(dense, images.held_out, 250)}
        self.student = _copy(net)

    def rows(
        self, name: str, sparsity: float, repairs: list[str], done: set[tuple[str, ...]]
    ) -> Iterator[dict[str, Any]]:
        """Every repair of one allocation that was not measured yet."""
        wanted = [repair for repair in repairs if self._point(sparsity, name, repair) not in done]
        allocation = self._allocated(name, sparsity) if wanted else None
        if allocation is None:
            return
        mask = Magnitude().prune(self.dense, allocation, {})
        for repair in wanted:
            self.student.load_state_dict(self.dense.state_dict())
            apply(self.student, mask)
            began = time.perf_counter()
            for healer in REPAIRS[repair]:
                context = HealContext(pruned=mask, seed=self.seed)
                healer.heal(self.student, self.dense, self.images.calibration, context)
            yield self._measured(name, sparsity, repair, time.perf_counter() - began)

    def _point(self, sparsity: float, name: str, repair: str) -> tuple[str, ...]:
        return self.net, f"{sparsity:g}", name, repair, str(self.seed), str(len(self.images.test))

    def _allocated(self, name: str, sparsity: float) -> Allocation | None:
        context = AllocationContext(statistics=self.statistics, images=self.images.calibration, seed=self.seed)
        try:
            return ALLOCATIONS[name].allocate(self.dense, Budget(weights=sparsity), context)
        except BudgetError as error:
            print(f"{self.net} {name} {sparsity:g}: {error}", flush=True)
            return None

    def _measured(self, name: str, sparsity: float, repair: str, seconds: float) -> dict[str, Any]:
        logits = predict(self.student, self.images.test, 250)
        held_out = predict(self.student, self.images.held_out, 250)
        return {
            "net": self.net,
            "sparsity": f"{sparsity:g}",
            "allocation": name,
            "repair": repair,
            "seed": self.seed,
            "top1": round(100 * top1(logits, self.images.labels), 2),
            "agreement": round(100 * agreement(logits, self.answers["test"]), 2),
            "held_out_agreement": round(100 * agreement(held_out, self.answers["held_out"]), 2),
            "test_images": len(logits),
            "calibration_images": len(self.images.calibration),
            "seconds": round(seconds, 2),
        }


def _dense(net: str, data: Path) -> nn.Module:
    model = _copy(net)
    state = load_file(data / "weights" / f"{net}_cifar10.safetensors")
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    return model


def _copy(net: str) -> nn.Module:
    model: nn.Module = getattr(cifar_resnet, net)()
    return model.eval()


def _images(data: Path, seed: int, test_images: int) -> Images:
    sys.path.insert(0, str(data))
    from unpack_cifar import load

    train, _ = load("train")
    test, labels = load("test")
    drawn = shuffled(len(train), seed, "calibration")
    chosen = torch.from_numpy(train)[drawn[: CALIBRATION + HELD_OUT]]
    return Images(
        calibration=_normalised(chosen[:CALIBRATION]),
        held_out=_normalised(chosen[CALIBRATION:]),
        test=_normalised(torch.from_numpy(test[:test_images])),
        labels=torch.from_numpy(labels[:test_images]).long(),
    )


def _normalised(pixels: Tensor) -> Tensor:
    images = pixels.permute(0, 3, 1, 2).float() / 255
    return (images - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def _point(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("net", "sparsity", "allocation", "repair", "seed", "test_images"))


def _known() -> list[dict[str, Any]]:
    path = HERE / "cifar.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(rows: list[dict[str, Any]]) -> None:
    rows.sort(
        key=lambda row: (
            row["net"],
            float(row["sparsity"]),
            row["allocation"],
            row["repair"],
            int(row["seed"]),
            int(row["test_images"]),
        )
    )
    with (HERE / "cifar.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "cifar.md").write_text(_markdown(rows))


def _markdown(rows: list[dict[str, Any]]) -> str:
    """Top-1 in per cent: a table for every network and sparsity, a line an allocation, a column a repair."""
    tables: dict[tuple[str, ...], dict[tuple[str, str], list[float]]] = {}
    for row in rows:
        table = tables.setdefault((row["net"], row["sparsity"], str(row["test_images"])), {})
        table.setdefault((row["allocation"], row["repair"]), []).append(float(row["top1"]))
    lines = ["Top-1 in per cent; of several seeds the mean and, in brackets, the standard deviation."]
    for (net, sparsity, count), cells in tables.items():
        repairs = [name for name in REPAIRS if any(repair == name for _, repair in cells)]
        lines += ["", f"### {net}, {100 * float(sparsity):g} % masked, {count} test images", ""]
        lines += ["| allocation | " + " | ".join(repairs) + " |", "|---" * (len(repairs) + 1) + "|"]
        for name in (name for name in ALLOCATIONS if any(allocation == name for allocation, _ in cells)):
            lines.append(
                f"| {name} | " + " | ".join(_shown(cells.get((name, repair), [])) for repair in repairs) + " |"
            )
    return "\n".join(lines) + "\n"


def _shown(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{statistics.mean(values):.1f} ({statistics.stdev(values):.1f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--net", nargs="*", default=["resnet20", "resnet56"], choices=["resnet20", "resnet56"])
    parser.add_argument("--sparsities", nargs="*", type=float, default=list(COARSE))
    parser.add_argument("--allocations", nargs="*", default=list(ALLOCATIONS), choices=list(ALLOCATIONS))
    parser.add_argument("--repairs", nargs="*", default=list(REPAIRS), choices=list(REPAIRS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--test-images", type=int, default=10000, help="the first so many of the test set")
    options = parser.parse_args()
    options.data = options.data.resolve()
    return options


if __name__ == "__main__":
    main()
