"""Relative repairability: sparsity goes where a repair can undo the damage.

Source: arXiv 2605.25508 (the abstract; see heal/repairability.py for what is ours). The paper says that this
is of use near the transition where sparsity becomes unrecoverable, and not elsewhere; it earns credit only
where it beats `raw_damage`, which is the same rule without the repair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from heal.allocators.erk import ratio
from heal.allocators.pool import Include, Pool, by_shape, refuse_parts
from heal.allocators.repair_rules import GRID, Probe, Rule, greedy, modulated
from heal.errors import ImagesError, MethodError
from heal.images import Replay
from heal.method import AllocationContext
from heal.naming import refuse_unknown
from heal.progress import Report, quiet
from heal.repairability import UNDAMAGED, VARIANTS, Damage, Layer, Variant, channel_weights
from heal.values import Allocation, Budget
from heal.wiring import trace

Measure = Callable[[str, float], Damage]
"""(layer, density) -> the damage of masking that layer alone."""


@dataclass(frozen=True)
class RelativeRepairability:
    """include: parts beside the table's layers.

    variant: the repair, and whether the mean counts: "rr", "rr_asr" (shrunk gains), "rr_nomean", "rr_ls" (best
    affine, bounded by 1). rule: "prior" modulates ERK by RR, "greedy" buys the largest drop of unrepairable
    damage. strength: exponent of RR in the first rule, >= 0; 1. probe: the density at which the first rule asks for
    RR: ERK's of the layer ("prior"), or the whole budget's ("uniform").
    """

    unit: ClassVar[str] = "weights"
    include: Include = ()
    variant: Variant = "rr"
    rule: Rule = "prior"
    strength: float = 1.0
    probe: Probe = "prior"

    def __post_init__(self) -> None:
        refuse_parts("relative_repairability", self.include)
        refuse_unknown("relative_repairability.variant", self.variant, VARIANTS)
        refuse_rule("relative_repairability", self.rule, self.strength, self.probe)

    @property
    def needs(self) -> frozenset[str]:
        """Second moments of the layers' patches, in two halves; and an image, to see which norm follows."""
        return patches_of(self.include)

    def allocate(self, model: nn.Module, budget: Budget, context: AllocationContext) -> Allocation:
        """Weights kept in every layer; the evidence holds the curves over layers and densities."""
        return self.shared(Pool.of(model, self.include, budget, context), model, context)

    def shared(self, pool: Pool, model: nn.Module, context: AllocationContext) -> Allocation:
        """The same for a pool that is made already."""
        measure = measured(model, pool, context)
        return allocated(
            pool,
            self.rule,
            self.strength,
            self.probe,
            lambda layer, density: measure(layer, density).ratio(self.variant),
            lambda layer, density: _relative(measure(layer, density), self.variant),
            curves(pool, measure, context.report) | {"rests_on": self.variant},
        )


def patches_of(include: Include) -> frozenset[str]:
    """What an allocator needs that measures damage."""
    return frozenset({"images", "layers patches", *(f"{part} patches" for part in include)})


def refuse_rule(method: str, rule: Rule, strength: float, probe: Probe) -> None:
    """Raise MethodError unless rule and probe are known and the strength is not negative."""
    refuse_unknown(f"{method}.rule", rule, ("prior", "greedy"))
    refuse_unknown(f"{method}.probe", probe, ("prior", "uniform"))
    if not strength >= 0:
        raise MethodError(f"{method}.strength = {strength:g} must not be negative; 0 is plain ERK, 1 the default")


def measured(model: nn.Module, pool: Pool, context: AllocationContext) -> Measure:
    """The damage of masking one layer of the pool, remembered by layer and density; none where it is never called."""
    if context.images is None:
        raise ImagesError("images: one is needed to see which norm follows which layer; pass the calibration images")
    wiring = trace(model, pool.weights, next(iter(Replay(context.images, 1)))[:1])
    layers: dict[str, Layer] = {}
    known: dict[tuple[str, float], Damage] = {}

    def measure(name: str, density: float) -> Damage:
        if name not in wiring.order:
            return UNDAMAGED
        if name not in layers:
            norm = wiring.norm_after.get(name)
            weights = channel_weights(model.get_submodule(norm) if norm else None, len(pool.weights[name]))
            layers[name] = Layer(model.get_submodule(name), name, context.statistics, weights)
        if (name, density) not in known:
            known[name, density] = layers[name].damage(density)
        return known[name, density]

    return measure


def allocated(
    pool: Pool,
    rule: Rule,
    strength: float,
    probe: Probe,
    score: Callable[[str, float], float],
    loss: Callable[[str, float], float],
    evidence: dict[str, Any],
) -> Allocation:
    """By the rule: `score` modulates the prior, `loss` is what the greedy rule lowers."""
    if rule == "greedy":
        return pool.allocation(greedy(pool, loss), evidence)
    prior = pool.filled(by_shape(pool, ratio))
    asked = prior if probe == "prior" else dict.fromkeys(prior, pool.share)
    scores = {layer: score(layer, density) if density < 1 else 0.0 for layer, density in asked.items()}
    return pool.allocation(modulated(pool, prior, scores, strength), evidence | {"scores": scores})


def curves(pool: Pool, measure: Measure, report: Report = quiet) -> dict[str, Any]:
    """RR of every variant and the raw damage, over layers and the grid of densities; JSON values."""
    found = {}
    for done, layer in enumerate(pool.weights, start=1):
        found[layer] = [measure(layer, density) for density in GRID]
        report("damage", done, len(pool.weights))
    return {
        "densities": list(GRID),
        "raw_damage": {layer: [_raw(d) for d in row] for layer, row in found.items()},
        **{variant: {layer: [d.ratio(variant) for d in row] for layer, row in found.items()} for variant in VARIANTS},
    }


def _relative(found: Damage, variant: Variant) -> float:
    return found.repaired[variant] / (found.energy + 1e-30)


def _raw(found: Damage) -> float:
    return found.raw / (found.energy + 1e-30)
