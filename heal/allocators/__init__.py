"""Where to prune: the name in params.yaml to its class."""

from heal.allocators.depth import Depth
from heal.allocators.erk import Erk
from heal.allocators.erk_capped import ErkCapped
from heal.allocators.evolutionary import Evolutionary
from heal.allocators.filter_norm import FilterNorm
from heal.allocators.global_magnitude import GlobalMagnitude
from heal.allocators.global_variance import GlobalVariance
from heal.allocators.l2_normalised import L2Normalised
from heal.allocators.lamp import Lamp
from heal.allocators.n_of_m import NOfM
from heal.allocators.projection_forced import ProjectionForced
from heal.allocators.raw_damage import RawDamage
from heal.allocators.relative_repairability import RelativeRepairability
from heal.allocators.sequence import Sequence
from heal.allocators.snip import Snip
from heal.allocators.uniform import Uniform
from heal.allocators.uniform_plus import UniformPlus
from heal.method import Allocator

ALLOCATORS: dict[str, type[Allocator]] = {
    "depth": Depth,
    "erk": Erk,
    "erk_capped": ErkCapped,
    "evolutionary": Evolutionary,
    "filter_norm": FilterNorm,
    "global_magnitude": GlobalMagnitude,
    "global_variance": GlobalVariance,
    "l2_normalised": L2Normalised,
    "lamp": Lamp,
    "n_of_m": NOfM,
    "projection_forced": ProjectionForced,
    "raw_damage": RawDamage,
    "relative_repairability": RelativeRepairability,
    "sequence": Sequence,
    "snip": Snip,
    "uniform": Uniform,
    "uniform_plus": UniformPlus,
}
