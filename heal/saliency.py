"""How much the loss feels a channel: the first-order change when it is set to zero.

Source: SNIP (Lee et al., arXiv 1810.02340), |sum of w dL/dw| over the weights of a unit, which at its consumer is
|sum of h dL/dh| over images and positions. The loss is cross-entropy. SNIP reads labels; here the class that the
network itself answers takes their place (ours: at a trained network the divergence from its own answer has no
gradient, so some target must be named).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heal.families.discovery import channel_axis
from heal.images import Images, Replay
from heal.modes import evaluating
from heal.progress import Report, quiet
from heal.values import LayerStats


def saliencies(
    model: nn.Module, images: Images, consumers: Iterable[str], batch_size: int, report: Report = quiet
) -> dict[str, LayerStats]:
    """Of every consumer's input the mean [channels] of h dL/dh over images (summed over positions), by
    "<consumer>.saliency"; it may be negative. Variances are not taken: m2 is zero."""
    totals: dict[str, Tensor] = {}
    replay, count = Replay(images, batch_size), 0
    device = next(model.parameters()).device
    with evaluating(model):
        for done, batch in enumerate(replay, start=1):
            for name, found in _of_batch(model, batch.to(device), tuple(consumers)).items():
                totals[name] = totals.get(name, torch.zeros_like(found)) + found
            count += len(batch)
            report("saliency", done, len(replay))
    means = {f"{name}.saliency": (total / count).cpu() for name, total in totals.items()}
    return {tap: LayerStats(count, mean, torch.zeros_like(mean), images=count) for tap, mean in means.items()}


def _of_batch(model: nn.Module, images: Tensor, consumers: tuple[str, ...]) -> dict[str, Tensor]:
    """Sums [channels] in float64 over the batch; a layer that is called several times adds up."""
    seen: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Any:
        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            x = x.view_as(x)  # of its own, so that what others that read the same tensor feel is not counted here
            seen.append((name, x))
            return (x, *args[1:])

        return enter

    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in consumers]
    try:
        with torch.enable_grad():
            logits = model(images)
            loss = F.cross_entropy(logits, logits.detach().argmax(-1), reduction="sum")
            gradients = torch.autograd.grad(loss, [x for _, x in seen])
    finally:
        for handle in handles:
            handle.remove()
    sums: dict[str, Tensor] = {}
    for (name, x), gradient in zip(seen, gradients, strict=True):
        felt = (x.detach() * gradient).movedim(channel_axis(model.get_submodule(name)), -1)
        found = felt.double().flatten(0, -2).sum(0)
        sums[name] = sums.get(name, torch.zeros_like(found)) + found
    return sums
