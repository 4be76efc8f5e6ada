"""Slice a plan's units out of a copy of a network, and zero the weights it masks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tpvprune.errors import InternalError, PlanError
from tpvprune.layers import refresh, replace
from tpvprune.plan import Plan, attach, plan_of


@torch.no_grad()
def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A new, smaller model without the plan's units and with its masked weights at zero; the old one is untouched.

    All slices are taken in the coordinates of the model the plan was traced from, so the order of the
    groups does not matter. A skipped block becomes an `nn.Identity`. The new model carries its plan;
    applying a second plan composes the two.

    Args:
        model: the model the plan's graph was traced from.
        plan: from `allocate`, `sparsify`, `Plan.load` or by hand.

    Raises:
        PlanError: the plan speaks of other tensors or shapes.
    """
    check_fits(model, plan)
    earlier = plan_of(model)
    whole = earlier.compose(plan) if earlier is not None else plan
    small = copy.deepcopy(model)
    touched = {m.param for name, mask in plan.keep.items() if not bool(mask.all()) for m in plan.graph[name].members}
    for name in sorted(touched - plan.graph.vanished(plan.keep)):
        if "#" in name:
            continue
        layer, _, key = name.rpartition(".")
        owner = small.get_submodule(layer)
        replace(owner, key, plan.cut(name, getattr(owner, key).detach()))
    for name, mask in plan.keep.items():
        if plan.graph[name].kind == "block" and not bool(mask.any()):
            around, _, key = name.rpartition(".")
            setattr(small.get_submodule(around), key, nn.Identity().train(small.get_submodule(name).training))
    for module, count in _groups_left(small, plan):
        module.groups = count
    for module in small.modules():
        refresh(module)
    left = plan.graph.sizes(plan.keep)
    for name, parameter in small.named_parameters():
        if tuple(parameter.shape) != left[name]:
            raise InternalError(f"{name!r} came out with shape {tuple(parameter.shape)}, the plan says {left[name]}")
    for name, mask in plan.weight_masks().items():
        parameter = small.get_parameter(name)
        parameter.masked_fill_(~mask.to(parameter.device), 0)
    attach(small, whole)
    return small


def _groups_left(small: nn.Module, plan: Plan) -> Iterator[tuple[Any, int]]:
    """Convolutions that lose whole groups, and how many they keep: their weights' shapes do not tell."""
    gone = plan.graph.vanished(plan.keep)
    for name, mask in plan.keep.items():
        if plan.graph[name].kind == "bundle":
            for member in plan.graph[name].of_role("affine"):
                module = small.get_submodule(member.layer) if member.param not in gone else None
                depthwise = isinstance(module, _ConvNd) and module.groups == module.in_channels == module.out_channels
                if isinstance(module, _ConvNd) and not depthwise:
                    yield module, int(mask.sum())


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Refuse a model whose tensors are not the ones the plan speaks of.

    Raises:
        PlanError: names the first tensor that is missing, extra or of another shape.
    """
    have = {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, shape in plan.graph.shapes.items():
        if "#" not in name and have.get(name) != shape:
            raise PlanError(
                f"the plan does not fit this {type(model).__name__}: {name!r} should be {shape}, "
                f"it is {have.get(name, 'missing')}; use the model the plan was traced from"
            )
    extra = next((name for name, _ in model.named_parameters() if name not in plan.graph.shapes), None)
    if extra is not None:
        raise PlanError(f"the plan does not fit this {type(model).__name__}: it does not know parameter {extra!r}")
