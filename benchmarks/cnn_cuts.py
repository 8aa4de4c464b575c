"""EfficientNet-Lite0, MobileNetV2 and ResNet-56 without 20 to 50 % of their blocks' inner channels.

    python benchmarks/cnn_cuts.py --data ../shared/data      # what the table lacks of the repairs that train nothing
    python benchmarks/cnn_cuts.py --net resnet56 --sparsities 0.3 --repairs "ridge, bn + starfish"

Nothing is folded by the cut itself. ImageNet networks: 1 000 unlabeled calibration images, all there are, and 1 397
test images of three sources, reported apart; ResNet-56: 1 024 CIFAR-10 training images, the first 2 000 of the test
set. Writes cnn_cuts.csv; crosses_page.py makes the tables of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import cifar, mobile  # noqa: E402
from benchmarks.cross import Cross, Methods, Repair, options, table_of  # noqa: E402
from benchmarks.imagenet import SUBSETS, dense_of, read  # noqa: E402
from heal.allocators import filter_norm  # noqa: E402
from heal.allocators.global_variance import GlobalVariance  # noqa: E402
from heal.healers.batchnorm_recalibration import BatchnormRecalibration  # noqa: E402
from heal.healers.blockwise import Blockwise  # noqa: E402
from heal.healers.closed_form import ClosedForm  # noqa: E402
from heal.healers.mean_folding import MeanFolding  # noqa: E402
from heal.healers.starfish import Starfish  # noqa: E402
from heal.healers.variance_matching import VarianceMatching  # noqa: E402
from heal.method import Allocator, Pruner  # noqa: E402
from heal.pruners import filter_norm as filter_norm_cut  # noqa: E402
from heal.pruners.variance import Variance  # noqa: E402

NETS = (*mobile.NETS, "resnet56")
RANKINGS: dict[str, tuple[Allocator, Pruner]] = {
    "variance": (GlobalVariance(), Variance(fold_mean=False)),
    "variance, by layer": (GlobalVariance(scope="layer"), Variance(fold_mean=False)),
    "weighted": (GlobalVariance(statistic="weighted"), Variance(fold_mean=False, statistic="weighted")),
    "filter norm": (filter_norm.FilterNorm(), filter_norm_cut.FilterNorm()),
    "filter norm, by layer": (filter_norm.FilterNorm(scope="layer"), filter_norm_cut.FilterNorm()),
}
ALLOCATIONS = {name: allocator for name, (allocator, _) in RANKINGS.items()}
BN, RIDGE, MATCH = BatchnormRecalibration(batch_size=64), ClosedForm(), VarianceMatching(images=64)
REPAIRS: dict[str, Repair] = {
    "none": Repair(),
    "bn cumulative": Repair((BN,)),
    "variance_matching": Repair((MATCH,)),
    "mean": Repair((MeanFolding(),)),
    "ridge": Repair((RIDGE,)),
    "ridge, bn": Repair((RIDGE, BN)),
    "ridge, vm": Repair((RIDGE, MATCH)),
    "sequential ridge": Repair((ClosedForm(inputs="pruned"),)),
    "bn + starfish": Repair((BN, Starfish())),
    "ridge, bn + starfish": Repair((RIDGE, BN, Starfish())),
    "ridge, vm + starfish": Repair((RIDGE, MATCH, Starfish())),
    "ridge, bn + blockwise, 300 steps": Repair((RIDGE, BN, Blockwise(steps=300))),
    "ridge, bn + starfish, 3 epochs": Repair((RIDGE, BN, Starfish(epochs=3))),
    "ridge, vm + starfish, 3 epochs": Repair((RIDGE, MATCH, Starfish(epochs=3))),
}
FREE = [name for name in REPAIRS if "starfish" not in name and "blockwise" not in name]
PRUNERS = {name: pruner for name, (_, pruner) in RANKINGS.items()}


def main() -> None:
    """Run the points that the table lacks."""
    methods = Methods(ALLOCATIONS, REPAIRS, batch_size=32, measured=1024, pruners=PRUNERS)
    asked = options(__doc__.partition("\n")[0], NETS, (0.2, 0.3, 0.5), methods, FREE).parse_args()
    torch.set_num_threads(asked.threads)
    table = table_of(HERE / "cnn_cuts.csv", ALLOCATIONS, REPAIRS, SUBSETS)
    for net in asked.net:
        for seed in asked.seeds:
            if net in mobile.NETS:
                dense = dense_of(net, asked.data)
                images = read(asked.data, dense.pretrained_cfg)  # type: ignore[arg-type]
            else:
                dense, images = cifar.dense_of(net, asked.data), cifar.images_of(asked.data, seed, 2000)
            Cross(net, dense, images, seed, methods).run(table, asked)


if __name__ == "__main__":
    main()
