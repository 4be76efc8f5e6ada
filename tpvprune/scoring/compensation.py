"""What of a channel the layer that reads it cannot make up for from its other inputs.

With a refit to follow, removing a channel costs no more than its residual after the best linear prediction from the
same layer's other inputs: `r = P (a - mean) / diag(P)`, `P = (Cov(a) + ridge)^-1`. Scoring the residual in place of the
channel is Optimal Brain Surgeon (Hassibi 1993) in TPV's metric.

Samples that a covariance is made of are predicted too well by it: with no more of them than channels, perfectly. So
the samples are dealt out to two halves, and each half's residuals are those of the other half's covariance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, evaluation_mode, model_inputs
from tpvprune.reads import ThroughLayers
from tpvprune.scoring.activations import channel_axis
from tpvprune.scoring.engine import global_number, of_all, process
from tpvprune.types import Graph

SAMPLES = 2560  # covariances of a few thousand channels are known well enough from these, at many positions each


@dataclass(frozen=True)
class Residual:
    """The map from a layer's input to its residuals: `(input - mean) @ matrix`, channels last.

    Args:
        means: `(2, channels)`, of the covariance that the samples with even and with odd numbers are held against.
        matrices: `(2, channels, channels)`, likewise.
        ridge: what was added to the covariances' diagonals, as a share of its mean.
    """

    means: Tensor
    matrices: Tensor
    ridge: float

    def __call__(self, value: Tensor, axis: int, numbers: range) -> Tensor:
        """Residuals of `value`, shaped as it is.

        Args:
            value: a layer's input, samples outermost.
            axis: of its channels.
            numbers: of the samples.
        """
        found = torch.empty_like(value)
        for half in (0, 1):
            rows = _of_half(value.movedim(axis, -1), numbers, half)
            left = (rows - self.means[half].to(rows)) @ self.matrices[half].to(rows)
            _of_half(found.movedim(axis, -1), numbers, half).copy_(left)
        return found


def _of_half(value: Tensor, numbers: range, half: int) -> Tensor:
    """The rows of a layer's input, of which each sample may have several, that belong to a half; a view."""
    each = value.unflatten(0, (len(numbers), -1)) if len(value) != len(numbers) else value.unsqueeze(1)
    return each[(half + numbers.start) % 2 :: 2]


class _Moments:
    """Sums over samples and positions of one layer's input."""

    def __init__(self) -> None:
        self.rows = 0
        self.total = self.square = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self.rows += len(rows)
        self.total = self.total + rows.sum(0).double()
        self.square = self.square + (rows.mT @ rows).double()

    def __add__(self, other: _Moments) -> _Moments:
        whole = _Moments()
        whole.rows = self.rows + other.rows
        whole.total, whole.square = self.total + other.total, self.square + other.square
        return whole

    def covariance(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.rows
        return mean, self.square / self.rows - mean.unsqueeze(1) * mean


def residuals(model: nn.Module, batches: Iterable[Batch], graph: Graph, ridges: Sequence[float]) -> dict[str, Residual]:
    """The residual map of every layer that reads units of the graph, from one forward pass.

    Args:
        model: the model scored.
        batches: inputs; the first `SAMPLES` are looked at.
        graph: of channels and heads.
        ridges: what may be added to a covariance's diagonal, as a share of its mean; per layer the one that leaves
            least of the samples it was not made of is taken.
    """
    layers = dict.fromkeys(member.layer for group in graph.groups for member in group.of_role("consume"))
    moments = {name: (_Moments(), _Moments()) for name in layers}
    numbers = range(0)

    def hook(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            value = args[0].detach().movedim(channel_axis(module), -1)
            for half, held in enumerate(moments[name]):
                held.add(_of_half(value, numbers, half).flatten(0, -2))

        return seen

    seen = 0
    for local, inputs in enumerate(model_inputs(model, batches, "covariance")):
        first = global_number(local)
        numbers = range(first, first + len(inputs))
        # Hooks are on for the pass alone: what gives the batches may use the model too.
        with evaluation_mode(model), torch.no_grad(), ThroughLayers(model), ExitStack() as hooks:
            for name in layers:
                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(hook(name)))
            model(inputs)
        seen += len(inputs)
        if seen >= SAMPLES // process()[1]:
            break
    if process()[1] > 1:
        moments = _together(of_all(moments))
    return {
        name: _residual(model, graph, name, *halves, ridges)
        for name, halves in moments.items()
        if halves[0].rows + halves[1].rows
    }


def _together(
    of_each: list[dict[str, tuple[_Moments, _Moments]]],
) -> dict[str, tuple[_Moments, _Moments]]:
    whole = of_each[0]
    for other in of_each[1:]:
        whole = {name: (even + other[name][0], odd + other[name][1]) for name, (even, odd) in whole.items()}
    return whole


def _residual(
    model: nn.Module, graph: Graph, layer: str, even: _Moments, odd: _Moments, ridges: Sequence[float]
) -> Residual:
    # One half alone has nothing but itself to be held against.
    halves = [(odd if odd.rows else even).covariance(), (even if even.rows else odd).covariance()]
    best: tuple[float, Residual] | None = None
    for ridge in ridges:
        matrices = [_matrix(model, graph, layer, covariance, ridge) for _, covariance in halves]
        left = 0.0
        for (mean, _), matrix, (other, covariance) in zip(halves, matrices, reversed(halves), strict=True):
            off = ((other - mean) @ matrix).square().sum()
            left += float(((covariance @ matrix) * matrix).sum() + off)
        if best is None or left < best[0]:
            best = left, Residual(torch.stack([mean for mean, _ in halves]), torch.stack(matrices), ridge)
    assert best is not None
    return best[1]


def _matrix(model: nn.Module, graph: Graph, layer: str, covariance: Tensor, ridge: float) -> Tensor:
    channels = len(covariance)
    module: Any = model.get_submodule(layer)
    width = channels // int(getattr(module, "groups", 1))
    if width < channels:  # an output of a grouped convolution reads the channels of its own group alone
        own = torch.arange(channels, device=covariance.device) // width
        covariance = covariance * (own.unsqueeze(1) == own)
    scale = covariance.diagonal().mean().clamp(min=1e-30)
    eye = torch.eye(channels, dtype=covariance.dtype, device=covariance.device)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance + max(ridge, 1e-8) * scale * eye))
    matrix = precision / precision.diagonal()
    for block in _blocks(graph, layer, channels, width):
        inside = precision[block][:, block]
        matrix[:, block] = torch.linalg.solve(inside, precision[block]).mT
    return matrix


def _blocks(graph: Graph, layer: str, channels: int, width: int) -> Iterator[Tensor]:
    """Input channels of each unit that holds more than one of a layer's input, within one group of its channels."""
    for group in graph.groups:
        for member in group.of_role("consume"):
            if member.layer == layer and member.width() > 1:
                repeats = channels // width if int(member.entries(group.units).max()) < width else 1
                for unit in member.entries(group.units):
                    for shift in range(repeats):
                        yield (unit + shift * width).to("cpu")
