"""What each output position of a layer reads: a convolution seen as a matrix product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def patches(layer: nn.Module, value: Tensor) -> Tensor:
    """`(batch, groups, inputs, positions)` of the input of a linear layer, `Conv1d` or `Conv2d`."""
    if isinstance(layer, nn.Linear):
        return value.reshape(value.shape[0], -1, value.shape[-1]).mT.unsqueeze(1)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    before_after = [0, 0] * len(kernel)
    if layer.padding == "same" or type(layer).__name__.endswith("Same"):  # timm's Conv2dSame pads by size
        for i, size in enumerate(reversed(value.shape[2:])):
            k, s, d = (t[len(kernel) - 1 - i] for t in (kernel, stride, dilation))
            total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            before_after[2 * i : 2 * i + 2] = [total // 2, total - total // 2]
    elif not isinstance(layer.padding, str):
        before_after = [p for p in reversed(layer.padding) for _ in range(2)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(value, before_after, mode=mode)
    if len(kernel) == 1:
        padded, kernel, stride, dilation = padded.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(padded, kernel, dilation=dilation, stride=stride)
    return columns.reshape(len(columns), layer.groups, -1, columns.shape[-1])


def some_of(positions: int, most: int) -> Tensor | slice:
    """Which positions to look at: all of them, or `most` drawn ones in their order, the same ones at each call."""
    if positions <= most:
        return slice(None)
    drawn = torch.randperm(positions, generator=torch.Generator().manual_seed(0))
    return drawn[:most].sort().values
