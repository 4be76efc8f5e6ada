"""Weights that are used without the layer that holds them, used through it, so that what hooks the layer sees it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from tpvprune.multihead import attended

SETTINGS = ("stride", "padding", "dilation", "groups")
LIKE = ("to", "type_as", "expand_as", "view_as", "reshape_as")  # what comes after the first shows a shape or a kind
FRESH = ("new_", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like")
DEFAULTS: Mapping[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
READS: Mapping[Any, Sequence[str]] = {
    F.linear: ("input", "weight", "bias"),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), ("input", "weight", "bias", *SETTINGS)),
}


class ThroughLayers(TorchFunctionMode):
    """While this mode is on, `F.linear(x, layer.weight, bias)` runs as `layer(x)`, with that bias.

    Some attention modules join a bias from parts and use the weight of a projection by hand; the projection itself is
    never called. The same holds for convolutions, and for what `nn.MultiheadAttention` does in one function.

    Args:
        model: whose linear layers and convolutions are meant.

    Attributes:
        led: whether any function has run as a layer so far.
        beside: layers whose weights went into functions that are no run of the layer.
        plain: layers that have run with their weight as it is, and not with something made of it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.led = False
        self.beside: set[nn.Module] = set()
        self.plain: set[nn.Module] = set()
        layers = (m for m in model.modules() if isinstance(m, (nn.Linear, _ConvNd)))
        self._layers: dict[int, list[nn.Module]] = {}
        for layer in layers:
            self._layers.setdefault(id(layer.weight), []).append(layer)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, or the layer whose weight it is given."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                found = attended(*args, **kwargs)
            return func(*args, **kwargs) if found is None else found
        names = READS.get(func)
        if names is None:
            found = func(*args, **kwargs)
            if _values(func, found):
                self._note(list(args[:1]) if getattr(func, "__name__", "") in LIKE else [*args, *kwargs.values()])
            return found
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        users = [user for user in self._layers.get(id(given.get("weight")), ()) if user.weight is given["weight"]]
        self.plain.update(user for user in users if _runs(user))
        layer: Any = users[0] if len(users) == 1 else None  # of a shared weight nobody knows whose it is here
        if layer is None or _runs(layer) or not _alike(layer, given):
            self._note([given.get("weight")])
            return func(*args, **kwargs)
        self.led = True
        self.plain.add(layer)
        out, bias = layer(given["input"]), given.get("bias")
        if bias is None or bias is layer.bias:
            return out
        return out + (bias if isinstance(layer, nn.Linear) else bias.reshape(-1, *[1] * (layer.weight.ndim - 2)))

    def _note(self, given: list[Any]) -> None:
        """Remember whose weights are among what a function is given, unless one of these layers runs."""
        for value in given:
            if isinstance(value, (list, tuple)):
                self._note(list(value))
            elif isinstance(value, nn.Parameter) and id(value) in self._layers:
                users = [layer for layer in self._layers[id(value)] if layer.weight is value]
                if not any(_runs(layer) for layer in users):
                    self.beside.update(users)


def _values(func: Any, found: Any) -> bool:
    """Whether a function gives numbers made of those that it was given, and not their shape, kind, or a comparison."""
    if isinstance(found, Tensor):
        return found.dtype != torch.bool and not getattr(func, "__name__", "").startswith(FRESH)
    return isinstance(found, (tuple, list)) and not isinstance(found, torch.Size)


def read_by(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a layer reads of what it is called with."""
    return args[0] if args else kwargs["input"]


def _runs(layer: nn.Module) -> bool:
    """Whether the layer's own code runs, or something that it has called."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",) and frame.f_locals["self"] is layer:
            return True
        frame = frame.f_back
    return False


def _alike(layer: Any, given: Mapping[str, Any]) -> bool:
    """Whether what is done by hand is what the layer would do, another bias than none aside."""
    if layer.bias is not None and layer.bias is not given.get("bias"):
        return False
    if isinstance(layer, nn.Linear):
        return True
    if getattr(layer, "padding_mode", "zeros") != "zeros" or getattr(layer, "transposed", False):
        return False
    count = layer.weight.ndim - 2

    def full(value: Any) -> Any:
        return (value,) * count if isinstance(value, int) else tuple(value) if isinstance(value, list) else value

    return all(full(given.get(key, DEFAULTS[key])) == full(getattr(layer, key)) for key in SETTINGS)
