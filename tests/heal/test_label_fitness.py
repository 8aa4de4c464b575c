"""The one search that may read labels: it finds what is right by them, and refuses what it cannot judge by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import heal
from heal.allocators.evolutionary import Evolutionary
from heal.allocators.sequence import Sequence
from heal.allocators.trial import Trial
from heal.errors import ImagesError, MethodError
from heal.images import Images
from heal.method import AllocationContext
from heal.values import Budget
from tests.heal import nets
from tests.heal.judged import ALL, pool_of

SMALL: Any = {"population": 8, "generations": 3, "parents": 3, "images": 64, "batch_size": 16}
CHANNELS = 16
LOUDNESS = {"loud": 1.0, "low": 0.8}


class TwoVoices(nn.Module):
    """Each layer reads half of the channels and votes for a class; whoever has more weights left is heard, of equals
    the loud one."""

    def __init__(self) -> None:
        super().__init__()
        self.loud = nn.Conv2d(CHANNELS, 2, 1, bias=False)
        self.low = nn.Conv2d(CHANNELS, 2, 1, bias=False)
        spread = 1 + 0.01 * torch.arange(CHANNELS, 0, -1.0)
        for name, factor in LOUDNESS.items():
            weight = self.get_submodule(name).get_parameter("weight")
            weight.data = factor * torch.stack([spread, -spread]).view_as(weight)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = (self.loud(x[:, :CHANNELS]) + self.low(x[:, CHANNELS:])).flatten(1)
        return logits


def voices() -> tuple[nn.Module, Tensor, Tensor]:
    """A network in which the loud layer is wrong on half of the images, those images, and the classes, which the low
    layer always says."""
    loud, low = (torch.tensor(signs).repeat(16) for signs in ([1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]))
    images = torch.cat([sign[:, None].expand(-1, CHANNELS) for sign in (loud, low)], 1)[:, :, None, None]
    return TwoVoices().eval(), images.contiguous(), (low < 0).long()


def by_hand(kept: dict[str, int], images: Tensor) -> np.ndarray:
    """The logits of the masked network, in numpy."""
    spread = 1 + 0.01 * np.arange(CHANNELS, 0, -1.0)
    halves = {"loud": images[:, :CHANNELS, 0, 0].numpy(), "low": images[:, CHANNELS:, 0, 0].numpy()}
    logits = np.zeros((len(images), 2))
    for name, seen in halves.items():
        rows = np.stack([spread, -spread]) * LOUDNESS[name]
        order = np.argsort(-np.abs(rows).ravel(), kind="stable")
        rows.ravel()[order[kept[name] :]] = 0
        logits += seen @ rows.T
    return logits


def worth(kept: dict[str, int], images: Tensor, labels: Tensor) -> tuple[float, float]:
    """(top-1, minus KL(dense || masked)), in numpy."""
    dense, masked = by_hand(dict.fromkeys(kept, 2 * CHANNELS), images), by_hand(kept, images)
    log_p, log_q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (dense, masked))
    right = float((masked.argmax(1) == labels.numpy()).mean())
    return right, -float((np.exp(log_p) * (log_p - log_q)).sum(1).mean())


def search(
    fitness: str, labels: Tensor | None, images: Images | None = None, **context: Any
) -> tuple[heal.values.Allocation, list[str]]:
    model, own, _ = voices()
    said: list[str] = []
    method = Evolutionary(fitness=fitness, extra=0.5, include=ALL, **SMALL)  # type: ignore[arg-type]
    given = AllocationContext(images=own if images is None else images, labels=labels, log=said.append, **context)
    return method.allocate(model, Budget(weights=0.5), given), said


def test_each_fitness_finds_what_is_right_by_it() -> None:
    _, images, labels = voices()
    agreeing, said = search("agreement", labels)
    assert worth(dict(agreeing.kept), images, labels)[0] == 0.5, "like the dense network, and as often wrong"
    assert "labels" not in agreeing.evidence and not any("labels" in line for line in said)
    right, said = search("labels", labels)
    assert right.got == right.asked == agreeing.got
    assert right.evidence["labels"] is True and said[0].startswith("labels of 64 calibration images are read")
    assert "generation 3 of 3: labels best 1.0000" in said[-1]
    assert right.evidence["fitness"] == pytest.approx(list(worth(dict(right.kept), images, labels)))
    assert right.evidence["fitness"][0] == 1 > right.evidence["constant"][0] == 0.5
    assert search("labels", 1 - labels)[0].evidence["fitness"][0] == 0.5, "the low layer is now always wrong"


def test_a_trial_by_labels_is_top_1_and_equal_ones_are_ranked_by_divergence() -> None:
    model, images, labels = voices()
    trial = Trial(model, pool_of(model, Budget(weights=0.5)).weights, images, 16, labels, "cumulative")
    judged = {}
    for loud in range(2 * CHANNELS + 1):
        kept = {"loud": loud, "low": 2 * CHANNELS - loud}
        judged[loud] = trial.fitness(kept)
        assert judged[loud] == pytest.approx(worth(kept, images, labels), abs=1e-6)
    assert {top1 for top1, _ in judged.values()} >= {0.5, 1.0}
    perfect = {loud: near for loud, (top1, near) in judged.items() if top1 == 1}
    assert max(judged, key=lambda loud: judged[loud]) == max(perfect, key=lambda loud: perfect[loud])
    assert len(set(perfect.values())) == len(perfect) > 1


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_by_the_dense_networks_own_answers_labels_are_agreement(name: str) -> None:
    dense, images = nets.build(name), nets.images(12)
    pool = pool_of(dense, Budget(weights=0.5))
    kept = pool.allocation(dict.fromkeys(pool.weights, 0.5)).kept
    with torch.no_grad():
        answers = dense(images).argmax(1)
    by_labels = Trial(dense, pool.weights, images, 4, answers, "cumulative").fitness(kept)
    assert by_labels == Trial(dense, pool.weights, images, 4, "agreement", "cumulative").fitness(kept)


def test_only_the_labels_of_the_images_that_judge_count() -> None:
    _, images, labels = voices()
    more = torch.cat([images, images]), torch.cat([labels, 1 - labels])
    assert search("labels", more[1], more[0])[0] == search("labels", labels)[0]
    batches = list(more[0].split(24))
    assert search("labels", more[1], batches)[0] == search("labels", labels)[0]


def test_a_search_by_another_fitness_is_not_resumed(tmp_path: Path) -> None:
    _, _, labels = voices()
    search("agreement", None, checkpoints=tmp_path)
    found, said = search("labels", labels, checkpoints=tmp_path)
    assert "checkpoint evolutionary.safetensors is of another search: starting anew" in said
    assert found == search("labels", labels)[0]
    resumed, said = search("labels", labels, checkpoints=tmp_path)
    assert resumed == found and "resuming after generation 3" in said
    assert any("are read" in line for line in said), "they are read again"


def test_only_the_fitness_by_labels_needs_them_and_says_so_without() -> None:
    assert Evolutionary(fitness="labels").needs == {"images", "labels"}
    assert Evolutionary().needs == Evolutionary(fitness="kl").needs == {"images"}
    with pytest.raises(ImagesError, match=r"evolutionary\.fitness = 'labels' reads .* given none; give its context"):
        search("labels", None)
    with pytest.raises(MethodError, match=r"sequence\.fitness = 'labels' is unknown"):
        Sequence(fitness="labels")  # type: ignore[arg-type]
    method, budget = Evolutionary(fitness="labels"), Budget(weights=0.5)
    with pytest.raises(MethodError, match="allocator evolutionary reads labels, and recompress takes none"):
        heal.recompress(nets.build("vit"), nets.images(2), budget, method, "magnitude", ["none"])


def test_labels_that_do_not_fit_are_refused() -> None:
    _, images, labels = voices()
    with pytest.raises(ImagesError, match=r"labels \[63\] do not fit images \[64, 32, 1, 1\]"):
        search("labels", labels[1:])
    with pytest.raises(ImagesError, match="one label an image"):
        search("labels", labels[1:], list(images.split(16)))
    for strange in (-1, 2):
        wrong = labels.clone()
        wrong[5] = strange
        with pytest.raises(ImagesError, match=rf"that of image 5 is {strange}, but the network has 2 classes, 0 to 1"):
            search("labels", wrong)
