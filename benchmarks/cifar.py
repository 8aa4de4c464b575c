"""ResNet-20 and ResNet-56 on CIFAR-10: allocations x repairs, over sparsities; what the table lacks is measured.

    python benchmarks/cifar.py --data ../shared/data                     # the coarse cross without training: hours
    python benchmarks/cifar.py --data ../shared/data --part band         # 0.5 % steps through the transition
    python benchmarks/cifar.py --data ../shared/data --part trained      # the healers that train
    python benchmarks/cifar.py --data ../shared/data --net resnet20 --sparsities 0.9 --allocations erk

Several of these may run at once, one thread each: a row is written as soon as it is measured. The whole cross is run
by the library in one process, because it is thousands of points; single points are runs of the pipeline (presets/).
The test images are the first N of the test set; agreement is measured on held-out training images as well, which need
no label. Writes cifar.csv; cifar_page.py makes the tables and figures of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import cifar_resnet  # noqa: E402
from benchmarks.cross import Cross, Images, Methods, Repair, table_of, training_free  # noqa: E402
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
    "vm + starfish": Repair((MATCH, Starfish())),
    "layerwise, 300 steps + vm": Repair((Layerwise(budget="msbench", lr=1e-3, steps=300), MATCH)),
    "unipts, 30 epochs": Repair((Unipts(epochs=30, augment=False),)),
}
METHODS = Methods(ALLOCATIONS, REPAIRS, batch_size=250, damage_images=256)
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
TRAINED = ["vm + starfish", "layerwise, 300 steps + vm", "unipts, 30 epochs"]
RIVALS = [
    "uniform",
    "erk",
    "lamp",
    "global_magnitude",
    "raw_damage prior",
    "raw_damage greedy",
    "rr prior",
    "rr greedy",
]


def main() -> None:
    """Run the points that the table lacks."""
    options = _options()
    torch.set_num_threads(options.threads)
    table = table_of(HERE / "cifar.csv", ALLOCATIONS, REPAIRS)
    for net in options.net:
        for seed in options.seeds:
            images = _images(options.data, seed, options.test_images)
            cross = Cross(net, _dense(net, options.data), images, seed, METHODS)
            for sparsity in options.sparsities:
                for allocation in options.allocations:
                    cross.run(table, sparsity, allocation, options.repairs)


def _dense(net: str, data: Path) -> nn.Module:
    model: nn.Module = getattr(cifar_resnet, net)()
    state = load_file(data / "weights" / f"{net}_cifar10.safetensors")
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    return model.eval()


def _images(data: Path, seed: int, test_images: int) -> Images:
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--net", nargs="*", default=["resnet20", "resnet56"], choices=["resnet20", "resnet56"])
    parser.add_argument("--sparsities", nargs="*", type=float, default=list(COARSE))
    parser.add_argument("--allocations", nargs="*", default=list(ALLOCATIONS), choices=list(ALLOCATIONS))
    parser.add_argument("--repairs", nargs="*", default=FREE, choices=list(REPAIRS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--test-images", type=int, default=2000, help="the first so many of the test set")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.data = options.data.resolve()
    return options


if __name__ == "__main__":
    main()
