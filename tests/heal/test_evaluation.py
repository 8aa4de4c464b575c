"""Logits, top-1 and agreement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from heal.errors import ArchitectureError, ImagesError, NumericalError
from heal.evaluation import agreement, predict, top1
from tests.heal.nets import CLASSES, build, images


def test_predictions_do_not_depend_on_how_images_are_batched() -> None:
    model, pictures = build("resnet"), images(7)
    whole = predict(model, pictures)
    assert whole.shape == (7, CLASSES) and whole.dtype == torch.float32 and not whole.requires_grad
    for batched in (predict(model, pictures, batch_size=3), predict(model, list(pictures.split(2)))):
        torch.testing.assert_close(batched, whole, rtol=1e-5, atol=1e-5)


def test_the_model_gets_its_modes_and_statistics_back() -> None:
    model = build("resnet").train()
    model.layer1.eval()  # type: ignore[union-attr]
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predict(model, images())
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_half_precision_model_answers_in_float32() -> None:
    logits = predict(build("vit").bfloat16(), images())
    assert logits.dtype == torch.float32


class Answers(nn.Module):
    """A network that always gives the same answer."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer


def test_what_is_not_logits_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=r"\[4, 2, 2\]"):
        predict(Answers(torch.zeros(4, 2, 2)), images())
    with pytest.raises(ArchitectureError, match="tuple"):
        predict(Answers((torch.zeros(4, 2),)), images())
    with pytest.raises(NumericalError, match="1 of 4 images"):
        predict(Answers(torch.tensor([[0.0, 1], [float("nan"), 0], [0, 0], [1, 0]])), images())
    with pytest.raises(ImagesError, match="none to predict"):
        predict(Answers(torch.zeros(4, 2)), [])


def test_top1_and_agreement_are_shares() -> None:
    a = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    b = torch.tensor([[9.0, 0], [0, 9], [0, 9], [9, 0]])
    assert top1(a, torch.tensor([0, 0, 1, 0])) == 0.75
    assert agreement(a, b) == agreement(b, a) == 0.5
    assert agreement(a, 3 * a) == 1.0


def test_counts_that_do_not_match_are_refused() -> None:
    logits = torch.zeros(3, 2)
    with pytest.raises(ImagesError, match="one label an image"):
        top1(logits, torch.zeros(2))
    with pytest.raises(ImagesError, match="one label an image"):
        top1(logits[:0], torch.zeros(0))
    with pytest.raises(ImagesError, match="do not compare"):
        agreement(logits, torch.zeros(3, 4))
