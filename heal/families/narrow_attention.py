"""What timm's attention becomes when heads lose dimensions: queries and keys of one width, values of another.

timm's own takes all three to be equally wide, and scales by the width that it finds; a cut must leave the scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NarrowAttention(nn.Module):
    """Computes as the attention that it is made of, with its layers under their names and with its scale.

    Takes a plain attention (no norm of queries and keys, no gate). How wide queries and keys are follows from the
    layers: qkv has rows for both and for the values, proj a column for each value.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.head_dim: int = attention.head_dim
        self.attn_dim: int = attention.proj.in_features
        self.scale: float = attention.scale
        self.fused_attn: bool = attention.fused_attn
        self.qkv: nn.Linear = attention.qkv
        self.attn_drop: nn.Dropout = attention.attn_drop
        self.proj: nn.Linear = attention.proj
        self.proj_drop: nn.Dropout = attention.proj_drop
        self.training = attention.training

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens [n, tokens, width] to the same. attn_mask: bool (True may be seen) or added to the scores."""
        values = self.proj.in_features
        keys = (self.qkv.out_features - values) // 2
        q, k, v = (self._by_head(part) for part in self.qkv(x).split((keys, keys, values), dim=-1))
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            x = _fused(q, k, v, attn_mask, dropout, is_causal, self.scale)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(_masked(scores, attn_mask, is_causal).softmax(dim=-1)) @ v
        output: Tensor = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        return output

    def _by_head(self, part: Tensor) -> Tensor:
        return part.view(*part.shape[:2], self.num_heads, -1).transpose(1, 2)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, is_causal: bool, scale: float
) -> Tensor:
    """The fast kernels want one width, so the narrower side gets zeros: on a CPU two thirds of the time without."""
    width = max(q.shape[-1], v.shape[-1])
    x = F.scaled_dot_product_attention(
        _widened(q, width), _widened(k, width), _widened(v, width), mask, dropout, is_causal, scale=scale
    )
    return x[..., : v.shape[-1]]


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
