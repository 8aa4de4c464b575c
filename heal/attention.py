"""Attention written out, as two products and a softmax: where a fused kernel cannot serve, or is the slower way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LONGEST = 768
"""Tokens; beyond some thousand the fused kernel is as fast, and written out the weights take memory by their square."""


def weights(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Softmax of the scaled products of q and k [..., tokens, width]: [..., tokens of q, tokens of k].

    mask: of bool (True may be seen), or added to the products.
    """
    scores = (q * scale) @ k.transpose(-2, -1)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1)


class TrainedWrittenOut(TorchFunctionMode):
    """While this is on, attention that gradients flow through is written out; torch's own function is for the rest.

    In bfloat16 a CPU's fused kernel goes backwards so slowly that a step of training takes a quarter longer
    (benchmarks/cost.py; torch 2.13); what it computes is the same.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Every function of torch passes here."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and torch.is_grad_enabled():
            return _written_out(*args, **kwargs)
        return func(*args, **kwargs)


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scaled_dot_product_attention, by itself where it is long, drops or shares keys among heads."""
    if dropout_p or enable_gqa or max(query.shape[-2], key.shape[-2]) > LONGEST:
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    by = query.shape[-1] ** -0.5 if scale is None else scale
    return weights(query, key, attn_mask, is_causal, by) @ value
