"""Training in bfloat16 on a CPU goes without fused attention, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heal.compat import timm
from heal.errors import NumericalError
from heal.images import Replay
from heal.method import HealContext
from heal.modes import without_fused_attention
from heal.training import UNFUSED_TOKENS, Precision, Schedule, Step, Training, fit
from heal.values import Mask
from tests.heal import nets

Loss = Callable[[Step, Tensor], Tensor]


def is_fused(output: Tensor) -> bool:
    """Whether a fused kernel of attention took part in it."""

    def walk(node: Any, seen: set[Any]) -> Iterator[str]:
        if node is not None and node not in seen:
            seen.add(node)
            yield node.name()
            for behind, _ in node.next_functions:
                yield from walk(behind, seen)

    return any("ScaledDotProduct" in name for name in walk(output.grad_fn, set()))


def trained(student: nn.Module, images: Tensor, precision: Precision, loss: Loss | None = None) -> tuple[float, ...]:
    def mean_square(step: Step, batch: Tensor) -> Tensor:
        value: Tensor = student(batch).float().square().mean()
        return value

    schedule = Schedule(2, 1e-3, 0.0, precision)
    trainable = dict(student.named_parameters())
    training = Training("test", lambda _: Replay(images, 4), loss or mean_square, trainable, schedule)
    return fit(student, training, HealContext(pruned=Mask({})))


def flags(model: nn.Module) -> list[bool]:
    return [module.fused_attn for module in model.modules() if isinstance(getattr(module, "fused_attn", None), bool)]


@pytest.mark.parametrize(("precision", "fused"), [("float32", True), ("bfloat16", False)])
def test_only_what_trains_in_bfloat16_goes_without(precision: Precision, fused: bool) -> None:
    student, found = nets.build("vit"), list[bool]()

    def loss(step: Step, batch: Tensor) -> Tensor:
        value: Tensor = student(batch).float().square().mean()
        found.append(is_fused(value))
        return value

    trained(student, nets.images(4), precision, loss)
    assert found == [fused, fused] and flags(student) == [True] * 3


def test_flags_come_back_after_a_failure_and_off_stays_off() -> None:
    student = nets.build("vit")
    student.get_submodule("blocks.1.attn").fused_attn = False  # type: ignore[assignment]
    with pytest.raises(NumericalError):
        trained(student, nets.images(4), "bfloat16", lambda step, batch: student(batch).sum() * torch.nan)
    assert flags(student) == [True, False, True]


@pytest.mark.parametrize("net", ["vit", "swin", "swinv2"])
def test_written_out_it_gives_what_the_fused_kernel_gives(net: str) -> None:
    model, images = nets.build(net), nets.images(3)
    wanted = model(images)
    with without_fused_attention(model):
        found = model(images)
    assert not is_fused(found)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_it_rounds_about_as_much() -> None:
    model, images = nets.build("vit"), nets.images(16)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            fused = model(images)
            with without_fused_attention(model):
                ours = model(images)
    errors = [float((answer.float() - exact).norm() / exact.norm()) for answer in (fused, ours)]
    assert 0 < errors[1] < 2 * errors[0]


def test_long_sequences_stay_fused() -> None:
    attention = timm.layers.Attention(8, num_heads=2)
    with without_fused_attention(attention, UNFUSED_TOKENS):
        assert is_fused(attention(torch.randn(1, UNFUSED_TOKENS + 1, 8)))
        assert not is_fused(attention(torch.randn(1, UNFUSED_TOKENS, 8)))


def test_blocks_that_are_computed_again_for_the_gradient_are_computed_alike() -> None:
    plain = nets.build("vit")
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing(True)  # type: ignore[operator]
    images = nets.images(8)
    assert trained(checkpointed, images, "bfloat16") == trained(plain, images, "bfloat16")
