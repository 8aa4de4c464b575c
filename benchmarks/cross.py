"""Allocations x repairs on one network: what every benchmark of masks and cuts measures, by the library."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.table import Row, Table
from heal.channels import cuts
from heal.errors import BudgetError, MethodError
from heal.evaluation import agreement, predict, top1
from heal.healers.batchnorm_recalibration import BatchnormRecalibration
from heal.healers.layerwise_variance import LayerwiseVariance
from heal.healers.signal_resuscitation import SignalResuscitation
from heal.healers.variance_matching import VarianceMatching
from heal.method import AllocationContext, Allocator, HealContext, Healer, Pruner, after, check, kinds_of, taps
from heal.pruned import apply
from heal.pruners.magnitude import Magnitude
from heal.statistics import capture
from heal.values import Allocation, Budget, ChannelCut, Mask, Statistics

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
    "device",
)
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
POINT = ("net", "sparsity", "allocation", "repair", "seed", "test_images", "calibration_images")


@dataclass(frozen=True)
class Repair:
    """Healers in order. views: which of the calibration images they see ("plain", or the benchmark's own)."""

    healers: tuple[Healer, ...] = ()
    views: str = "plain"


def training_free(batch_size: int, measured: int) -> dict[str, Repair]:
    """The repairs that train nothing. measured: images of variance matching."""
    ema = BatchnormRecalibration(mode="ema_reset", batch_size=batch_size, batches=20)
    return {
        "none": Repair(),
        "bn cumulative": Repair((BatchnormRecalibration(batch_size=batch_size),)),
        "bn exact": Repair((BatchnormRecalibration(mode="exact", batch_size=batch_size),)),
        "bn ema_reset": Repair((ema,)),
        "lw + bn ema_reset": Repair((LayerwiseVariance(), ema)),
        "asr + bn ema_reset": Repair((SignalResuscitation(), ema)),
        "asr": Repair((SignalResuscitation(),)),
        "variance_matching": Repair((VarianceMatching(images=measured),)),
    }


@dataclass(frozen=True)
class Images:
    """views: the calibration images [n, 3, h, w], by view. test, labels [n]: what top-1 is measured on.

    subsets: of the test images, each [n] of bool, reported apart. held_out: images without labels, or none.
    """

    views: Mapping[str, Tensor]
    test: Tensor
    labels: Tensor
    subsets: Mapping[str, Tensor] = field(default_factory=dict)
    held_out: Tensor | None = None

    def first(self, count: int) -> Images:
        """The same with the first `count` calibration images alone."""
        return replace(self, views={name: view[:count] for name, view in self.views.items()})


@dataclass(frozen=True)
class Methods:
    """What is crossed, by the names of the table. batch_size: of predictions. measured: images, of layers' statistics.

    pruners: of an allocation, if it is not magnitude's. Of allocations that cut, "sparsity" is the share of channels.
    """

    allocations: Mapping[str, Allocator]
    repairs: Mapping[str, Repair]
    batch_size: int
    measured: int
    pruners: Mapping[str, Pruner] = field(default_factory=dict)

    def pruner(self, allocation: str) -> Pruner:
        """What masks the layers of an allocation."""
        return self.pruners.get(allocation, Magnitude())


class Cross:
    """One network with one draw of calibration images."""

    def __init__(self, net: str, dense: nn.Module, images: Images, seed: int, methods: Methods) -> None:
        self.net, self.images, self.seed, self.methods = net, images, seed, methods
        self.dense = dense.eval().to(memory_format=torch.channels_last)
        self.asked = list(methods.allocations), list(methods.repairs)

    @cached_property
    def statistics(self) -> Statistics:
        """What all methods that were asked for need, in one pass."""
        allocations, repairs = self.asked
        allocators = [self.methods.allocations[name] for name in allocations]
        pruners = [self.methods.pruner(name) for name in allocations]
        healers = [healer for name in repairs for healer in self.methods.repairs[name].healers]
        wanted = taps(self.dense, [*allocators, *pruners, *healers])
        return capture(self.dense, self.images.views["plain"][: self.methods.measured], wanted)

    @cached_property
    def answers(self) -> dict[str, Tensor]:
        """The dense network's logits."""
        return self._answers(self.dense)

    def run(self, table: Table, asked: argparse.Namespace) -> None:
        """Measure what the table lacks of what was asked for (`options`)."""
        self.dense.to(asked.device)
        draws = [self.images.first(count) for count in asked.counts] or [self.images]
        for images in draws:
            Cross(self.net, self.dense, images, self.seed, self.methods)._all(table, asked)

    def _all(self, table: Table, asked: argparse.Namespace) -> None:
        self.asked = asked.allocations, asked.repairs
        for sparsity in asked.sparsities:
            for allocation in asked.allocations:
                self._run(table, sparsity, allocation, asked.repairs)

    def _run(self, table: Table, sparsity: float, allocation: str, repairs: list[str]) -> None:
        known = table.known()
        missing = [repair for repair in repairs if self._point(sparsity, allocation, repair) not in known]
        for row in self.rows(sparsity, allocation, [r for r in missing if self._makes_sense(sparsity, allocation, r)]):
            table.add([row])
            print(*(f"{key}={row[key]}" for key in (*COLUMNS[:8], "seconds")), flush=True)

    def rows(self, sparsity: float, name: str, repairs: list[str]) -> Iterator[Row]:
        """A row for every repair of one allocation."""
        allocation = self._allocated(name, sparsity) if repairs else None
        if allocation is None:
            return
        allocator, pruner = self.methods.allocations[name], self.methods.pruner(name)
        pruned = pruner.prune(self.dense, allocation, self.statistics if pruner.needs else {})
        for repair in repairs:
            began = time.perf_counter()
            student = self._repaired(self.methods.repairs[repair], pruned, cuts(kinds_of(allocator.needs)))
            yield self._measured(student, name, sparsity, repair, time.perf_counter() - began)

    def _repaired(self, repair: Repair, pruned: Mask | ChannelCut, cut: frozenset[str]) -> nn.Module:
        student = copy.deepcopy(self.dense)
        apply(student, pruned)
        reads = any(taps(self.dense, [healer], cut) for healer in repair.healers)
        context = HealContext(pruned=pruned, seed=self.seed, statistics=self.statistics if reads else {})
        for healer in repair.healers:
            report = healer.heal(student, self.dense, self.images.views[repair.views], context)
            context = after(context, report)
        return student

    def _makes_sense(self, sparsity: float, allocation: str, repair: str) -> bool:
        allocator, healers = self.methods.allocations[allocation], self.methods.repairs[repair].healers
        try:
            check(self.dense, Budget(**{allocator.unit: sparsity}), allocator, self.methods.pruner(allocation), healers)
        except MethodError as error:
            print(f"{self.net} {allocation}, {repair}: {error}", flush=True)
            return False
        return True

    def _point(self, sparsity: float, allocation: str, repair: str) -> tuple[str, ...]:
        counts = str(len(self.images.test)), str(len(self.images.views["plain"]))
        return self.net, f"{sparsity:g}", allocation, repair, str(self.seed), *counts

    def _allocated(self, name: str, sparsity: float) -> Allocation | None:
        images = self.images.views["plain"]
        allocator = self.methods.allocations[name]
        statistics = self.statistics if allocator.needs else {}
        context = AllocationContext(statistics=statistics, images=images, seed=self.seed)
        try:
            return allocator.allocate(self.dense, Budget(**{allocator.unit: sparsity}), context)
        except BudgetError as error:
            print(f"{self.net} {name} {sparsity:g}: {error}", flush=True)
            return None

    def _measured(self, student: nn.Module, name: str, sparsity: float, repair: str, seconds: float) -> dict[str, Any]:
        found = self._answers(student)
        agreements = {subset: 100 * agreement(logits, self.answers[subset]) for subset, logits in found.items()}
        return {
            "net": self.net,
            "sparsity": f"{sparsity:g}",
            "allocation": name,
            "repair": repair,
            "seed": self.seed,
            "top1": round(100 * top1(found["test"], self.images.labels), 2),
            "agreement": round(agreements["test"], 2),
            "held_out_agreement": round(agreements["held_out"], 2) if "held_out" in agreements else "",
            "test_images": len(self.images.test),
            "calibration_images": len(self.images.views["plain"]),
            "seconds": round(seconds, 2),
            "device": device_name(self.dense),
            **{
                name: round(100 * top1(found["test"][chosen], self.images.labels[chosen]), 2)
                for name, chosen in self.images.subsets.items()
            },
        }

    def _answers(self, model: nn.Module) -> dict[str, Tensor]:
        asked = {"test": self.images.test, "held_out": self.images.held_out}
        return {
            name: predict(model, images, self.methods.batch_size)
            for name, images in asked.items()
            if images is not None
        }


def device_name(model: nn.Module) -> str:
    """What the model lies on: cpu, or the name of the GPU."""
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def options(
    about: str, nets: Sequence[str], sparsities: Sequence[float], methods: Methods, repairs: Sequence[str]
) -> argparse.ArgumentParser:
    """What every cross is asked for; `sparsities` and `repairs` are what it measures unasked."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--data", type=Path, default=SHARED)
    parser.add_argument("--net", nargs="*", default=list(nets), choices=nets)
    parser.add_argument("--sparsities", nargs="*", type=float, default=list(sparsities))
    parser.add_argument(
        "--allocations", nargs="*", default=list(methods.allocations), choices=list(methods.allocations)
    )
    parser.add_argument("--repairs", nargs="*", default=list(repairs), choices=list(methods.repairs))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--counts", nargs="*", type=int, default=[], help="calibration images, the first so many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def with_weights(model: nn.Module, path: Path) -> nn.Module:
    """The model in eval mode with the weights of a safetensors file, in float32."""
    state = load_file(path)
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    return model.eval()


def table_of(
    path: Path, allocations: Mapping[str, Allocator], repairs: Mapping[str, Repair], subsets: tuple[str, ...] = ()
) -> Table:
    """The table of a cross, in the order of the dictionaries; a column for the top-1 of every subset."""
    order = {name: at for at, name in enumerate([*allocations, *repairs])}

    def rank(row: Row) -> tuple[Any, ...]:
        names = (order.get(row["allocation"], 99), order.get(row["repair"], 99))
        counts = int(row["test_images"]), int(row["calibration_images"])
        return row["net"], float(row["sparsity"]), *names, int(row["seed"]), *counts

    return Table(path, COLUMNS + subsets, POINT, rank)
