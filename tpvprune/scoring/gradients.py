"""Scores of weights, and of any perturbation: engines over parameter gradients.

Three ways to `E_x[(sum over a unit of g * mean)^2 + sum of g^2 * variance]`, `g` the gradient of `u . f(x)`:

* `batched`: one gradient of a whole batch. With cotangents drawn independently per sample the products of different
  samples vanish on average, so its square over the batch size is unbiased: a row of the tally is a batch.
* `per_sample`: the gradient of every sample, from each layer's input and output gradient, in chunks. Linear layers
  and convolutions only. A row of the tally is a sample.
* `factored`: second moments of inputs and of output gradients, multiplied. No weight gradient is formed. It takes the
  two for independent and positions for uncorrelated, as Kronecker factorisations do (Martens and Grosse 2015,
  arXiv 1503.05671): an approximation, labelled as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import evaluation_mode
from tpvprune.errors import ModelError, PlanError
from tpvprune.patches import patches
from tpvprune.scoring.perturb import Perturbation, moments_of
from tpvprune.types import Graph, Member

CHUNK = 64 * 2**20  # entries of per-sample gradients held at once


@dataclass(frozen=True)
class Side:
    """One tensor's share of a group: which of its entries belong to which unit, and how it is perturbed."""

    group: str
    units: int
    member: Member
    ndim: int
    mean: Tensor | None
    variance: Tensor | None

    def fold(self, entries: Tensor) -> Tensor:
        """Sum `(..., *weight)` over each unit's entries, `(..., units)`."""
        member = self.member
        if member.dim is None:
            flat = entries.flatten(-self.ndim)
        else:
            moved = entries.movedim(member.dim - self.ndim, -1)
            flat = moved.flatten(-self.ndim, -2).sum(-2) if self.ndim > 1 else moved
        if member.index is None:
            return flat
        return flat[..., member.index.to(flat.device)].sum(-1)


def sides(model: nn.Module, graph: Graph, perturbation: Perturbation, over: str) -> dict[str, list[Side]]:
    """Per parameter, the groups it belongs to.

    Args:
        model: the model.
        graph: of channels, heads or weights.
        perturbation: gives the moments.
        over: `consume` or `all`: which members count.

    Raises:
        PlanError: the graph names a parameter that the model lacks.
    """
    parameters = dict(model.named_parameters())
    roles = ("consume",) if over == "consume" else ("produce", "affine", "consume")
    found: dict[str, list[Side]] = {}
    for group in graph.groups:
        for member in group.members:
            if member.role not in roles:
                continue
            if member.param not in parameters:
                raise PlanError(f"the graph names parameter {member.param!r}, which the model lacks")
            weight = parameters[member.param].detach()
            moments = moments_of(perturbation, member.param, weight)
            found.setdefault(member.param, []).append(Side(group.id, group.units, member, weight.ndim, *moments))
    return found


