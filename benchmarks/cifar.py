"""ResNet-20 and ResNet-56 on CIFAR-10: allocations x repairs, over sparsities; what the table lacks is measured.

    python benchmarks/cifar.py --data ../shared/data                     # the coarse cross without training: hours
    python benchmarks/cifar.py --data ../shared/data --net resnet20 --sparsities 0.9 --allocations erk
    # the band, and the healers that train
    python benchmarks/cifar.py --net resnet20 --sparsities $(seq 0.8 0.005 0.94) --repairs variance_matching \\
        --test-images 5000
    python benchmarks/cifar.py --net resnet20 --sparsities 0.9 0.95 --repairs "vm + starfish" "unipts, 30 epochs"

Several of these may run at once, one thread each: a row is written as soon as it is measured. The whole cross is run
by the library in one process, because it is thousands of points; single points are runs of the pipeline (presets/).
The test images are the first N of the test set; agreement is measured on held-out training images as well, which need
no label. Writes cifar.csv; cifar_page.py makes the tables and figures of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import cifar_resnet  # noqa: E402
from benchmarks.cross import (  # noqa: E402
    Cross,
    Images,
    Methods,
    Repair,
    options,
    table_of,
    training_free,
    with_weights,
)
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
from heal.healers.batchnorm_recalibration import BatchnormRecalibration  # noqa: E402
from heal.healers.layerwise import Layerwise  # noqa: E402
from heal.healers.least_squares import LeastSquares  # noqa: E402
from heal.healers.starfish import Starfish  # noqa: E402
from heal.healers.unipts import Unipts  # noqa: E402
from heal.healers.variance_matching import VarianceMatching  # noqa: E402
from heal.images import generator, shuffled  # noqa: E402
from heal.method import Allocator  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDS = ("stem", "classifier")
CALIBRATION, HELD_OUT = 1024, 500

ALLOCATIONS: dict[str, Allocator] = {
    "uniform": Uniform(include=ENDS),
    "uniform_plus": UniformPlus(),
    "erk": Erk(include=ENDS),
    "erk_capped 0.5": ErkCapped(include=ENDS),
    "lamp": Lamp(include=ENDS),
    "global_magnitude": GlobalMagnitude(include=ENDS),
    "l2_normalised": L2Normalised(include=ENDS),
    "sequence": Sequence(include=ENDS),
    "evolutionary 16x8": Evolutionary(include=ENDS, population=16, generations=8, images=256),
    "raw_damage prior": RawDamage(include=ENDS),
    "raw_damage prior, at ERK's": RawDamage(include=ENDS, probe="prior"),
    "raw_damage greedy": RawDamage(include=ENDS, rule="greedy"),
    **{
        f"{variant} {rule}": RelativeRepairability(include=ENDS, variant=variant, rule=rule)
        for variant in ("rr", "rr_asr", "rr_nomean", "rr_ls")
        for rule in ("prior", "greedy")
    },
    "rr prior, at 1-S": RelativeRepairability(include=ENDS, probe="uniform"),
}
MATCH = VarianceMatching(images=256)
REPAIRS: dict[str, Repair] = {
    **training_free(batch_size=128, measured=256),
    # The networks were trained on such crops: their statistics are not those of the images as they are.
    "bn cumulative, crops": Repair((BatchnormRecalibration(),), "crops"),
    "least squares": Repair((LeastSquares(),)),
    "least squares, dense inputs": Repair((LeastSquares(inputs="dense"),)),
    "least squares, vm": Repair((LeastSquares(), MATCH)),
    "least squares + starfish": Repair((LeastSquares(), Starfish())),
    "vm + starfish": Repair((MATCH, Starfish())),
    "layerwise, 300 steps + vm": Repair((Layerwise(budget="msbench", lr=1e-3, steps=300), MATCH)),
    "unipts, 30 epochs": Repair((Unipts(epochs=30, augment=False),)),
}
METHODS = Methods(ALLOCATIONS, REPAIRS, batch_size=250, measured=256)
COARSE = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97)
FREE = [
    "none",
    "bn cumulative",
    "bn exact",
    "bn ema_reset",
    "asr + bn ema_reset",
    "bn cumulative, crops",
    "variance_matching",
]


def main() -> None:
    """Run the points that the table lacks."""
    parser = options(__doc__.partition("\n")[0], ("resnet20", "resnet56"), COARSE, METHODS, FREE)
    parser.add_argument("--test-images", type=int, default=2000, help="the first so many of the test set")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    table = table_of(HERE / "cifar.csv", ALLOCATIONS, REPAIRS)
    for net in asked.net:
        for seed in asked.seeds:
            images = images_of(asked.data, seed, asked.test_images)
            Cross(net, dense_of(net, asked.data), images, seed, METHODS).run(table, asked)


def dense_of(net: str, data: Path) -> nn.Module:
    return with_weights(getattr(cifar_resnet, net)(), data / "weights" / f"{net}_cifar10.safetensors")


def images_of(data: Path, seed: int, test_images: int) -> Images:
    sys.path.insert(0, str(data))
    from unpack_cifar import load

    train, _ = load("train")
    test, labels = load("test")
    drawn = shuffled(len(train), seed, "calibration")
    chosen = torch.from_numpy(train)[drawn[: CALIBRATION + HELD_OUT]].permute(0, 3, 1, 2)
    calibration = chosen[:CALIBRATION]
    return Images(
        views={"plain": _normalised(calibration), "crops": _normalised(_crops(calibration, seed))},
        held_out=_normalised(chosen[CALIBRATION:]),
        test=_normalised(torch.from_numpy(test[:test_images]).permute(0, 3, 1, 2)),
        labels=torch.from_numpy(labels[:test_images]).long(),
    )


def _crops(images: Tensor, seed: int) -> Tensor:
    """Images as the networks were trained: framed by 4 black pixels, cut to 32x32 anywhere, half of them mirrored."""
    drawn = generator(seed, "crops")
    corners = torch.randint(9, (len(images), 2), generator=drawn).tolist()
    mirrored = (torch.rand(len(images), generator=drawn) < 0.5).tolist()
    cut = [
        x[:, top : top + 32, left : left + 32]
        for x, (top, left) in zip(F.pad(images, (4, 4, 4, 4)), corners, strict=True)
    ]
    return torch.stack([x.flip(-1) if flip else x for x, flip in zip(cut, mirrored, strict=True)])


def _normalised(pixels: Tensor) -> Tensor:
    images = (pixels.float() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    return images.contiguous()


if __name__ == "__main__":
    main()
