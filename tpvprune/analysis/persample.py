"""Energies of single samples' gradients: `g^T C g` for each sample of a batch, from one backward pass.

A linear layer or convolution's gradient on one sample is a product of its output gradients and its inputs, summed over
positions. Where all of a weight's variances are the same, the square of that sum is a sum over pairs of positions as
well ("ghost norm", Goodfellow 2015, arXiv 1510.01799; Li et al. 2022, arXiv 2110.05679), which is taken where it costs
less. Norm layers and biases need a sum over positions alone. What is left goes through `torch.func`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional as F

from tpvprune.analysis.perturbations import Moments
from tpvprune.batches import evaluation_mode, finite_outputs, plain_attention, single_tensor
from tpvprune.errors import ModelError
from tpvprune.patches import patches
from tpvprune.scoring.activations import backward
from tpvprune.scoring.engine import wide
from tpvprune.scoring.gradients import by_sample, only, positions, with_sharing
from tpvprune.scoring.heads import Head
from tpvprune.scoring.probing import detached

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
CACHED = 2**20  # entries of unfolded inputs held at once: few enough to stay in the processor's cache
TOGETHER = 8  # samples whose convolutions are one call
VMAPPED = 2**25  # entries of gradients that torch.func may hold at once


class Layers:
    """A model's layers whose per-sample gradients have a short form, captured for the length of a `with` block.

    Attributes:
        owners: layer to the parameters of it that may move, by their key in the layer.
        rest: parameters that belong to no such layer.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model = model
        self.owners: dict[str, dict[str, str]] = {}
        self.calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        self.rest = []
        for name in names:
            layer, _, key = name.rpartition(".")
            module = model.get_submodule(layer)
            users = with_sharing(model, [layer]) if key == "weight" else []
            known = type(module) in PRODUCTS + NORMS and all(type(user) in PRODUCTS + NORMS for _, user in users)
            if known and key in ("weight", "bias") and len(users) < 2:
                self.owners.setdefault(layer, {})[key] = name
            else:
                self.rest.append(name)

    @contextmanager
    def __call__(self) -> Iterator[Layers]:
        """Hooks on; what they held is let go at the end."""
        self.calls = []
        handles = [self.model.get_submodule(n).register_forward_hook(self._hook(n)) for n in self.owners]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.calls = []

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_(True)
            self.calls.append((name, module, args[0].detach(), output))
            return output.clone()  # an in-place activation may follow

        return hook


def sample_energies(
    model: nn.Module, inputs: Tensor, moments: Moments, head: Head, generator: torch.Generator, output: Any = None
) -> Tensor:
    """`(sum of g * mean)^2 + sum of g^2 * variance` of every sample, `(batch,)` in float64, one cotangent each.

    Raises:
        ModelError: a parameter belongs to no layer known here, and `torch.func` cannot follow the model.
    """
    layers = Layers(model, moments.names)
    moved = torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device)
    noise = torch.zeros_like(moved)
    with only(model, []), layers() as seen, torch.enable_grad():
        found = finite_outputs(model, inputs, output)
        cotangent = head.cotangent(detached(found), generator)
        if seen.calls:
            ends = [call[3] for call in seen.calls]
            slopes = backward(found, cotangent, ends, keep_graph=False)
            by_layer: dict[str, list[tuple[nn.Module, Tensor, Tensor]]] = {}
            for (name, module, value, end), slope in zip(seen.calls, slopes, strict=True):
                part = torch.zeros_like(end) if slope is None else slope
                by_layer.setdefault(name, []).append((module, value, part.detach()))
            for name, calls in by_layer.items():
                for key, parameter in seen.owners[name].items():
                    mean, variance = moments.means.get(parameter), moments.variances.get(parameter)
                    for piece, one, other in _of_parameter(calls, key, mean, variance, len(inputs)):
                        moved[piece] += one
                        noise[piece] += other
    if layers.rest:
        if not isinstance(cotangent, Tensor):
            raise ModelError(f"{layers.rest[0]!r} belongs to no layer known here; use engine='batched'")
        one, other = _rest(model, inputs, layers.rest, moments, cotangent, output)
        moved, noise = moved + one, noise + other
    return moved.square() + noise


