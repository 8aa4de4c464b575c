"""Attention of a training step in bfloat16 on a CPU: the same as the fused function's, by other kernels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heal.attention import LONGEST, TrainedWrittenOut
from heal.images import Replay
from heal.method import HealContext
from heal.training import Precision, Schedule, Step, Training, fit
from heal.values import Mask
from tests.heal import nets

TOKENS = 7


def _heads(tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, 3, tokens, 4, dtype=dtype, requires_grad=True) for _ in range(3)]


def _kernels(output: Tensor) -> set[str]:
    """The names of all that made it."""

    def walk(node: Any, seen: set[Any]) -> Iterator[str]:
        if node is not None and node not in seen:
            seen.add(node)
            yield node.name()
            for behind, _ in node.next_functions:
                yield from walk(behind, seen)

    return set(walk(output.grad_fn, set()))


def _is_fused(output: Tensor) -> bool:
    return any("ScaledDotProduct" in name for name in _kernels(output))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()},
        {"attn_mask": torch.linspace(-2, 2, TOKENS * TOKENS, dtype=torch.float64).view(TOKENS, TOKENS)},
    ],
    ids=["plain", "scale", "causal", "mask", "bias"],
)
def test_written_out_it_gives_what_torch_gives(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads, weight = _heads(), torch.randn(2, 3, TOKENS, 4, dtype=torch.float64)
    fused = F.scaled_dot_product_attention(*heads, **options)
    with TrainedWrittenOut():
        ours = F.scaled_dot_product_attention(*heads, **options)
    assert not _is_fused(ours)
    torch.testing.assert_close(ours, fused)
    wanted, found = (torch.autograd.grad(output, heads, weight) for output in (fused, ours))
    torch.testing.assert_close(found, wanted)


def test_long_sequences_dropout_and_shared_keys_stay_torchs() -> None:
    shared = [torch.randn(2, heads, TOKENS, 4, requires_grad=True) for heads in (4, 2, 2)]
    with TrainedWrittenOut():
        assert _is_fused(F.scaled_dot_product_attention(*_heads(LONGEST + 1, torch.float32)))
        assert not _is_fused(F.scaled_dot_product_attention(*_heads(LONGEST, torch.float32)))
        assert F.scaled_dot_product_attention(*shared, enable_gqa=True).shape == (2, 4, TOKENS, 4)
        dropped = F.scaled_dot_product_attention(*_heads(), dropout_p=1.0)
    assert not dropped.any()


def test_only_what_trains_in_bfloat16_is_written_out() -> None:
    model, images = nets.build("vit"), nets.images(4)
    fused: list[bool] = []

    def loss(step: Step, batch: Tensor) -> Tensor:
        value: Tensor = student(batch).float().square().mean()
        fused.append(_is_fused(value))
        return value

    for precision in ("float32", "bfloat16"):
        student = copy.deepcopy(model)
        _train(student, images, loss, precision)
    assert fused == [True, False]


def _train(student: nn.Module, images: Tensor, loss: Any, precision: Precision) -> None:
    schedule = Schedule(1, 1e-4, 0.0, precision)
    training = Training("test", lambda _: Replay(images, 4), loss, dict(student.named_parameters()), schedule)
    fit(student, training, HealContext(pruned=Mask({})))
