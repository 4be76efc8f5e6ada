"""Scores of weights, and of any perturbation: engines over parameter gradients.

Three ways to `E_x[(sum over a unit of g * mean)^2 + sum of g^2 * variance]`, `g` the gradient of `u . f(x)`:

* `batched`: one gradient of a whole batch. With cotangents drawn independently per sample the products of different
  samples vanish on average, so its square over the batch size is unbiased: a row of the tally is a batch.
  Exact cotangents are given a random sign a sample for it.
* `per_sample`: the gradient of every sample, from each layer's input and output gradient, in chunks. Linear layers
  and convolutions only. A row of the tally is a sample.
* `factored`: second moments of inputs and of output gradients, multiplied. No weight gradient is formed. It takes the
  two for independent and positions for uncorrelated, as Kronecker factorisations do (Martens and Grosse 2015,
  arXiv 1503.05671): an approximation, labelled as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import evaluation_mode
from tpvprune.errors import ModelError, PlanError
from tpvprune.members import Member
from tpvprune.patches import patches
from tpvprune.reads import ThroughLayers, read_by
from tpvprune.scoring.blocks import refuse_blocks
from tpvprune.scoring.engine import wide
from tpvprune.scoring.layout import Layout, mixed, mixes_samples, outermost, without_gradients
from tpvprune.scoring.perturb import Perturbation, moments_of
from tpvprune.types import Graph

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

    @property
    def place(self) -> str:
        """Names the side of a layer that the tensor is on."""
        param = self.member.param.removesuffix(".bias").removesuffix(".weight")
        return f"{param}/{'in' if self.member.role == 'consume' else 'out'}"

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
        InputError: the graph has blocks.
    """
    refuse_blocks(graph, "this criterion or engine")
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
    """Eval mode, and gradients for these parameters alone; put back at the end.

    Raises:
        ModelError: at the end, where a module that owns one was run without gradients.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    named = dict(model.named_parameters())
    owners = {name.rpartition(".")[0] for name in wanted}
    blind: list[str] = []
    begun = [True]  # whether the pass as a whole has gradients

    def begin(*_: Any) -> None:
        begun[0] = torch.is_grad_enabled()

    def hook(name: str) -> Any:
        return lambda *_: blind.append(name) if begun[0] and not torch.is_grad_enabled() else None

    handles = [model.register_forward_pre_hook(begin)]
    handles += [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in owners]
    try:
        with evaluation_mode(model):
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield [named[name].requires_grad_(True) for name in wanted]
        if blind:
            raise without_gradients(blind[0])
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def score_gradient(
    gradients: Mapping[str, Tensor], parts: Mapping[str, Sequence[Side]], coherent: bool
) -> dict[str, Tensor]:
    """What one gradient says of every unit, `(..., units)` per group.

    Args:
        gradients: per parameter `(..., *weight)`; leading dimensions are samples.
        parts: from `sides`.
        coherent: whether all members of a unit add up before they are squared, or those of each side of a layer (its
            weight and its bias).
    """
    means: dict[tuple[str, str], Tensor] = {}
    totals: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        for side in parts[name]:
            if side.mean is not None:
                moved, key = side.fold(gradient * side.mean), (side.group, "" if coherent else side.place)
                means[key] = means[key] + moved if key in means else moved
            if side.variance is not None:
                noise = side.fold(gradient.square() * side.variance)
                totals[side.group] = totals[side.group] + noise if side.group in totals else noise
    for (group, _), moved in means.items():
        square = moved.square()
        totals[group] = totals[group] + square if group in totals else square
    return totals


def with_sharing(model: nn.Module, layers: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """The layers, and those that share a weight with one of them under its name."""
    named = [(name, model.get_submodule(name)) for name in layers]
    names = {id(module._parameters.get("weight")): name for name, module in named} | {id(None): ""}
    own = {id(module) for _, module in named}
    others = [m for m in model.modules() if id(m) not in own and names.get(id(m._parameters.get("weight")))]
    return named + [(names[id(module.weight)], module) for module in others]


class Captured:
    """Inputs and output gradients of layers, for the length of a `with` block.

    Calls of layers that share a weight stand under the name of the first.

    Attributes:
        calls: per layer, the module of each call.
        inputs: per layer, the input of each call, samples outermost.
        outputs: per layer, the output of each call, to take gradients at.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], instead: str = "use engine='batched'") -> None:
        self.model, self.layers = model, list(layers)
        self.calls: dict[str, list[nn.Module]] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        self.users = with_sharing(model, layers)
        self._keys = {id(module): f"{number}:{name}" for number, (name, module) in enumerate(self.users)}
        self._layout = Layout(model)
        self._through = ThroughLayers(model)
        self._blind: list[str] = []
        self._ended = self._many = False
        self._mixing = mixes_samples(model)
        for name, module in self.users:
            if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                raise ModelError(
                    f"{name!r} is a {type(module).__name__}, or shares its weight with one; per-sample, factored "
                    f"and compensated scores are made for linear layers and convolutions; {instead}"
                )

    @contextmanager
    def __call__(self, inputs: Tensor) -> Iterator[Captured]:
        """Hooks on for a pass; what they held is let go at the end.

        Args:
            inputs: `(batch, ...)`, of the pass.
        """
        self._many = len(inputs) > 1
        self._layout.begin(inputs)
        self.calls = {name: [] for name in self.layers}
        self.inputs = {name: [] for name in self.layers}
        self.outputs = {name: [] for name in self.layers}
        self._through, self._blind = ThroughLayers(self.model), []
        self._ended = False
        handles = [
            # First: what the hooks of others make of an output is no part of the layer.
            module.register_forward_hook(self._hook(name), prepend=True, with_kwargs=True)
            for name, module in self.users
        ]
        try:
            with self._through:
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self.calls, self.inputs, self.outputs = {}, {}, {}

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            value = read_by(args, kwargs).detach()
            if not self._ended and self._layout.met(self._keys[id(module)], value):
                return output
            if not torch.is_grad_enabled():
                self._blind.append(name)
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)
            if self._ended:  # a checkpoint runs the layer again in the backward pass
                return output.clone()
            self.calls[name].append(module)
            self.inputs[name].append(value)
            self.outputs[name].append(output)
            return output.clone()  # an in-place activation may follow

        return hook

    def axis(self, module: nn.Module) -> int:
        """The axis that samples lie along in what a layer reads and gives."""
        return self._layout.axes.get(self._keys[id(module)], 0)

    def ends(self) -> tuple[list[str], list[Tensor]]:
        """Layer and output of every call, in order.

        Raises:
            ModelError: a layer was not called: it is not used, or its weight is used without it; or its weight is made
                another one before it is used; or it runs without gradients, or has the samples in an order of its own.
        """
        if self._mixing is not None and self._many:
            raise mixed(self._mixing)
        idle = next((name for name in self.layers if not self.outputs[name]), None)
        if idle is not None:
            raise ModelError(f"the forward pass does not call {idle!r}; leave it out, or use engine='batched'")
        if self._blind:
            raise without_gradients(self._blind[0])
        for name, module in self.users:
            if module in self._through.beside or (module in self.calls[name] and module not in self._through.plain):
                raise ModelError(
                    f"the weight of {name!r} goes into more than a product with what the layer reads, as where it is "
                    "normalised first; use engine='batched'"
                )
        self._layout.end()
        self._ended = True
        for name in self.layers:
            values = zip(self.calls[name], self.inputs[name], strict=True)
            self.inputs[name] = [outermost(value, self.axis(module)) for module, value in values]
        names = [name for name in self.layers for _ in self.outputs[name]]
        return names, [output for name in self.layers for output in self.outputs[name]]

    def sample_gradients(self, name: str, slopes: Sequence[Tensor], batch: int) -> Iterator[tuple[slice, Tensor]]:
        """Weight gradients of single samples, `(samples, *weight)`, a chunk of samples at a time.

        Args:
            name: the layer.
            slopes: output gradient of each of its calls.
            batch: samples in the batch.
        """
        calls: list[Any] = self.calls[name]
        weight = calls[0].weight
        columns = [by_sample(patches(c, wide(x)), batch) for c, x in zip(calls, self.inputs[name], strict=True)]
        rows = [positions(c, outermost(s, self.axis(c)), batch) for c, s in zip(calls, slopes, strict=True)]
        size = max(1, CHUNK // weight.numel())
        for start in range(0, batch, size):
            part = slice(start, min(batch, start + size))
            total = sum(d[part] @ x[part].mT for x, d in zip(columns, rows, strict=True))
            assert isinstance(total, Tensor)
            yield part, total.reshape(-1, *weight.shape)


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
    slope = wide(slope)
    if isinstance(layer, nn.Linear):
        return by_sample(slope.reshape(slope.shape[0], -1, slope.shape[-1]).mT.unsqueeze(1), batch)
    groups = int(getattr(layer, "groups", 1))
    return by_sample(slope.reshape(slope.shape[0], groups, slope.shape[1] // groups, -1), batch)


def factor_of_inputs(layers: Sequence[nn.Module], values: Sequence[Tensor], batch: int) -> Tensor:
    """Squared inputs, summed over a batch, mean over the positions of all calls, `(groups, inputs)`."""
    squares = [by_sample(patches(c, wide(x)), batch).square() for c, x in zip(layers, values, strict=True)]
    total = sum(square.sum((0, 3)) for square in squares)
    assert isinstance(total, Tensor)
    return total / sum(square.shape[3] for square in squares)


def factor_of_slopes(layer: nn.Module, slope: Tensor, batch: int) -> Tensor:
    """Squared output gradients of a call, summed over a batch and positions, `(groups, outputs)`."""
    return positions(layer, slope, batch).square().sum((0, 3))


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
