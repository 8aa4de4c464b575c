"""The demo's training: reproducible, on the training side only, good enough to be worth compressing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heal import bundle
from heal.families.lookup import describe
from tasks import data, demo
from tasks.progress import Progress


def test_the_same_seed_gives_the_same_bundle(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for name, seed in (("1", 0), ("2", 0), ("3", 1)):
        demo.train_digits(tmp_path / name, seed, Progress(tmp_path), epochs=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    digests = [bundle.digest(tmp_path / name) for name in "123"]
    assert digests[0] == digests[1] != digests[2]


def test_augmentation_keeps_the_form_and_moves_the_pixels() -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = demo.augmented(images, torch.Generator().manual_seed(1))
    assert moved.shape == images.shape
    assert not torch.equal(moved, images)
    assert torch.equal(moved, demo.augmented(images, torch.Generator().manual_seed(1)))


def test_the_architecture_has_neurons_to_cut() -> None:
    family = describe(demo.ARCHITECTURE.build())
    assert (family.name, len(family.pairs)) == ("vit", 4)


@pytest.mark.slow
def test_the_demo_model_is_good_on_digits_it_has_not_seen(tmp_path: Path) -> None:
    demo.train_digits(tmp_path / "bundle", 0, Progress(tmp_path))
    described = bundle.read(tmp_path / "bundle")
    assert described["metrics"]["top1"] >= 0.97
    assert described["preprocessing"] == demo.PREPROCESSING.described()
    assert len(data.for_evaluation("digits", shared=True)[1]) == 402
