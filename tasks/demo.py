"""The demo's dense model: a small ViT trained on digits, about a minute on one core, >= 97 % top-1.

This is the one place that trains with labels: it stands for the training that users have behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heal import bundle
from heal.architecture import Architecture
from heal.evaluation import predict, top1
from heal.images import generator
from tasks.classes import Classes
from tasks.data import is_held_out
from tasks.images import load_source
from tasks.preprocessing import Preprocessing

if TYPE_CHECKING:
    from tasks.progress import Progress

ARCHITECTURE = Architecture(
    "timm",
    "vit_tiny_patch16_224",
    {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 10},
)
PREPROCESSING = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize=32)

EPOCHS, BATCH_SIZE, LR, WEIGHT_DECAY, SMOOTHING = 50, 64, 2e-3, 0.05, 0.1
WARM_UP = 0.1
"""The share of steps in which the learning rate rises."""

DEGREES, SCALE, SHIFT = 12.0, 0.12, 0.15
"""Augmentation draws uniformly from plus and minus these: rotation, relative size, shift (1 is half the side)."""


def train_digits(output: Path, seed: int, progress: Progress, epochs: int = EPOCHS) -> None:
    """Train on the ids that are not held out, measure on the others, write a bundle.

    Same seed, same bits, whatever the number of threads: it takes one.
    """
    array, labels, ids = load_source("digits", PREPROCESSING, Classes(10), output.parent)
    images, held_out = array[torch.arange(len(ids))], torch.tensor([is_held_out(image) for image in ids])
    progress.log(f"trains on {int((~held_out).sum())} labelled digits, {int(held_out.sum())} are held out")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARCHITECTURE.build().train()
    with _one_thread(), progress.track("training", epochs) as advance:
        for _ in _epochs(model, images[~held_out], labels[~held_out], epochs, generator(seed, "digits training")):
            advance(1)
    accuracy = top1(predict(model.eval(), images[held_out]), labels[held_out])
    progress.log(f"top-1 on held-out digits {accuracy:.3f}")
    metadata = {
        "class_names": [str(digit) for digit in range(10)],
        "preprocessing": PREPROCESSING.described(),
        "metrics": {"top1": accuracy},
    }
    bundle.save(model, output, architecture=ARCHITECTURE, metadata=metadata)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For tensors this small a second thread gains nothing, and on a busy machine its waiting costs tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _epochs(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, random: torch.Generator) -> Iterator[None]:
    """Train in place: AdamW, cosine with warm-up, clipped gradients; yields after every epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    steps = epochs * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_lr(step, steps))
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=random)[: len(images) // BATCH_SIZE * BATCH_SIZE]
        for chosen in order.view(-1, BATCH_SIZE):
            logits = model(augmented(images[chosen], random))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        yield


def augmented(images: Tensor, random: torch.Generator) -> Tensor:
    """Every image turned, scaled and shifted a little, by bilinear sampling; [n, 3, height, width]."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(len(images), *shape, generator=random) * 2 - 1

    angle, scale = draw() * math.radians(DEGREES), 1 + draw() * SCALE
    matrix = torch.zeros(len(images), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = angle.cos() * scale
    matrix[:, 1, 0] = angle.sin() * scale
    matrix[:, 0, 1] = -matrix[:, 1, 0]
    matrix[:, :, 2] = draw(2) * SHIFT
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _share_of_lr(step: int, steps: int) -> float:
    rising = min(1.0, (step + 1) / (WARM_UP * steps))
    return rising * 0.5 * (1 + math.cos(math.pi * step / steps))
