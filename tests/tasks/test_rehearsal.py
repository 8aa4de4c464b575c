"""What a run with these methods would end in is known before it starts, and nothing that works is refused."""

from __future__ import annotations

import pytest

from heal.compat import timm
from heal.errors import ArchitectureError, BudgetError
from tasks import params, rehearsal
from tests.heal import nets

CUTS = {
    "denoised": ["allocation.global_variance={statistic: denoised}"],
    "weighted": ["allocation.global_variance={statistic: weighted}"],
    "snip": ["allocation.method=snip", "pruning.method=snip", "healing.methods=[mean_folding]"],
    "filter_norm": ["allocation.method=filter_norm", "pruning.method=filter_norm", "healing.methods=[closed_form]"],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("net", ["vit", "mobilenetv3", "resnet"])
@pytest.mark.parametrize("budget", ["{neurons: 0.5}", "{macs: 0.01}"])
def test_cuts_are_rehearsed(net: str, cut: str, budget: str) -> None:
    asked = params.load(None, [*CUTS[cut], f"allocation.budget={budget}"])
    rehearsal._refuse_methods(asked, nets.build(net), (nets.SIZE, nets.SIZE))


def test_a_budget_that_cannot_be_met_is_refused_by_the_rehearsal() -> None:
    asked = params.load(None, ["allocation.budget={macs: 0.99}"])
    with pytest.raises(BudgetError, match=r"macs = 0\.99 cannot be met"):
        rehearsal._refuse_methods(asked, nets.build("vit"), (nets.SIZE, nets.SIZE))


DEPTH = ["allocation.method=depth", "pruning.method=depth", "healing.methods=[starfish]"]


@pytest.mark.parametrize(
    ("net", "budget", "reason"),
    [
        ("vit", "{blocks: 0.3}", None),
        ("vit", "{macs: 0.5}", None),
        ("vit", "{blocks: 0.1}", r"no more than half of one of the 3 blocks .* write more than 0\.167"),
        ("resnet", "{blocks: 0.9}", None),
        ("vit", "{blocks: 0.9}", r"blocks = 0\.9 cannot be met: it drops all 3 blocks, and one must stay"),
        ("vit", "{macs: 0.9}", r"macs = 0\.9 cannot be met: without 2 of the 3 blocks that can go"),
        ("resnet", "{macs: 0.5}", r"macs = 0\.5 cannot be met: without 1 of the 1 blocks that can go"),
        ("vgg", "{blocks: 0.5}", r"VGG \(family vgg\) has no block that adds what it computes to its input"),
    ],
)
def test_depth_is_rehearsed_without_a_search(net: str, budget: str, reason: str | None) -> None:
    asked = params.load(None, [*DEPTH, f"allocation.budget={budget}"])
    if reason is None:
        rehearsal._refuse_methods(asked, nets.build(net), (nets.SIZE, nets.SIZE))
        return
    with pytest.raises((ArchitectureError, BudgetError), match=reason):
        rehearsal._refuse_methods(asked, nets.build(net), (nets.SIZE, nets.SIZE))


def test_blocks_that_cannot_be_trained_alone_are_refused_by_the_rehearsal() -> None:
    net = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2, embed_dim=48, num_heads=3).eval()
    asked = params.load(None, ["allocation.budget={weights: 0.5}", "healing.methods=[blockwise]"])
    with pytest.raises(ArchitectureError, match=r"healing\.methods: healer blockwise: blocks\.0 takes .* \(rope\)"):
        rehearsal._refuse_methods(asked, net, (28, 28))
