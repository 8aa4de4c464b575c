"""What a network costs: weights, multiply-accumulates, measured seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heal.errors import ImagesError, InputError
from heal.modes import evaluating, listening, without_fused_attention


def parameters(model: nn.Module) -> int:
    """How many numbers the parameters hold; shared ones count once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def nonzeros(model: nn.Module) -> int:
    """How many of them are not zero."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def macs(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-accumulates of one image of `input_size` (channels, height, width).

    Counted: every convolution and every matrix product, so Linear layers and both products of
    attention (queries by keys, weights by values). Not counted: additions of biases, norms,
    activations, softmax, pooling. Zeros count like any other weight: only cuts lower the number.
    """
    like = next(model.parameters())
    image = torch.zeros(1, *input_size, device=like.device, dtype=like.dtype)
    counter = FlopCounterMode(display=False)
    # Fused attention has no formula on every device, and a NarrowAttention fills up with zeros what such a kernel wants
    # as wide as the rest; written out it is two matrix products anywhere.
    sdpa = sdpa_kernel(SDPBackend.MATH)
    with evaluating(model), torch.no_grad(), sdpa, _without_fused_encoder(), without_fused_attention(model), counter:
        model(image)
    return int(counter.get_total_flops()) // 2


def uses(model: nn.Module, layers: Iterable[str], image: Tensor) -> dict[str, int]:
    """How often each weight of a layer multiplies for one image [1, c, h, w]: the positions of its output.

    Times its number of weights that is the layer's MACs. A layer that is never called has 0.
    """
    found = dict.fromkeys(layers, 0)

    def counter(layer: str) -> Callable[[Tensor], None]:
        axis = 1 if isinstance(model.get_submodule(layer), nn.Conv2d) else -1

        def count(output: Tensor) -> None:
            found[layer] += output.numel() // output.shape[axis]

        return count

    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode(), listening(model, {f"{la}.output": counter(la) for la in found}):
        model(image.to(device))
    return found


@dataclass(frozen=True)
class Latency:
    """Seconds a forward pass takes: the median and the quartiles of `runs` measurements."""

    median: float
    low: float
    high: float
    runs: int


def latency(models: Mapping[str, nn.Module], images: Tensor, rounds: int = 30, warmup: int = 3) -> dict[str, Latency]:
    """Measured seconds of one forward pass over `images` [n, 3, h, w], for every model side by side.

    The models take turns in one process and the order turns around each round, so what disturbs the
    machine disturbs all alike; the `warmup` rounds are not counted. Eval mode, no gradients, each model
    on its own device (waited for); every model gets its mode back.
    """
    if rounds < 1 or warmup < 0:
        raise InputError(f"latency: rounds = {rounds}, warmup = {warmup}; give at least one round and no negative one")
    if images.ndim != 4 or len(images) == 0:
        raise ImagesError(f"latency: images {list(images.shape)} are not a non-empty [n, channels, height, width]")
    seconds: dict[str, list[float]] = {name: [] for name in models}
    inputs = {name: images.to(next(model.parameters())) for name, model in models.items()}
    with ExitStack() as modes, torch.inference_mode():
        for model in models.values():
            modes.enter_context(evaluating(model))
        for turn in range(-warmup, rounds):
            for name in _order(list(models), turn):
                taken = _seconds(models[name], inputs[name])
                if turn >= 0:
                    seconds[name].append(taken)
    return {name: _summary(measured) for name, measured in seconds.items()}


def _order(names: list[str], turn: int) -> list[str]:
    return names if turn % 2 == 0 else names[::-1]


def _seconds(model: nn.Module, images: Tensor) -> float:
    _wait(images.device)
    start = time.perf_counter()
    model(images)
    _wait(images.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(seconds: list[float]) -> Latency:
    low, median, high = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double())
    return Latency(median=float(median), low=float(low), high=float(high), runs=len(seconds))


@contextmanager
def _without_fused_encoder() -> Iterator[None]:
    """torch's own encoder layers skip their matrix products in eval mode for one fused, uncounted call."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
