"""Cutting a layer's tensors, and what it says of its own widths; used by surgery and by timing narrower layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from tpvprune.copies import copied
from tpvprune.elastic import opened
from tpvprune.errors import InputError
from tpvprune.multihead import Heads, free
from tpvprune.plan import Plan
from tpvprune.types import FEATURES


def replace(module: nn.Module, key: str, new: Tensor) -> None:
    """Put a copy of `new` in the place of a parameter or buffer of a module."""
    old = getattr(module, key)
    if isinstance(old, nn.Parameter):
        setattr(module, key, nn.Parameter(new.clone(), requires_grad=old.requires_grad))
    else:
        module._buffers[key] = new.clone()


Refresh = Callable[[Any], None]
_REGISTERED: dict[type[nn.Module], Refresh] = {}


def register_layer(kind: type[nn.Module], refresh: Refresh) -> None:
    """Tell how modules of a class, and of its subclasses, set anew what they remember of their widths.

    Few need it: whole numbers among a module's attributes that count units, and sizes that its code writes out, are
    found by tracing. It is for what follows from a width otherwise, such as a scale of `width ** -0.5`.

    Args:
        kind: the class. Registered again, the last one holds; of a class and its base class, both are called.
        refresh: called with every such module of a model that was cut, whose parameters have their new shapes.

    Raises:
        InputError: `kind` is no class of modules.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise InputError(f"{kind!r} is no class of torch.nn.Module; give the class of the layer, not a layer")
    _REGISTERED[kind] = refresh


def registered(module: nn.Module) -> bool:
    """Whether something is registered for a module's class."""
    return isinstance(module, tuple(_REGISTERED))


def refresh(module: nn.Module) -> None:
    """Set a layer's width attributes from the shapes of its own parameters, then what is registered for its class."""
    _resize(module)
    for kind, own in _REGISTERED.items():
        if isinstance(module, kind):
            own(module)


def _resize(module: nn.Module) -> None:
    if isinstance(module, _ConvNd):
        first, second = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        elif module.groups == module.in_channels and module.groups > 1:  # depthwise, each channel writing so many
            times = module.out_channels // module.in_channels
            module.out_channels, module.in_channels = first, first // times
            module.groups = module.in_channels
        else:
            module.in_channels, module.out_channels = second * module.groups, first
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, _NormBase):
        left = module.weight if module.weight is not None else module.running_mean
        if left is not None:
            module.num_features = left.shape[0]
    elif isinstance(getattr(module, "normalized_shape", None), tuple):  # layer norms, RMS norms
        norm: Any = module
        if isinstance(getattr(norm, "weight", None), Tensor) and len(norm.normalized_shape) == 1:
            norm.normalized_shape = (norm.weight.shape[0],)
    elif isinstance(module, nn.GroupNorm):
        if module.weight is not None:
            module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        recurrent: Any = module
        first = recurrent.weight_ih if isinstance(module, nn.RNNCellBase) else recurrent.weight_ih_l0
        recurrent.input_size = first.shape[1]
    elif isinstance(module, Heads):
        module.num_heads = module.in_proj_weight.shape[0] // 3 // module.head_dim
    elif _fused(module):
        attention: Any = module
        attention.attn_dim = attention.qkv.weight.shape[0] // 3
        attention.num_heads = attention.attn_dim // attention.head_dim


def _fused(module: Any) -> bool:
    """Whether `attn_dim` and `num_heads` follow from one projection, as they do in timm's attention."""
    told = isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "attn_dim")
    return told and isinstance(getattr(module, "head_dim", None), int) and hasattr(module, "num_heads")


