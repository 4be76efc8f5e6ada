"""What the references of the criteria share: a unit's weights in each member, and gradients of plain losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import reference
from tests.helpers import Built
from tpvprune.members import Group, Member

WEIGHTS = ("produce", "affine", "consume")


def is_bias(param: str) -> bool:
    return param.split(".")[-1] == "bias"


def unit_of(tensor: Tensor, group: Group, member: Member, unit: int) -> Tensor:
    """All entries of a tensor that belong to one unit, flat."""
    entries = reference.entries_of(group, member, unit)
    if member.dim is None:
        return torch.stack([tensor.reshape(-1)[entry] for entry in entries])
    return torch.cat([tensor.select(member.dim, entry).reshape(-1) for entry in entries])


def weight_members(model: nn.Module, group: Group, roles: tuple[str, ...] = WEIGHTS) -> Iterator[tuple[Member, Tensor]]:
    """Members that are parameters and no biases, each with its tensor."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for member in group.members:
        if member.role in roles and member.param in parameters and not is_bias(member.param):
            yield member, parameters[member.param]


def loss_gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Gradient of the mean cross-entropy in every parameter, by plain backward."""
    twin = copy.deepcopy(model).eval().requires_grad_(True)
    F.cross_entropy(twin(inputs), targets).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}


def squared_slices(model: nn.Module, group: Group, gradients: dict[str, Tensor]) -> Tensor:
    """Per unit, `sum over members of (sum over its slice of weight * gradient)^2`, biases left out."""
    out = torch.zeros(group.units, dtype=torch.float64)
    for unit in range(group.units):
        for member, weight in weight_members(model, group):
            effect = unit_of(weight, group, member, unit) * unit_of(gradients[member.param], group, member, unit)
            out[unit] += float(effect.sum()) ** 2
    return out


def labelled(b: Built, *sizes: int, seed: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Batches of the given sizes with random labels."""
    generator = torch.Generator().manual_seed(seed)
    classes = b.model(b.inputs).shape[1]
    shape = b.inputs.shape[1:]
    return [
        (
            torch.randn(size, *shape, generator=generator, dtype=torch.float64),
            torch.randint(classes, (size,), generator=generator),
        )
        for size in sizes
    ]