def check_layout(
    model: nn.Module,
    inputs: Tensor,
    first: float,
    moments: Moments,
    head: Head,
    generator: torch.Generator,
    output: Any,
) -> None:
    """Refuse a model whose layers do not hold the samples outermost, which no shape tells for sure.

    Args:
        model: the model.
        inputs: of the batch.
        first: energy of its first sample, taken in the batch.
        moments: of the change.
        head: the metric.
        generator: as it was when the batch was begun.
        output: of the model.

    Raises:
        ModelError: the sample alone has another energy.
    """
    alone = float(sample_energies(model, inputs[:1], moments, head, generator, output)[0])
    if abs(alone - first) > 1e-3 * max(abs(alone), abs(first)):
        raise ModelError(
            f"a sample of {type(model).__name__} has another gradient in a batch than alone: a layer does not hold the "
            "samples outermost, or mixes them; use engine='batched'"
        )


Piece = tuple[slice, Tensor | float, Tensor | float]


def _of_parameter(
    calls: list[tuple[nn.Module, Tensor, Tensor]], key: str, mean: Tensor | None, variance: Tensor | None, batch: int
) -> Iterator[Piece]:
    """Slices of the batch, with each sample's product with the mean and its square weighed by the variance."""
    module = calls[0][0]
    if isinstance(module, PRODUCTS) and key == "weight":
        yield from _of_product(calls, mean, variance, batch)
        return
    whole = sum(_sums(layer, value, slope, key, batch) for layer, value, slope in calls)
    assert isinstance(whole, Tensor)
    moved, noise = _energies(whole, mean, variance)
    yield slice(0, batch), moved, noise


