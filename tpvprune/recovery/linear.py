"""Which layers give a product with a weight of their own, as torch's do, so that least squares can refit them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from tpvprune.patches import patches

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
REFITTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
ALIKE = 0.05  # of an output's usual size: well above rounding in half precision, well below what code of its own does


def refittable(model: nn.Module) -> list[str]:
    """Names of the layers whose weight least squares can move: `is_product`, and no other module holds the weight."""
    held = holders(model)
    return [name for name, layer in _layers(model) if held[id(layer.weight)] == 1 and is_product(layer)]


def foldable(model: nn.Module) -> list[str]:
    """Names of the layers whose bias a mean can be added to: `is_affine`."""
    return [name for name, layer in _layers(model) if is_affine(layer)]


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, REFITTED)]


def holders(model: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))


@torch.no_grad()
def is_product(layer: Any) -> bool:
    """Whether a linear layer or convolution adds to its outputs what torch's layer of its kind gives by its parameters.

    Code of its own may scale or standardise the weights, or pad in another way: what it adds for random parameters is
    compared with the product of the weight and what `patches` says that each position reads.
    """
    if _as_it_is(layer):
        return True
    try:
        value, drawn = _drawn(layer.weight, _readable(layer)), _parameters(layer)
        drawn["weight"] /= math.sqrt(width(layer))
        with_them = _answer(layer, value, drawn)
        size = tuple(with_them.shape[2:])
        without = _answer(layer, value, {name: torch.zeros_like(v) for name, v in drawn.items()}, size)
        columns = patches(layer, value, size).double()
    except Exception:  # wants other arguments, inputs of another shape, or a weight of another kind
        return False
    wanted = (grouped(layer, drawn["weight"]).double() @ columns).flatten(1, 2)
    if "bias" in drawn:
        wanted = wanted + drawn["bias"].double().unsqueeze(1)
    found = (with_them.double() - without.double()).reshape(*with_them.shape[:2], -1)
    return found.shape == wanted.shape and _near(found, wanted, wanted)


@torch.no_grad()
def is_affine(layer: Any) -> bool:
    """Whether a linear layer or convolution gives of a mean of inputs the mean of its outputs, its bias added to them.

    Its weight may be used in any way.
    """
    if _as_it_is(layer):
        return True
    try:
        one, other = (_drawn(layer.weight, _readable(layer), seed) for seed in (0, 1))
        given_one, given_other, of_mean = (_answer(layer, v, {}).double() for v in (one, other, (one + other) / 2))
        bias = _parameters(layer).get("bias")
        moved = None if bias is None else _answer(layer, one, {"bias": layer.bias + bias}, tuple(given_one.shape[2:]))
    except Exception:  # as above
        return False
    if moved is not None and bias is not None:
        wanted = bias.double().reshape(-1, *[1] * (moved.ndim - 2)).expand_as(moved)
        if not _near(moved.double() - given_one, wanted, wanted):
            return False
    return _near(of_mean, (given_one + given_other) / 2, given_one - given_other)


def given(layer: Any, value: Tensor, size: tuple[int, ...]) -> Tensor:
    """What a layer gives, its hooks left out.

    Args:
        layer: linear, or a convolution.
        value: what it reads, `(batch, ...)`.
        size: of its outputs, without batch and channels: what calls a transposed convolution may choose among sizes.
    """
    found: Tensor = layer.forward(value, list(size)) if isinstance(layer, TRANSPOSED) else layer.forward(value)
    return found


def width(layer: Any) -> int:
    """How many numbers each output of a layer is computed from."""
    weight: Tensor = layer.weight
    return weight[:, 0].numel() // layer.groups if isinstance(layer, TRANSPOSED) else weight[0].numel()


def grouped(layer: Any, weight: Tensor) -> Tensor:
    """Something shaped as a layer's weights, as `(groups, outputs, inputs)`."""
    groups = int(getattr(layer, "groups", 1))
    if isinstance(layer, TRANSPOSED):
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return weight.reshape(groups, -1, width(layer))


class _Own(nn.Module):
    """A layer's own code, without its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, value: Tensor, size: tuple[int, ...] | None) -> Any:
        """As `given`; without a size, as the layer chooses it."""
        return self.layer.forward(value) if size is None else given(self.layer, value, size)


def _answer(
    layer: nn.Module, value: Tensor, parameters: Mapping[str, Tensor], size: tuple[int, ...] | None = None
) -> Tensor:
    """What a layer gives with other parameters in the place of its own, by name."""
    changed = {f"layer.{name}": value for name, value in parameters.items()}
    found: Tensor = functional_call(_Own(layer), changed, (value, size))
    return found


def _as_it_is(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's, and no subclass of it."""
    return type(layer) in REFITTED and "forward" not in vars(layer)


def _near(found: Tensor, wanted: Tensor, scale: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= ALIKE * scale.square().mean().sqrt())


def _parameters(layer: nn.Module) -> dict[str, Tensor]:
    """Random numbers for a layer's weight and bias, by name."""
    values = dict(layer.named_parameters(recurse=False))
    return {name: _drawn(values[name], values[name].shape) for name in ("weight", "bias") if name in values}


def _drawn(like: Tensor, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like)


def _readable(layer: Any) -> tuple[int, ...]:
    """Shape of an input of one sample, with room for a few positions besides what the padding reaches."""
    if not isinstance(layer, _ConvNd):
        return 1, layer.weight.shape[1]
    reach = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    edge = [0] * len(reach) if isinstance(layer.padding, str) else layer.padding
    channels = layer.weight.shape[0] if isinstance(layer, TRANSPOSED) else layer.weight.shape[1] * layer.groups
    return 1, channels, *(2 * r + s + p for r, s, p in zip(reach, layer.stride, edge, strict=True))
