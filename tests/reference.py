"""Slow and obvious versions of what the library computes: dense Jacobians, and surgery on state dicts by hand.

Nothing here imports `tpvprune.scoring`; of a graph only the table of members is read.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpvprune.members import Group
from tpvprune.types import Graph


def jacobians(model: nn.Module, inputs: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """Per parameter, the dense Jacobian of the outputs, `(batch, outputs, *parameter)`."""
    model = copy.deepcopy(model).eval()
    every = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wanted = {name: every[name] for name in names}

    def outputs(some: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, {**every, **some}, (x.unsqueeze(0),)).squeeze(0)

    with sdpa_kernel(SDPBackend.MATH):
        rows = [jacrev(outputs)(wanted, x) for x in inputs]
    return {name: torch.stack([row[name] for row in rows]) for name in wanted}


def metric(outputs: Tensor, head: str) -> Tensor:
    """`M` of every sample, `(batch, outputs, outputs)`, from the definition of each head."""
    return torch.stack([_metric(row, head) for row in outputs])


def _metric(o: Tensor, head: str) -> Tensor:
    eye, p = torch.eye(len(o), dtype=o.dtype), o.softmax(0)
    fisher = torch.diag(p) - torch.outer(p, p)
    if head == "margin":
        top = int(o.argmax())
        total = torch.zeros_like(eye)
        for j in range(len(o)):
            if j != top:
                step = eye[top] - eye[j]
                total += p[j] / (1 - p[top]) * torch.outer(step, step)
        return total
    if head == "cosine":
        return (eye - torch.outer(o, o) / (o @ o)) / (o @ o)
    return {"logits": eye, "features": eye, "softmax": fisher, "probabilities": fisher @ fisher}[head]


def metric_by_autograd(o: Tensor, head: str) -> Tensor:
    """`M` of one sample's outputs, by differentiating what the head measures the distance of."""
    fixed = o.softmax(0)
    if head == "softmax":  # half of it is KL to second order
        return jacrev(jacrev(lambda z: (fixed * (fixed.log() - z.log_softmax(0))).sum()))(o)
    top = int(o.argmax())
    rest = torch.where(torch.arange(len(o)) == top, 0, fixed / (1 - fixed[top]))
    measured = {
        "logits": lambda z: z,
        "features": lambda z: z,
        "probabilities": lambda z: z.softmax(0),
        "margin": lambda z: rest.sqrt() * (z[top] - z),
        "cosine": lambda z: z / z.square().sum().sqrt(),
    }
    jacobian = jacrev(measured[head])(o)
    return jacobian.T @ jacobian


def entries_of(group: Group, member: object, unit: int) -> list[int]:
    """Entries of one unit in one tensor, as plain integers."""
    return [unit] if member.index is None else [int(e) for e in member.index[unit]]  # type: ignore[attr-defined]


def effects(model: nn.Module, jacobian: Mapping[str, Tensor], group: Group, over: str) -> dict[tuple[str, str], Tensor]:
    """First-order change of the outputs when each unit leaves, `(batch, outputs, units)` per perturbed layer.

    For `over="consume"` there is one entry: all consumers change at once.
    """
    roles = ("consume",) if over == "consume" else ("produce", "affine", "consume")
    parameters = dict(model.named_parameters())
    out: dict[tuple[str, str], Tensor] = {}
    for member in group.of_role(*roles):
        weight, columns = parameters[member.param].detach(), []
        for unit in range(group.units):
            delta = torch.zeros_like(weight)
            for entry in entries_of(group, member, unit):
                delta.select(member.dim, entry).copy_(-weight.select(member.dim, entry))
            columns.append(jacobian[member.param].flatten(2) @ delta.flatten())
        change = torch.stack(columns, 2)
        key = ("", "consume") if over == "consume" else (member.layer, "in" if member.role == "consume" else "out")
        out[key] = out[key] + change if key in out else change
    return out


def tpv(model: nn.Module, inputs: Tensor, graph: Graph, head: str, over: str) -> dict[str, Tensor]:
    """`mean_x d^T J^T M J d` of every unit, summed over the layers of `over="all"`."""
    perturbed = {m.param for g in graph.groups for m in g.of_role("produce", "affine", "consume")}
    jacobian = jacobians(model, inputs, perturbed)
    with torch.no_grad():
        m = metric(model(inputs), head)
    return {
        group.id: sum(
            torch.einsum("bku,bkl,blu->bu", change, m, change).mean(0)
            for change in effects(model, jacobian, group, over).values()
        )
        for group in graph.groups
    }


