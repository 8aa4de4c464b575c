"""What a layer multiplies its weight with: its input rows, or the patches that a convolution sees."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def patches(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """Columns [n, groups, d, positions] of the layer's input; d is the width of a row of its flattened weight.

    weight [out, d] times the columns (each group's rows with its own columns) is the output without bias.
    Padding is in them, as the layer pads.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1]).transpose(1, 2).unsqueeze(1)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    x = F.pad(x, _margins(layer, x), "constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    if kernel == (1, 1):
        columns = x[..., :: stride[0], :: stride[1]].flatten(2)
    else:
        columns = F.unfold(x, kernel, dilation=dilation, stride=stride)
    return columns.reshape(len(x), layer.groups, -1, columns.shape[-1])


def _margins(layer: nn.Conv2d, x: Tensor) -> tuple[int, int, int, int]:
    """Pixels to add: left, right, top, bottom."""
    if type(layer).__name__ == "Conv2dSame":  # timm's copy of TensorFlow's padding, which depends on the size
        top, bottom = _same(layer, x, 0)
        left, right = _same(layer, x, 1)
        return left, right, top, bottom
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    return left, right, top, bottom


def _same(layer: nn.Conv2d, x: Tensor, axis: int) -> tuple[int, int]:
    size, stride = x.shape[2 + axis], layer.stride[axis]
    reach = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
    total = max((-(-size // stride) - 1) * stride + reach - size, 0)
    return total // 2, total - total // 2