def _energies(gradients: Tensor, mean: Tensor | None, variance: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    flat = gradients.flatten(1)
    moved = 0.0 if mean is None else (flat @ mean.flatten().to(flat)).double()
    if variance is None:
        return moved, 0.0
    if _even(variance):
        return moved, (torch.linalg.vecdot(flat, flat) * variance.flatten()[0]).double()
    return moved, (flat.square() @ variance.flatten().to(flat)).double()


def _even(variance: Tensor) -> bool:
    return variance.numel() == 1 or all(stride == 0 for stride in variance.stride())


def _of_product(
    calls: list[tuple[nn.Module, Tensor, Tensor]], mean: Tensor | None, variance: Tensor | None, batch: int
) -> Iterator[Piece]:
    layer: Any = calls[0][0]
    weight, even = layer.weight, all(len(value) == batch for _, value, _ in calls)
    if even and all(_plain_convolution(module) for module, _, _ in calls):
        size = max(1, min(TOGETHER, CACHED // weight.numel()))
        for start in range(0, batch, size):
            part = slice(start, min(batch, start + size))
            total = sum(_convolved(module, wide(value[part]), wide(slope[part])) for module, value, slope in calls)
            assert isinstance(total, Tensor)
            moved, noise = _energies(total, mean, variance)
            yield part, moved, noise
        return
    rows = [positions(module, slope, batch) for module, _, slope in calls]
    spots = sum(row.shape[3] for row in rows)
    groups, outs, ins = rows[0].shape[1], weight.shape[0] // rows[0].shape[1], weight[0].numel()
    ghost = mean is None and variance is not None and _even(variance) and spots * (outs + ins) < outs * ins
    size = max(1, CACHED // max(1, groups * ins * spots, weight.numel()))
    for start in range(0, batch, size):
        part = slice(start, min(batch, start + size))
        columns = []
        for module, value, _ in calls:
            if even:
                columns.append(patches(module, wide(value[part])))
            else:
                columns.append(by_sample(patches(module, wide(value)), batch)[part])
        if ghost:
            assert variance is not None
            d, x = torch.cat([row[part] for row in rows], 3), torch.cat(columns, 3)
            pairs = (d.mT @ d) * (x.mT @ x)
            yield part, 0.0, pairs.sum((1, 2, 3)).double() * float(variance.flatten()[0])
            continue
        total = sum(row[part] @ x.mT for row, x in zip(rows, columns, strict=True))
        assert isinstance(total, Tensor)
        moved, noise = _energies(total.reshape(len(total), -1), mean, variance)
        yield part, moved, noise


def _plain_convolution(layer: nn.Module) -> bool:
    """Whether a convolution pads by zeros, as many on either side."""
    return (
        isinstance(layer, (nn.Conv1d, nn.Conv2d))
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _convolved(layer: Any, value: Tensor, slope: Tensor) -> Tensor:
    """Weight gradients of single samples `(samples, entries)`: one convolution, with a group or more for each sample.

    Ten times faster on a CPU than unfolding the input.
    """
    batch, weight = len(value), layer.weight
    repeated = weight.detach().to(value).repeat(batch, *(1,) * (weight.ndim - 1))
    found = torch.ops.aten.convolution_backward(
        slope.reshape(1, -1, *slope.shape[2:]),
        value.reshape(1, -1, *value.shape[2:]),
        repeated,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0] * len(layer.stride),
        batch * layer.groups,
        [False, True, False],
    )
    gradients: Tensor = found[1].reshape(batch, -1)
    return gradients


def _sums(layer: nn.Module, value: Tensor, slope: Tensor, key: str, batch: int) -> Tensor:
    """Gradient of a bias, or of a norm's scale, on every sample, `(batch, entries)`."""
    if isinstance(layer, PRODUCTS):
        return positions(layer, slope, batch).sum(3).flatten(1)
    product = slope if key == "bias" else slope * _normalised(layer, value)
    if product.shape[0] % batch:
        raise ModelError(f"a layer sees {product.shape[0]} rows for {batch} samples; use engine='batched'")
    if isinstance(layer, nn.LayerNorm):
        entries = product.flatten(-len(layer.normalized_shape)).shape[-1]
        return product.reshape(batch, -1, entries).sum(1)
    if product.ndim > 2:
        product = product.flatten(2).sum(2)
    return product.reshape(batch, -1, product.shape[1]).sum(1)


def _normalised(layer: Any, value: Tensor) -> Tensor:
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(value, layer.normalized_shape, None, None, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(value, layer.num_groups, None, None, layer.eps)
    if layer.running_mean is None:
        raise ModelError(
            "a batch norm without running statistics mixes the samples of a batch, so that they have no gradients of "
            "their own; use engine='batched' with rows=1, or a model with statistics"
        )
    return F.batch_norm(value, layer.running_mean, layer.running_var, None, None, False, 0.0, layer.eps)


def _rest(
    model: nn.Module, inputs: Tensor, names: list[str], moments: Moments, cotangent: Tensor, output: Any
) -> tuple[Tensor, Tensor]:
    """The same of parameters that no layer above holds, by a backward pass that torch maps over samples."""
    tensors = {n: t.detach() for n, t in (*model.named_parameters(), *model.named_buffers())}
    wanted = {name: tensors.pop(name) for name in names}

    def one(x: Tensor, u: Tensor) -> Any:
        def answer(some: dict[str, Tensor]) -> Tensor:
            return single_tensor(functional_call(model, {**tensors, **some}, (x.unsqueeze(0),)), model, output)[0]

        pulled: Any = vjp(answer, wanted)
        return pulled[1](u)[0]

    size = max(1, VMAPPED // sum(p.numel() for p in wanted.values()))
    try:
        with evaluation_mode(model), plain_attention():  # fused attention cannot be mapped over samples
            pieces = zip(inputs.split(size), cotangent.split(size), strict=True)
            found: list[Any] = [vmap(one)(x, u) for x, u in pieces]
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{names[0]!r} belongs to no layer known here, and torch.func cannot follow {type(model).__name__} "
            f"({str(error).splitlines()[0]}); use engine='batched'"
        ) from error
    moved = torch.zeros(len(inputs), dtype=torch.float64, device=inputs.device)
    noise = torch.zeros_like(moved)
    for name in names:
        gradients = torch.cat([part[name] for part in found])
        one_, other = _energies(gradients, moments.means.get(name), moments.variances.get(name))
        moved, noise = moved + one_, noise + other
    return moved, noise
