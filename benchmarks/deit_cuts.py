"""DeiT-Tiny cut on ImageNet: rankings x healers at 20 to 60 % of the channels; measures what the table lacks.

    python benchmarks/deit_cuts.py --data ../shared/data                                   # without training
    python benchmarks/deit_cuts.py --sparsities 0.5 --allocations vbp --repairs "ridge + starfish"
    python benchmarks/deit_cuts.py --sparsities 0.3 0.5 --allocations qk --repairs none logits  # "logits": compensated

Channels are hidden neurons, of "qk", "v" and "heads" those of attention, of "mlp, qk, v" each kind's same share; of
"depth" it is whole blocks that go.
Nothing is folded by the cut itself: "none" drops the neurons, "mean" puts their mean into the next bias. 1 000
unlabeled calibration images, all there are, so a seed changes the order of training alone; 1 397 test images of three
sources, reported apart. Writes deit_cuts.csv; crosses_page.py makes the tables of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.cross import Methods, Repair  # noqa: E402
from benchmarks.imagenet import measure  # noqa: E402
from heal.allocators import depth, filter_norm, snip  # noqa: E402
from heal.allocators.global_variance import GlobalVariance  # noqa: E402
from heal.healers.blockwise import Blockwise  # noqa: E402
from heal.healers.closed_form import ClosedForm  # noqa: E402
from heal.healers.distill import Distill  # noqa: E402
from heal.healers.mean_folding import MeanFolding  # noqa: E402
from heal.healers.qk_compensation import QkCompensation  # noqa: E402
from heal.healers.starfish import Starfish  # noqa: E402
from heal.method import Allocator, Healer, Pruner  # noqa: E402
from heal.pruners import depth as depth_cut  # noqa: E402
from heal.pruners import filter_norm as filter_norm_cut  # noqa: E402
from heal.pruners import snip as snip_cut  # noqa: E402
from heal.pruners.variance import Variance  # noqa: E402

NET = "deit_tiny_patch16_224"
RANKINGS: dict[str, tuple[Allocator, Pruner]] = {
    "vbp": (GlobalVariance(), Variance(fold_mean=False)),
    "vbp weighted": (GlobalVariance(statistic="weighted"), Variance(fold_mean=False, statistic="weighted")),
    "vbp denoised": (GlobalVariance(statistic="denoised"), Variance(fold_mean=False, statistic="denoised")),
    "filter norm": (filter_norm.FilterNorm(), filter_norm_cut.FilterNorm()),
    "snip": (snip.Snip(), snip_cut.Snip()),
    "qk": (GlobalVariance(kinds=("qk",)), Variance(fold_mean=False)),
    "v": (GlobalVariance(kinds=("v",)), Variance(fold_mean=False)),
    "heads": (GlobalVariance(kinds=("heads",)), Variance(fold_mean=False)),
    "mlp, qk, v": (GlobalVariance(kinds=("mlp", "qk", "v")), Variance(fold_mean=False)),
    "depth": (depth.Depth(), depth_cut.Depth()),
}
ALLOCATIONS = {name: allocator for name, (allocator, _) in RANKINGS.items()}
RIDGE, SEQUENTIAL, LOGITS = ClosedForm(), ClosedForm(inputs="pruned"), QkCompensation()
SOLVED: dict[str, tuple[Healer, ...]] = {
    "none": (),
    "mean": (MeanFolding(),),
    "ridge": (RIDGE,),
    "ridge, denoised": (ClosedForm(moment="denoised", damping=1e-2),),
    "sequential ridge": (SEQUENTIAL,),
}
TRAINED: dict[str, Healer] = {
    "starfish": Starfish(),
    "distill, lr 1e-4": Distill(lr=1e-4),
    "blockwise, 300 steps, lr 1e-3": Blockwise(steps=300, lr=1e-3),
}
REPAIRS: dict[str, Repair] = {
    **{name: Repair(healers) for name, healers in SOLVED.items()},
    "ridge, damping 0.01": Repair((ClosedForm(damping=1e-2),)),
    "ridge, oas": Repair((ClosedForm(damping="oas"),)),
    "ridge, held out": Repair((ClosedForm(damping="held_out"),)),
    **{
        name if start == "none" else f"{start} + {name}": Repair((*healers, healer))
        for name, healer in TRAINED.items()
        for start, healers in SOLVED.items()
    },
    "ridge + distill": Repair((RIDGE, Distill())),
    "ridge + blockwise, 300 steps": Repair((RIDGE, Blockwise(steps=300))),
    "sequential ridge + starfish, affine": Repair((SEQUENTIAL, Starfish(affine=True))),
    "sequential ridge + starfish, kl": Repair((SEQUENTIAL, Starfish(kl=0.1))),
    "ridge + starfish, batches of 8": Repair((RIDGE, Starfish(batch_size=8))),
    "ridge + starfish, affine, kl 0.03, batches of 8": Repair((RIDGE, Starfish(affine=True, kl=0.03, batch_size=8))),
    "logits": Repair((LOGITS,)),
    "logits + starfish": Repair((LOGITS, Starfish())),
    "logits, ridge": Repair((LOGITS, RIDGE)),
    "logits, ridge + starfish": Repair((LOGITS, RIDGE, Starfish())),
}
FREE = [name for name in REPAIRS if not any(word in name for word in ("starfish", "distill", "blockwise", "logits"))]
METHODS = Methods(
    ALLOCATIONS, REPAIRS, batch_size=32, measured=1000, pruners={name: pruner for name, (_, pruner) in RANKINGS.items()}
)


def main() -> None:
    """Run the points that the table lacks."""
    measure(__doc__, HERE / "deit_cuts.csv", (NET,), (0.2, 0.3, 0.4, 0.5, 0.6), METHODS, FREE)


if __name__ == "__main__":
    main()
