"""DeiT-Tiny masked on ImageNet: pruners x healers at 50, 60, 75 % and in N:M patterns; measures what the table lacks.

    python benchmarks/deit_masks.py --data ../shared/data --repairs none                # what training starts from
    python benchmarks/deit_masks.py --data ../shared/data --sparsities 0.75 --threads 2 # the cross where it decides

The pool is qkv, proj, fc1 and fc2 of every block, the same sparsity in each. 1 000 unlabeled calibration images, all
there are, so a seed changes the order of training alone; 1 397 test images of three sources, reported apart. A pattern
is measured at its own sparsity. Writes deit_masks.csv; crosses_page.py makes the tables of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.cross import Methods, Repair  # noqa: E402
from benchmarks.imagenet import measure  # noqa: E402
from heal.allocators.n_of_m import NOfM  # noqa: E402
from heal.allocators.uniform import Uniform  # noqa: E402
from heal.healers.blockwise import Blockwise  # noqa: E402
from heal.healers.distill import Distill  # noqa: E402
from heal.healers.layerwise import Layerwise  # noqa: E402
from heal.healers.least_squares import LeastSquares  # noqa: E402
from heal.healers.starfish import Starfish  # noqa: E402
from heal.healers.unipts import Unipts  # noqa: E402
from heal.method import Allocator, Pruner  # noqa: E402
from heal.pruners.magnitude import Magnitude  # noqa: E402
from heal.pruners.obs import Obs  # noqa: E402
from heal.pruners.wanda import Wanda  # noqa: E402

NET = "deit_tiny_patch16_224"
PRUNERS: dict[str, Pruner] = {"magnitude": Magnitude(), "wanda": Wanda(), "obs": Obs()}
PATTERNS = {"": None, " 2:4": "2:4", " 1:4": "1:4"}
STARTS = {
    f"{name}{suffix}": (pruner, pattern) for suffix, pattern in PATTERNS.items() for name, pruner in PRUNERS.items()
}
ALLOCATIONS: dict[str, Allocator] = {
    name: NOfM(pattern) if pattern else Uniform() for name, (_, pattern) in STARTS.items()
}
REPAIRS: dict[str, Repair] = {
    "none": Repair(),
    "least squares": Repair((LeastSquares(),)),
    "least squares, dense inputs": Repair((LeastSquares(inputs="dense"),)),
    "layerwise, 300 steps": Repair((Layerwise(budget="msbench", lr=1e-3, steps=300, inputs="pruned"),)),
    "blockwise, 300 steps": Repair((Blockwise(steps=300),)),
    "blockwise, 300 steps, lr 1e-3": Repair((Blockwise(steps=300, lr=1e-3),)),
    "distill": Repair((Distill(),)),
    "distill, lr 1e-4": Repair((Distill(lr=1e-4),)),
    "distill, lr 6e-4": Repair((Distill(lr=6e-4, weight_decay=0.0),)),
    "unipts loss": Repair((Unipts(epochs=10, batch_size=32, warmup_epochs=0, augment=False, mask="fixed"),)),
    "starfish": Repair((Starfish(),)),
    "starfish, affine": Repair((Starfish(affine=True),)),
    "starfish, kl": Repair((Starfish(kl=0.1),)),
    "starfish, affine, kl": Repair((Starfish(affine=True, kl=0.1),)),
    "starfish, affine, kl, batches of 8": Repair((Starfish(affine=True, kl=0.1, batch_size=8),)),
    "starfish, affine, kl 0.03, batches of 8": Repair((Starfish(affine=True, kl=0.03, batch_size=8),)),
    "starfish, affine, kl 0.03, batches of 8, 30 epochs": Repair(
        (Starfish(affine=True, kl=0.03, batch_size=8, epochs=30),)
    ),
    "starfish, affine, kl 0.03, batches of 8, 100 epochs": Repair(
        (Starfish(affine=True, kl=0.03, batch_size=8, epochs=100),)
    ),
    "starfish, affine, kl 0.5, batches of 8": Repair((Starfish(affine=True, kl=0.5, batch_size=8),)),
    "starfish, affine, kl, mse": Repair((Starfish(affine=True, kl=0.1, mse=0.1),)),
    "least squares + starfish": Repair((LeastSquares(), Starfish())),
    "least squares + starfish, affine, kl": Repair((LeastSquares(), Starfish(affine=True, kl=0.1))),
}
METHODS = Methods(
    ALLOCATIONS, REPAIRS, batch_size=32, measured=1000, pruners={name: pruner for name, (pruner, _) in STARTS.items()}
)


def main() -> None:
    """Run the points that the table lacks."""
    measure(__doc__, HERE / "deit_masks.csv", (NET,), (0.5, 0.6, 0.75), METHODS, list(REPAIRS))


if __name__ == "__main__":
    main()
