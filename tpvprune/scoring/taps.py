"""Taps: what a layer reads, or gives, times the gradient that comes back through it, summed over positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tpvprune.errors import UnseenError
from tpvprune.scoring.layout import outermost

Map = Callable[[Tensor, int, range], Tensor]
"""What a layer's input, its channel axis and the numbers of its samples are turned into."""

IN_CACHE = 2**22  # entries of a product held at once: few enough to be fast, enough for few calls


class Sink:
    """Adds up, per tapped layer and sample, `value * gradient` over positions.

    Attributes:
        numbers: of the samples.
        sums: what was added up, `(batch, channels)` per layer.
        maps: what a layer's input is turned into before.
        axes: that the samples lie along, where not the first.
    """

    def __init__(self) -> None:
        self.numbers = range(0)
        self.sums: dict[str, Tensor] = {}
        self.maps: Mapping[str, Map] = {}
        self.axes: dict[str, int] = {}

    def add(self, key: str, value: Tensor, grad: Tensor, axis: int | None) -> None:
        """Take in what a layer read, or gave, and its gradient."""
        value, grad = (outermost(tensor, self.axes.get(key, 0)) for tensor in (value, grad))
        if key in self.maps and axis is not None:
            value = self.maps[key](value, axis, self.numbers)
        part = _reduce(key, value, grad, axis, len(self.numbers))
        self.sums[key] = self.sums[key] + part if key in self.sums else part


def _reduce(key: str, value: Tensor, grad: Tensor, axis: int | None, batch: int) -> Tensor:
    """`(batch, channels)`: products summed over all positions, half precision in float32; no axis is one channel."""
    if value.shape[0] % batch:
        raise UnseenError(
            f"{key.partition(':')[2]!r} sees {value.shape[0]} rows for {batch} samples, and what each of them says "
            "cannot be told apart; score with TPV(engine='batched'), or batches of one"
        )
    if axis is None:
        return _dot(value.reshape(batch, -1), grad.reshape(batch, -1), (1,)).unsqueeze(1)
    if axis == 1 and value.ndim > 2:
        rows = _dot(value, grad, tuple(range(2, value.ndim)))
        return rows if len(rows) == batch else rows.reshape(batch, -1, rows.shape[1]).sum(1)
    channels = value.shape[-1]
    return _dot(value.reshape(batch, -1, channels), grad.reshape(batch, -1, channels), (1,))


def _dot(value: Tensor, grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`(value * grad).sum(dims)` that reads each tensor once: products stay in the processor's cache."""
    half = value.dtype in (torch.float16, torch.bfloat16)

    def products(v: Tensor, g: Tensor) -> Tensor:
        return ((v.float() if half else v) * g).sum(dims)  # one of two in float32 is enough for all to be

    size = max(1, IN_CACHE * len(value) // max(1, value.numel()))
    if value.device.type != "cpu" or len(value) <= size:
        return products(value, grad)
    return torch.cat([products(v, g) for v, g in zip(value.split(size), grad.split(size), strict=True)])


class Tap(torch.autograd.Function):
    """The identity, which reports value times gradient when the backward pass comes through."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, sink: Sink, key: str, axis: int | None, copy: bool, less: Tensor | None = None
    ) -> Tensor:
        """`value`, or a copy of it; what is reported is of `value - less`."""
        # The sink and plain tensors only: a closure over graph tensors would leak the whole graph.
        ctx.save_for_backward(value if less is None else value - less)
        ctx.sink, ctx.key, ctx.axis = sink, key, axis
        return value.clone() if copy else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """The gradient as it came."""
        (value,) = ctx.saved_tensors
        ctx.sink.add(ctx.key, value, grads[0], ctx.axis)
        return grads[0], None, None, None, None, None