class _Mixed(nn.Module):
    """`alpha * block(x) + (1 - alpha) * x`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.alpha = block, torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        given = x.clone()
        return self.alpha * self.block(x) + (1 - self.alpha) * given


def block_effect(model: nn.Module, inputs: Tensor, block: str) -> Tensor:
    """Derivative of the outputs along the way from a block to the identity, `(batch, outputs)`, in forward mode."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    owner, _, key = block.rpartition(".")
    mixed = _Mixed(model.get_submodule(block))
    model.get_submodule(owner)._modules[key] = mixed

    def outputs(alpha: Tensor) -> Tensor:
        mixed.alpha = alpha
        return model(inputs)

    one = torch.ones((), dtype=inputs.dtype)
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns of itself when it first meets forward mode
        return jvp(outputs, (one,), (-one,))[1]


def plan_tpv(model: nn.Module, inputs: Tensor, graph: Graph, gone: Mapping[str, list[int]], head: str) -> float:
    """TPV of removing many units at once, covariances included."""
    perturbed = {m.param for name in gone for m in graph[name].of_role("consume")}
    jacobian = jacobians(model, inputs, perturbed)
    with torch.no_grad():
        m = metric(model(inputs), head)
    total = sum(
        effects(model, jacobian, graph[name], "consume")["", "consume"][:, :, units].sum(2)
        for name, units in gone.items()
    )
    return float(torch.einsum("bk,bkl,bl->b", total, m, total).mean())


def unit_masks(group: Group, member: object, weight: Tensor) -> Tensor:
    """One where a weight belongs to a unit, `(units, *weight)`."""
    masks = torch.zeros(group.units, *weight.shape, dtype=weight.dtype)
    for unit in range(group.units):
        for entry in entries_of(group, member, unit):
            if member.dim is None:  # type: ignore[attr-defined]
                masks[unit].view(-1)[entry] = 1
            else:
                masks[unit].select(member.dim, entry).fill_(1)  # type: ignore[attr-defined]
    return masks


Moments = Callable[[str, Tensor], tuple[Tensor, Tensor]]


def removal(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of what removing a weight adds to it."""
    return -weight, torch.zeros_like(weight)


def perturbed_tpv(
    model: nn.Module, inputs: Tensor, graph: Graph, head: str, moments: Moments = removal
) -> dict[str, Tensor]:
    """`E_x E_d d^T J^T M J d` of every unit: its consumers' weights move by `mean` together, plus independent noise."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = jacobians(model, inputs, {m.param for g in graph.groups for m in g.of_role("consume")})
    with torch.no_grad():
        m = metric(model(inputs), head)
    scores = {}
    for group in graph.groups:
        change = noise = torch.zeros((), dtype=inputs.dtype)
        for member in group.of_role("consume"):
            masks = unit_masks(group, member, weights[member.param]).flatten(1)
            j = jacobian[member.param].flatten(2)
            mean, variance = (moment.flatten() for moment in moments(member.param, weights[member.param]))
            change = change + torch.einsum("bkp,up->bku", j * mean, masks)
            noise = noise + (torch.einsum("bkp,bkl,blp->bp", j, m, j) * variance) @ masks.T
        scores[group.id] = (torch.einsum("bku,bkl,blu->bu", change, m, change) + noise).mean(0)
    return scores


def zeroed(model: nn.Module, graph: Graph, gone: Mapping[str, list[int]]) -> nn.Module:
    """A copy in which everything that reads the units is zero."""
    out = copy.deepcopy(model)
    state = out.state_dict()
    for name, units in gone.items():
        for member in graph[name].of_role("consume"):
            for unit in units:
                for entry in entries_of(graph[name], member, unit):
                    state[member.param].select(member.dim, entry).zero_()
    return out


def sliced(model: nn.Module, graph: Graph, gone: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The state dict with the entries of the units cut out by numpy."""
    drop: dict[tuple[str, int], list[int]] = {}
    for name, units in gone.items():
        for member in graph[name].members:
            for unit in units:
                drop.setdefault((member.param, member.dim), []).extend(entries_of(graph[name], member, unit))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for (param, dim), entries in drop.items():
        if param in state:
            state[param] = np.delete(state[param], entries, axis=dim)
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}


def ridge_refit(
    inputs: np.ndarray, wanted: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, ridge: float, free_bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weights `(outputs, inputs)` and bias `(outputs,)` by one augmented least-squares problem.

    Minimises `mean |wanted - inputs W^T - b|^2 + ridge * v * |W - weight|^2` with `v` the mean variance (mean
    square, if the bias may not move) of the inputs.
    """
    rows = len(inputs)
    offset = inputs.mean(0) if free_bias else np.zeros(inputs.shape[1])
    residual = wanted - inputs @ weight.T - (0 if bias is None else bias)
    middle = residual.mean(0) if free_bias else np.zeros(residual.shape[1])
    x, y = (inputs - offset) / rows**0.5, (residual - middle) / rows**0.5
    pull = (ridge * (x**2).sum(0).mean()) ** 0.5 * np.eye(x.shape[1])
    change = np.linalg.lstsq(np.vstack([x, pull]), np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    return weight + change.T, (0 if bias is None else bias) + middle - offset @ change