def forget(model: nn.Module) -> None:
    """Have modules forget what they keep between passes: several of timm keep tables made of parameters in eval mode.

    Args:
        model: in any mode, which stays.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def touched(plan: Plan) -> set[str]:
    """Names of the tensors that units of a plan leave."""
    graph = plan.graph
    return {m.param for name, mask in plan.keep.items() if not bool(mask.all()) for m in graph[name].members}


@torch.no_grad()
def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a model without the units of a plan; what it masks stays.

    Args:
        model: the one the plan's graph was traced from.
        plan: any.
    """
    small = copied(model)
    forget(small)
    graph, gone = plan.graph, plan.graph.vanished(plan.keep)
    changed = touched(plan)
    for name in sorted(changed - gone):
        if "#" not in name:
            layer, _, key = name.rpartition(".")
            owner = small.get_submodule(layer)
            replace(owner, key, plan.cut(name, getattr(owner, key).detach()))
    skipped = [n for n, mask in plan.keep.items() if graph[n].kind == "block" and not bool(mask.any())]
    inside = tuple(f"{name}." for name in skipped)
    for name in skipped:
        around, _, key = name.rpartition(".")
        setattr(small.get_submodule(around), key, nn.Identity().train(small.get_submodule(name).training))
    written = {name.removesuffix(".in_proj_weight") for name in changed if name.endswith("in_proj_weight")}
    if any(isinstance(small.get_submodule(name), nn.MultiheadAttention) for name in written):
        free(small)
    for module, count in _groups_left(small, plan):
        module.groups = count
    lost = graph.lost({name: ~mask for name, mask in plan.keep.items()})
    for name, (group, each) in graph.counts.items():
        if group in plan.keep and group not in lost and not name.startswith(inside):
            _recount(small, name, int(plan.keep[group].sum()) * each)
    for name, groups in graph.told.items():
        if name.startswith(inside):
            continue
        left = {group: each for group, each in groups.items() if group in plan.keep and group not in lost}
        _retell(small, name, sum(int((~plan.keep[group]).sum()) * each for group, each in left.items()))
    for name, openings in graph.openings.items():
        if not f"{name}.".startswith(inside):
            opened(small.get_submodule(name), openings)
    for module in small.modules():
        refresh(module)
    return small


def _retell(model: nn.Module, name: str, gone: int) -> None:
    """Say that something is narrower, in `feature_info` or in an attribute."""
    if name.startswith(FEATURES):
        infos: Any = getattr(model, FEATURES)
        infos = getattr(infos, "info", infos)
        infos[int(name[len(FEATURES) + 1 : -1])]["num_chs"] -= gone
    else:
        around, _, key = name.rpartition(".")
        module = model.get_submodule(around)
        setattr(module, key, getattr(module, key) - gone)


def counted(model: nn.Module, name: str) -> int | None:
    """A number among a module's attributes, or in a tuple or list there; None if there is no such number.

    Args:
        model: any.
        name: qualified, as in `Graph.counts`; the place in a tuple or list follows in brackets.
    """
    around, _, key = name.rpartition(".")
    key, _, place = key.partition("[")
    try:
        found = getattr(model.get_submodule(around), key)
        found = found[int(place.rstrip("]"))] if place else found
    except (AttributeError, TypeError, IndexError):
        return None
    return found if type(found) is int else None


def _recount(model: nn.Module, name: str, number: int) -> None:
    """Set such a number."""
    around, _, key = name.rpartition(".")
    module = model.get_submodule(around)
    key, _, place = key.partition("[")
    if not place:
        setattr(module, key, number)
        return
    old = getattr(module, key)
    new = list(old)
    new[int(place.rstrip("]"))] = number
    setattr(module, key, type(old)(new))


def _groups_left(small: nn.Module, plan: Plan) -> Iterator[tuple[Any, int]]:
    """Convolutions that lose whole groups, and how many they keep: their weights' shapes do not tell."""
    gone = plan.graph.vanished(plan.keep)
    for name, mask in plan.keep.items():
        if plan.graph[name].kind == "bundle":
            for member in plan.graph[name].of_role("affine"):
                module = small.get_submodule(member.layer) if member.param not in gone else None
                depthwise = isinstance(module, _ConvNd) and module.groups == module.in_channels
                if isinstance(module, _ConvNd) and not depthwise:
                    yield module, int(mask.sum())
