"""Where to prune: the name in params.yaml to its class."""

from heal.allocators.global_variance import GlobalVariance
from heal.allocators.uniform import Uniform
from heal.method import Allocator

ALLOCATORS: dict[str, type[Allocator]] = {
    "global_variance": GlobalVariance,
    "uniform": Uniform,
}
