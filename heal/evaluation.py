"""What a network answers, and how often two answers are the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heal.errors import ArchitectureError, ImagesError, NumericalError
from heal.images import Images, Replay
from heal.modes import evaluating
from heal.progress import Report, quiet


def predict(model: nn.Module, images: Images, batch_size: int = 64, report: Report = quiet) -> Tensor:
    """Logits [n, classes], float32 on the CPU, in the order of the images.

    The model runs in eval mode, without gradients, on its own device and in its own dtype, and gets
    its mode back. Raises ImagesError when there are no images, NumericalError on NaN or infinity.
    """
    with evaluating(model), torch.inference_mode():
        replay, answers = Replay(images, batch_size), []
        total = len(replay)
        for batch in replay:
            answers.append(_logits(model, batch))
            report("prediction", len(answers), total)
    if not answers:
        raise ImagesError("images: none to predict; pass at least one batch")
    logits = torch.cat(answers)
    spoiled = int((~torch.isfinite(logits)).any(dim=1).sum())
    if spoiled:
        raise NumericalError(f"the logits of {spoiled} of {len(logits)} images are not finite; check the weights")
    return logits


def top1(logits: Tensor, labels: Tensor) -> float:
    """The share of images in [0, 1] whose highest logit [n, classes] is their label [n]."""
    if labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ImagesError(f"labels {list(labels.shape)} do not fit logits {list(logits.shape)}: one label an image")
    return _share(logits.argmax(dim=1).cpu() == labels.cpu())


def agreement(logits_a: Tensor, logits_b: Tensor) -> float:
    """The share of images in [0, 1] to which two networks give the same class; both logits [n, classes]."""
    if logits_a.shape != logits_b.shape or len(logits_a) == 0:
        raise ImagesError(
            f"logits {list(logits_a.shape)} and {list(logits_b.shape)} do not compare: "
            "both networks must answer the same images with the same classes"
        )
    return _share(logits_a.argmax(dim=1).cpu() == logits_b.argmax(dim=1).cpu())


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    logits = model(batch if weight is None else batch.to(weight))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ArchitectureError(f"{type(model).__name__} answers {found}, not logits [n, classes]; pass a classifier")
    return logits.float().cpu()


def _share(hits: Tensor) -> float:
    return int(hits.count_nonzero()) / len(hits)
