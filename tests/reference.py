"""Slow and obvious versions of what the library computes: dense Jacobians, and surgery on state dicts by hand.

Nothing here imports `tpvprune.scoring`; of a graph only the table of members is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpvprune.types import Graph, Group


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
    """`M` of every sample, `(batch, outputs, outputs)`: the identity, or `diag(p) - p p^T`."""
    if head == "logits":
        return torch.eye(outputs.shape[1], dtype=outputs.dtype).expand(len(outputs), -1, -1)
    p = outputs.softmax(1)
    return torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)


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
