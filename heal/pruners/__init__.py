"""Which weights or channels go: the name in params.yaml to its class."""

from heal.method import Pruner
from heal.pruners.magnitude import Magnitude
from heal.pruners.none import NoPruning
from heal.pruners.variance import Variance

PRUNERS: dict[str, type[Pruner]] = {
    "magnitude": Magnitude,
    "none": NoPruning,
    "variance": Variance,
}
