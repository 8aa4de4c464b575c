"""Which healers have something to do, and in which order they make sense."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from heal.errors import MethodError

STAND_ON_DENSE_STATISTICS = frozenset({"signal_resuscitation", "layerwise_variance", "bias_correction", "mean_folding"})
"""Healers that bring a layer's output back to what the dense BatchNorm after it expects."""

MOVE_STATISTICS = frozenset(
    {
        "adaprune",
        "batchnorm_recalibration",
        "bias_correction",
        "layerwise",
        "least_squares",
        "signal_resuscitation",
        "unipts",
        "variance_matching",
    }
)
"""Healers after which a BatchNorm expects something else."""

SOLVE_ANEW = frozenset({"closed_form", "least_squares", "qk_compensation"})
"""Healers that fit layers to the dense outputs, whatever they were before; each writes others, so any may be first."""

ONE_ROUND = {
    "unipts": "is one course of training on the whole mask, which it may move",
    "qk_compensation": "mixes the dimensions that stay, so that none is the one that the pruner chose among",
    "bias_correction": "estimates means without the borders of images, and every round would add that error",
}
"""Healers after which the cut cannot go on, and why."""


def refuse_rounds(rounds: int, healers: Collection[str], writes_weights: bool, patterned: bool) -> None:
    """Raise MethodError when what the pruner chose cannot go in so many steps."""
    if rounds < 1:
        raise MethodError(f"rounds = {rounds} must be at least 1")
    if rounds > 1 and writes_weights:
        raise MethodError(
            f"rounds = {rounds}, but the pruner also writes weights, and those are for the whole cut at once; let it "
            "only choose: set pruning.variance.fold_mean: false and name mean_folding or closed_form in "
            "healing.methods, or in place of obs take magnitude or wanda, and least_squares"
        )
    if rounds > 1 and patterned:
        raise MethodError(f"rounds = {rounds}, but an N:M pattern holds only for the whole mask; set rounds to 1")
    for healer in healers:
        if rounds > 1 and healer in ONE_ROUND:
            raise MethodError(
                f"rounds = {rounds}, but {healer} {ONE_ROUND[healer]}; leave {healer} out, or set rounds to 1"
            )


def refuse_order(healers: Sequence[str], pruner: str) -> None:
    """Raise MethodError when one of the healers undoes what came before, or the pruner leaves nothing to heal."""
    if pruner == "none" and set(healers) - {"none"}:
        raise MethodError(f"pruner none leaves nothing to heal, but healers are {', '.join(healers)}; name only none")
    for at, healer in enumerate(healers):
        before = set(healers[:at])
        if healer in SOLVE_ANEW and before - (SOLVE_ANEW - {healer}):
            raise MethodError(
                f"healers {', '.join(healers)}: {healer} solves layers anew for the dense outputs and would undo "
                "what came before it; put it first"
            )
        if healer == "mean_folding" and "closed_form" in before:
            raise MethodError(
                f"healers {', '.join(healers)}: closed_form sets the biases that mean_folding would set anew; leave "
                "mean_folding out"
            )
        moved = before & MOVE_STATISTICS
        if healer in STAND_ON_DENSE_STATISTICS and moved:
            raise MethodError(
                f"healers {', '.join(healers)}: {healer} stands on the dense running statistics, which "
                f"{' and '.join(sorted(moved))} rewrote; put it before"
            )


def refuse_idle(healers: Collection[str], kinds: Collection[str]) -> None:
    """Raise MethodError when a healer has nothing to repair in a cut of these kinds of channels."""
    if "qk_compensation" in healers and "qk" not in kinds:
        raise MethodError(
            f"healer qk_compensation makes up for cut queries and keys, but the allocator cuts {', '.join(kinds)}; "
            "add qk to its kinds, or leave the healer out"
        )
    for healer in ("closed_form", "mean_folding"):
        if healer in healers and set(kinds) == {"qk"}:
            raise MethodError(
                f"healer {healer} repairs the layers that read what was cut, but queries and keys are read by none; "
                "take qk_compensation"
            )
