"""EfficientNet-Lite0 and MobileNetV2 on ImageNet: allocations x repairs at 50 to 80 %; measures what the table lacks.

    python benchmarks/mobile.py --data ../shared/data                    # the repairs that train nothing: hours
    python benchmarks/mobile.py --net mobilenetv2_100 --sparsities 0.6 --repairs "unipts, 3 epochs"

1 000 unlabeled calibration images, all there are, so a seed changes the order of training alone; 1 397 test images of
three sources, reported apart. The pool is all convolutions and the classifier but the depthwise ones; "+ depthwise"
takes those in. Writes mobile.csv; mobile_page.py makes the tables of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.cross import Methods, Repair, training_free  # noqa: E402
from benchmarks.imagenet import measure  # noqa: E402
from heal.allocators.erk import Erk  # noqa: E402
from heal.allocators.global_magnitude import GlobalMagnitude  # noqa: E402
from heal.allocators.lamp import Lamp  # noqa: E402
from heal.allocators.raw_damage import RawDamage  # noqa: E402
from heal.allocators.relative_repairability import RelativeRepairability  # noqa: E402
from heal.allocators.uniform import Uniform  # noqa: E402
from heal.healers.layerwise import Layerwise  # noqa: E402
from heal.healers.least_squares import LeastSquares  # noqa: E402
from heal.healers.starfish import Starfish  # noqa: E402
from heal.healers.unipts import Unipts  # noqa: E402
from heal.healers.variance_matching import VarianceMatching  # noqa: E402
from heal.method import Allocator  # noqa: E402

NETS = ("tf_efficientnet_lite0", "mobilenetv2_100")


def _allocations(suffix: str, include: tuple[str, ...]) -> dict[str, Allocator]:
    return {
        f"uniform{suffix}": Uniform(include=include),
        f"erk{suffix}": Erk(include=include),
        f"lamp{suffix}": Lamp(include=include),
        f"global_magnitude{suffix}": GlobalMagnitude(include=include),
        f"raw_damage greedy{suffix}": RawDamage(include=include, rule="greedy"),
        f"rr prior{suffix}": RelativeRepairability(include=include),
        f"rr greedy{suffix}": RelativeRepairability(include=include, rule="greedy"),
    }


ALLOCATIONS = {
    **_allocations("", ("stem", "classifier")),
    **_allocations(" + depthwise", ("stem", "depthwise", "classifier")),
}
MATCH, SOLVED = VarianceMatching(images=64), LeastSquares(images=256)
REPAIRS: dict[str, Repair] = {
    **training_free(batch_size=32, measured=64),
    "least squares, 256 images": Repair((SOLVED,)),
    "least squares, 256 images + starfish, 3 epochs": Repair((SOLVED, Starfish(epochs=3))),
    "vm + starfish, 3 epochs": Repair((MATCH, Starfish(epochs=3))),
    "layerwise, 50 steps + vm": Repair((Layerwise(budget="msbench", lr=1e-3, steps=50), MATCH)),
    "unipts, 3 epochs": Repair((Unipts(epochs=3, augment=False),)),
    "unipts, 3 epochs as published": Repair((Unipts(epochs=3, lr=0.05, weight_decay=4e-5),)),
}
METHODS = Methods(ALLOCATIONS, REPAIRS, batch_size=8, measured=64)
FREE = ["bn cumulative", "asr + bn ema_reset", "variance_matching"]


def main() -> None:
    """Run the points that the table lacks."""
    measure(__doc__, HERE / "mobile.csv", NETS, (0.5, 0.6, 0.7, 0.8), METHODS, FREE)


if __name__ == "__main__":
    main()
