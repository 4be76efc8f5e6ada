"""What each output position of a layer reads: a convolution seen as a matrix product."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def channel_axis(module: nn.Module) -> int:
    """Where a layer's channels lie in its input and output."""
    channels_first = isinstance(module, (_ConvNd, _NormBase, nn.GroupNorm, nn.PReLU))
    return 1 if channels_first or type(module).__name__.endswith("2d") else -1  # timm: LayerNorm2d, LayerScale2d


def patches(layer: nn.Module, value: Tensor, size: tuple[int, ...] = ()) -> Tensor:
    """`(batch, groups, inputs, positions)` of the input of a linear layer or a convolution, transposed ones too.

    Args:
        layer: linear, or a convolution.
        value: what it reads, `(batch, ...)`.
        size: of a transposed convolution's outputs, without batch and channels.
    """
    if isinstance(layer, nn.Linear):
        return value.reshape(value.shape[0], -1, value.shape[-1]).mT.unsqueeze(1)
    if isinstance(layer, _ConvTransposeNd):
        return _reached(layer, value, size)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    before_after = [0, 0] * len(kernel)
    if layer.padding == "same" or type(layer).__name__.endswith("Same"):  # timm's Conv2dSame pads by size
        for i, length in enumerate(reversed(value.shape[2:])):
            k, s, d = (t[len(kernel) - 1 - i] for t in (kernel, stride, dilation))
            total = max((math.ceil(length / s) - 1) * s + (k - 1) * d + 1 - length, 0)
            before_after[2 * i : 2 * i + 2] = [total // 2, total - total // 2]
    elif not isinstance(layer.padding, str):
        before_after = [p for p in reversed(layer.padding) for _ in range(2)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    columns = _unfolded(F.pad(value, before_after, mode=mode), kernel, stride, dilation)
    return _by_group(columns, layer.groups, len(kernel))


def _reached(layer: _ConvTransposeNd, value: Tensor, size: tuple[int, ...]) -> Tensor:
    """Of a transposed convolution: a convolution by the flipped kernel of the input with zeros between its entries."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    spread = value.new_zeros(*value.shape[:2], *((n - 1) * s + 1 for n, s in zip(value.shape[2:], stride, strict=True)))
    where: Any = (..., *(slice(None, None, s) for s in stride))
    spread[where] = value
    before_after = []
    for i in reversed(range(len(kernel))):
        reach, padding = dilation[i] * (kernel[i] - 1), layer.padding[i]
        assert isinstance(padding, int)  # words are for plain convolutions
        before_after += [reach - padding, size[i] + padding - spread.shape[2 + i]]
    columns = _unfolded(F.pad(spread, before_after), kernel, (1,) * len(kernel), dilation)
    return _by_group(columns.flip(*range(2, 2 + len(kernel))), layer.groups, len(kernel))


def _unfolded(padded: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """`(batch, channels, *kernel, *positions)`, a view."""
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        padded = padded.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    n = len(kernel)
    return padded.permute(0, 1, *range(2 + n, 2 + 2 * n), *range(2, 2 + n))


def _by_group(columns: Tensor, groups: int, dims: int) -> Tensor:
    return columns.reshape(len(columns), groups, -1, math.prod(columns.shape[2 + dims :]))


def some_of(positions: int, most: int) -> Tensor | slice:
    """Which positions to look at: all of them, or `most` drawn ones in their order, the same ones at each call."""
    if positions <= most:
        return slice(None)
    drawn = torch.randperm(positions, generator=torch.Generator().manual_seed(0))
    return drawn[:most].sort().values
