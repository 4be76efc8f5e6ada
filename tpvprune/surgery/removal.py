"""Slice a plan's units out of a copy of a network, and zero the weights it masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from tpvprune.errors import InternalError, PlanError
from tpvprune.held import held_by, plans_in
from tpvprune.kinds import as_verb
from tpvprune.layers import counted, cut, touched
from tpvprune.plan import Plan, attach, plan_of


@as_verb
@torch.no_grad()
def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """A new, smaller model without the plan's units and with its masked weights at zero; the old one is untouched.

    All slices are taken in the coordinates of the model the plan was traced from, so the order of the
    groups does not matter. A skipped block becomes an `nn.Identity`. The new model carries its plan;
    applying a second plan composes the two. What a module inside holds at zero by a plan of its own (`mask`) stays
    zero: of a module that is cut it is part of the new model's plan, and that of the module is gone.

    Args:
        model: the model the plan's graph was traced from.
        plan: from `allocate`, `sparsify`, `Plan.load` or by hand.

    Raises:
        PlanError: the plan speaks of other tensors or shapes.
        ModelError: the model cannot be copied; what holds it up is named.
    """
    check_fits(model, plan)
    inside = _plans_of_parts(model, plan)
    plan, earlier = _with_zeros(plan, model, inside), plan_of(model)
    whole = earlier.compose(plan) if earlier is not None else plan
    small = cut(model, plan)
    left = plan.graph.sizes(plan.keep)
    for name, parameter in small.named_parameters():
        if tuple(parameter.shape) != left[name]:
            raise InternalError(f"{name!r} came out with shape {tuple(parameter.shape)}, the plan says {left[name]}")
    for name, mask in plan.weight_masks().items():
        parameter = small.get_parameter(name)
        parameter.masked_fill_(~mask.to(parameter.device), 0)
    for name, module in small.named_modules():
        if name in inside:
            attach(module, None)
    attach(small, whole)
    return small


def refitted(small: nn.Module, model: nn.Module, plan: Plan, refit: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """What a refit makes of `apply(model, plan)`, with `model` as its teacher.

    Where `model` was pruned before, `small` carries a plan of what that was made from. The refit is given the plan of
    its teacher instead, with what that holds at zero, and what comes out carries the whole one again.
    """
    earlier, whole = plan_of(model), plan_of(small)
    if earlier is None:
        return refit(small)
    attach(small, _with_zeros(plan, model, {**_plans_of_parts(model, plan), "": earlier}))
    try:
        found = refit(small)
    finally:
        attach(small, whole)
    attach(found, whole)
    return found


def _plans_of_parts(model: nn.Module, plan: Plan) -> dict[str, Plan]:
    """Plans of their own of the modules that a plan cuts."""
    changed = touched(plan) | plan.graph.vanished(plan.keep)
    return {
        name: inner
        for name, inner in plans_in(model).items()
        if name and any(param.startswith(f"{name}.") for param in changed)
    }


def _with_zeros(plan: Plan, model: nn.Module, inside: Mapping[str, Plan]) -> Plan:
    """A plan that also holds at zero what the plans of modules do."""
    if not inside:
        return plan
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {name: mask.clone() for name, mask in plan.weights.items()}
    for part, inner in inside.items():
        for parameter, zero in held_by(model, part, inner):
            name = names[id(parameter)]
            weights[name] = weights.get(name, torch.ones_like(zero, device="cpu")) & ~zero.cpu()
    return replace(plan, weights=weights)


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Refuse a model that is not the one a plan speaks of, as far as shapes and the numbers in its modules tell.

    Raises:
        PlanError: names the first tensor that is missing, extra or of another shape, or the first number of units.
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
    for name, (group, each) in plan.graph.counts.items():
        wanted, found = plan.graph[group].units * each, counted(model, name)
        if found != wanted:
            raise PlanError(
                f"the plan does not fit this {type(model).__name__}: {name} should be {wanted}, it is "
                f"{'missing' if found is None else found}; use the model the plan was traced from"
            )
