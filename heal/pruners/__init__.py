"""Which weights or channels go: the name in params.yaml to its class."""

from heal.method import Pruner
from heal.pruners.depth import Depth
from heal.pruners.filter_norm import FilterNorm
from heal.pruners.magnitude import Magnitude
from heal.pruners.none import NoPruning
from heal.pruners.obs import Obs
from heal.pruners.snip import Snip
from heal.pruners.variance import Variance
from heal.pruners.wanda import Wanda

PRUNERS: dict[str, type[Pruner]] = {
    "depth": Depth,
    "filter_norm": FilterNorm,
    "magnitude": Magnitude,
    "none": NoPruning,
    "obs": Obs,
    "snip": Snip,
    "variance": Variance,
    "wanda": Wanda,
}
