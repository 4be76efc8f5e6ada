"""Silence a plan's units in a copy of a network, without changing a shape."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tpvprune.plan import Plan
from tpvprune.surgery.removal import check_fits


@torch.no_grad()
def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the same shape in which the plan's units are silenced: what reads them is zero.

    Of a skipped block all parameters are zero, which leaves its input. Equal to `apply` where
    `Group.exact_mask` holds; where a normaliser pools over the units it is not.

    Raises:
        PlanError: the plan speaks of other tensors or shapes.
    """
    check_fits(model, plan)
    masked = copy.deepcopy(model)
    parameters = dict(masked.named_parameters())
    for name, keep in plan.keep.items():
        group = plan.graph[name]
        for member in group.of_role("consume"):
            tensor = parameters[member.param]
            gone = member.entries(group.units)[~keep].flatten().to(tensor.device)
            if member.dim is None:
                tensor.view(-1).index_fill_(0, gone, 0)
            else:
                tensor.index_fill_(member.dim, gone, 0)
    for name in plan.graph.vanished(plan.keep) & set(parameters):
        parameters[name].zero_()
    return masked
