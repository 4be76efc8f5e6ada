"""Single weights and blocks of them as units: what unstructured and N:M plans choose from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tpvprune.errors import InputError, ModelError
from tpvprune.kinds import as_verb
from tpvprune.members import Group, Member
from tpvprune.planning.patterns import matcher
from tpvprune.types import Graph, fingerprint

TRANSPOSED = "transposed"  # in the signature of a group: its weight holds the inputs first


@as_verb
def weight_graph(model: nn.Module, block: tuple[int, int] = (1, 1), layers: Sequence[str] = ("*",)) -> Graph:
    """A graph whose units are weights, or blocks of them, of convolutions and linear layers.

    No forward pass is made, so multiply-adds are not counted. Scores over it are for masks: nothing can be cut. Other
    parameters of two dimensions or more are no units; `Graph.skipped` names their layers, with the reason.

    Args:
        model: any module.
        block: rows (outputs) and columns (inputs, all kernel positions side by side) of the weight, seen as a
            matrix, that a unit spans: two whole numbers.
        layers: which layers, by exact name, glob or `re:` regular expression.

    Raises:
        ModelError: no layer is left, a pattern matches none, or a block does not divide a weight.
        InputError: `block` is no pair of whole numbers, or `layers` a single string.
    """
    high, wide = _pair(block)
    parameters = {id(p): name for name, p in model.named_parameters()}
    found, skipped = dict[str, nn.Module](), dict[str, str]()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, _ConvNd)):
            if id(module.weight) in parameters:
                found[name] = module
            else:
                skipped[name] = "its weight is computed from other parameters"
    skipped |= _others(model, {id(module.weight) for module in found.values()}, skipped)
    chosen: dict[str, nn.Module] = {}
    for pattern in layers:
        meant = matcher(pattern)
        hits = {name: module for name, module in found.items() if meant(name)}
        if not hits:
            why = "; ".join(f"{layer!r}: {why}" if layer else why for layer, why in skipped.items() if meant(layer))
            told = f"none of the layers {', '.join(found)}" if found else "no layer: no weight of the model is a unit"
            raise ModelError(f"{pattern!r} matches {told}{why and f' ({why})'}")
        chosen |= hits
    groups: dict[str, Group] = {}
    for module in chosen.values():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        name = parameters[id(weight)]  # a weight that is shared stands once, under its first name
        rows, columns = weight.shape[0], weight[0].numel()
        if high < 1 or wide < 1 or rows % high or columns % wide:
            told = f"blocks of {high} x {wide} do not divide {name!r}, a matrix of {rows} x {columns}"
            raise ModelError(f"{told}; give others, or name the layers to take by layers=")
        index = None
        if (high, wide) != (1, 1):
            entries = torch.arange(weight.numel()).reshape(rows // high, high, columns // wide, wide)
            index = entries.transpose(1, 2).reshape(-1, high * wide)
        units = weight.numel() // (high * wide)
        member = Member(name, None, index, "consume")
        signature = f"weight:{high}x{wide}" + (f":{TRANSPOSED}" if getattr(module, "transposed", False) else "")
        groups[name] = Group(name, "weight", units, (member,), True, signature)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    everything = [*model.named_parameters(), *model.named_buffers()]
    return Graph(
        groups=tuple(groups.values()),
        shapes=shapes,
        reuse={},
        model_id=fingerprint((name, tuple(tensor.shape)) for name, tensor in everything),
        skipped=skipped,
    )


def _pair(block: Any) -> tuple[int, int]:
    """Rows and columns of a block.

    Raises:
        InputError: they are no two whole numbers.
    """
    whole = isinstance(block, Sequence) and all(isinstance(n, Integral) and not isinstance(n, bool) for n in block)
    if not whole or len(block) != 2:
        raise InputError(f"block={block!r} is no pair of whole numbers; give rows and columns, as block=(4, 4)")
    return int(block[0]), int(block[1])


def _others(model: nn.Module, offered: Collection[int], told: Collection[str]) -> dict[str, str]:
    """Layers, and parameters of the model itself, that hold other matrices, each with the reason they are no units.

    Args:
        model: any module.
        offered: ids of the parameters that are units.
        told: layers of which a reason is known.
    """
    keys: dict[str, dict[str, None]] = {}  # in their order, each once
    kinds: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in offered:
            continue
        layer, computed, rest = name.partition("parametrizations.")  # whose names follow the weight's
        layer, key = (layer.rstrip("."), rest.split(".")[0]) if computed else name.rpartition(".")[::2]
        if layer not in told:
            kinds[layer or key] = type(model.get_submodule(layer)).__name__
            keys.setdefault(layer or key, {})[key] = None
    return {
        name: f"{kind} is no convolution or linear layer, whose weights alone are units ({', '.join(keys[name])})"
        for name, kind in kinds.items()
    }