@contextmanager
def only(model: nn.Module, wanted: Sequence[str]) -> Iterator[list[Tensor]]:
    """Eval mode, and gradients for these parameters alone; put back at the end."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    named = dict(model.named_parameters())
    try:
        with evaluation_mode(model):
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield [named[name].requires_grad_(True) for name in wanted]
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def score_gradient(
    gradients: Mapping[str, Tensor], parts: Mapping[str, Sequence[Side]], coherent: bool
) -> dict[str, Tensor]:
    """What one gradient says of every unit, `(..., units)` per group.

    Args:
        gradients: per parameter `(..., *weight)`; leading dimensions are samples.
        parts: from `sides`.
        coherent: whether the members of a unit add up before they are squared, or after.
    """
    means: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        for side in parts[name]:
            if side.mean is not None:
                moved = side.fold(gradient * side.mean)
                into, what = (means, moved) if coherent else (totals, moved.square())
                into[side.group] = into[side.group] + what if side.group in into else what
            if side.variance is not None:
                noise = side.fold(gradient.square() * side.variance)
                totals[side.group] = totals[side.group] + noise if side.group in totals else noise
    for group, moved in means.items():
        square = moved.square()
        totals[group] = totals[group] + square if group in totals else square
    return totals


class Captured:
    """Inputs and output gradients of layers, for the length of a `with` block.

    Attributes:
        inputs: per layer, the input of each of its calls.
        outputs: per layer, the output of each of its calls, to take gradients at.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model, self.layers = model, list(layers)
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        for name in layers:
            module = model.get_submodule(name)
            if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                raise ModelError(
                    f"{name!r} is a {type(module).__name__}; per-sample and factored scores are made for linear "
                    "layers and convolutions, use engine='batched'"
                )

    @contextmanager
    def __call__(self) -> Iterator[Captured]:
        """Hooks on; what they held is let go at the end."""
        self.inputs = {name: [] for name in self.layers}
        self.outputs = {name: [] for name in self.layers}
        handles = [self.model.get_submodule(name).register_forward_hook(self._hook(name)) for name in self.layers]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.inputs, self.outputs = {}, {}

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)
            self.inputs[name].append(args[0].detach())
            self.outputs[name].append(output)
            return output.clone()  # an in-place activation may follow

        return hook

    def ends(self) -> tuple[list[str], list[Tensor]]:
        """Layer and output of every call, in order."""
        names = [name for name in self.layers for _ in self.outputs[name]]
        return names, [output for name in self.layers for output in self.outputs[name]]

    def sample_gradients(self, name: str, slopes: Sequence[Tensor], batch: int) -> Iterator[tuple[slice, Tensor]]:
        """Weight gradients of single samples, `(samples, *weight)`, a chunk of samples at a time.

        Args:
            name: the layer.
            slopes: output gradient of each of its calls.
            batch: samples in the batch.
        """
        layer: Any = self.model.get_submodule(name)
        columns = [by_sample(patches(layer, _wide(value)), batch) for value in self.inputs[name]]
        rows = [positions(layer, slope, batch) for slope in slopes]
        size = max(1, CHUNK // layer.weight.numel())
        for start in range(0, batch, size):
            part = slice(start, min(batch, start + size))
            total = sum(d[part] @ x[part].mT for x, d in zip(columns, rows, strict=True))
            assert isinstance(total, Tensor)
            yield part, total.reshape(-1, *layer.weight.shape)


def _wide(value: Tensor) -> Tensor:
    """Half precision as float32."""
    return value if value.dtype == torch.float64 else value.float()


def by_sample(values: Tensor, batch: int) -> Tensor:
    """`(batch, groups, entries, positions)`, where a layer sees a sample's windows as rows of their own."""
    rows = values.shape[0]
    if rows == batch:
        return values
    if rows % batch:
        raise ModelError(f"a layer sees {rows} rows for {batch} samples; use engine='batched'")
    split = values.reshape(batch, rows // batch, *values.shape[1:])
    return split.permute(0, 2, 3, 1, 4).flatten(3)


def positions(layer: nn.Module, slope: Tensor, batch: int) -> Tensor:
    """`(batch, groups, outputs, positions)` of a layer's output gradient."""
    slope = _wide(slope)
    if isinstance(layer, nn.Linear):
        return by_sample(slope.reshape(slope.shape[0], -1, slope.shape[-1]).mT.unsqueeze(1), batch)
    groups = int(getattr(layer, "groups", 1))
    return by_sample(slope.reshape(slope.shape[0], groups, slope.shape[1] // groups, -1), batch)


def factors(layer: nn.Module, value: Tensor, slope: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Sums over a batch of the two factors of a call: inputs `(groups, inputs)`, output gradients `(groups, outputs)`.

    The first is the mean over positions of squared inputs, the second the sum over positions of squared gradients.
    """
    squares = by_sample(patches(layer, _wide(value)), batch).square()
    return squares.mean(3).sum(0), positions(layer, slope, batch).square().sum((0, 3))


def from_factors(layer: nn.Module, inputs: Tensor, slopes: Tensor) -> Tensor:
    """The approximate second moment of a weight's gradient, shaped as the weight."""
    weight: Any = layer.weight
    return (slopes.unsqueeze(2) * inputs.unsqueeze(1)).reshape(weight.shape)


def layers_of(parts: Mapping[str, Any]) -> dict[str, str]:
    """Layer to parameter, for parameters that are a layer's weight.

    Raises:
        ModelError: one is not.
    """
    found = {}
    for name in parts:
        layer, _, key = name.rpartition(".")
        if key != "weight":
            raise ModelError(f"{name!r} is no layer's weight; use engine='batched' for it")
        found[layer] = name
    return found
