"""What of a channel the layer that reads it cannot make up for from its other inputs.

With a refit to follow, removing a channel costs no more than its residual after the best linear prediction from the
same layer's other inputs: `r = P (a - mean) / diag(P)`, `P = (Cov(a) + ridge)^-1`. Scoring the residual in place of the
channel is Optimal Brain Surgeon (Hassibi 1993) in TPV's metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, evaluation_mode, model_inputs
from tpvprune.scoring.activations import channel_axis
from tpvprune.types import Graph

SAMPLES = 2560  # covariances of a few thousand channels are known well enough from these, at many positions each


@dataclass(frozen=True)
class Residual:
    """The map from a layer's input to its residuals: `(input - mean) @ matrix`, channels last."""

    mean: Tensor
    matrix: Tensor

    def __call__(self, value: Tensor, axis: int) -> Tensor:
        """Residuals of `value`, shaped as it is."""
        moved = value.movedim(axis, -1)
        return ((moved - self.mean.to(moved)) @ self.matrix.to(moved)).movedim(-1, axis)


class _Moments:
    """Sums over samples and positions of one layer's input."""

    def __init__(self) -> None:
        self.rows = 0
        self.total = self.square = torch.zeros(())

    def add(self, value: Tensor, axis: int) -> None:
        rows = value.movedim(axis, -1).reshape(-1, value.shape[axis])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self.rows += len(rows)
        self.total = self.total + rows.sum(0).double()
        self.square = self.square + (rows.mT @ rows).double()

    def covariance(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.rows
        return mean, self.square / self.rows - mean.unsqueeze(1) * mean


def residuals(model: nn.Module, batches: Iterable[Batch], graph: Graph, ridge: float) -> dict[str, Residual]:
    """The residual map of every layer that reads units of the graph, from one forward pass.

    Args:
        model: the model scored.
        batches: inputs; the first `SAMPLES` are looked at.
        graph: of channels and heads.
        ridge: what is added to the covariance's diagonal, as a share of its mean.
    """
    layers = dict.fromkeys(member.layer for group in graph.groups for member in group.of_role("consume"))
    moments = {name: _Moments() for name in layers}
    handles = []

    def hook(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            moments[name].add(args[0].detach(), channel_axis(module))

        return seen

    seen = 0
    try:
        for name in layers:
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook(name)))
        with evaluation_mode(model), torch.no_grad():
            for inputs in model_inputs(model, batches, "covariance"):
                model(inputs)
                seen += len(inputs)
                if seen >= SAMPLES:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return {name: _residual(model, graph, name, found, ridge) for name, found in moments.items() if found.rows}


def _residual(model: nn.Module, graph: Graph, layer: str, moments: _Moments, ridge: float) -> Residual:
    mean, covariance = moments.covariance()
    channels = len(mean)
    module: Any = model.get_submodule(layer)
    width = channels // int(getattr(module, "groups", 1))
    if width < channels:  # an output of a grouped convolution reads the channels of its own group alone
        own = torch.arange(channels, device=mean.device) // width
        covariance = covariance * (own.unsqueeze(1) == own)
    scale = covariance.diagonal().mean().clamp(min=1e-30)
    eye = torch.eye(channels, dtype=covariance.dtype, device=covariance.device)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance + max(ridge, 1e-8) * scale * eye))
    matrix = precision / precision.diagonal()
    for block in _blocks(graph, layer, channels, width):
        inside = precision[block][:, block]
        matrix[:, block] = torch.linalg.solve(inside, precision[block]).mT
    return Residual(mean, matrix)


def _blocks(graph: Graph, layer: str, channels: int, width: int) -> Iterator[Tensor]:
    """Input channels of each unit that holds more than one of a layer's input, within one group of its channels."""
    for group in graph.groups:
        for member in group.of_role("consume"):
            if member.layer == layer and member.width() > 1:
                repeats = channels // width if int(member.entries(group.units).max()) < width else 1
                for unit in member.entries(group.units):
                    for shift in range(repeats):
                        yield (unit + shift * width).to("cpu")
