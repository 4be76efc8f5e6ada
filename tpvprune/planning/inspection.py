"""What can leave a network, what that would save, and what cannot leave: all that is known before data is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tpvprune.budget import Budget
from tpvprune.kinds import as_verb
from tpvprune.members import WORK, Group, Member
from tpvprune.planning.blocks import RESIDUAL
from tpvprune.planning.widths import Costs, costs_of, widths_of
from tpvprune.types import REST, Graph

INSPECTION_FORMAT = 1
ALWAYS = ("macs", "params")
COUNTED = ("macs", "params", "bytes")  # a sum over the entries of tensors, so that it can be told who holds what
NO_LAYER = "they belong to no layer (as the products inside an attention that cannot be pruned)"
OUT_OF_REACH = "no group reaches them"


@dataclass(frozen=True)
class InspectedGroup:
    """What one group is made of and what it weighs. All shares are of the dense model's total, 0 to 1.

    Attributes:
        id: of the group.
        kind: what a unit is.
        units: how many there are.
        least: units that stay when the group is at its floor.
        width: channels that all units make together.
        writes: layers and loose parameters that write the units; none for a block, which leaves with all it holds.
        scales: layers that pass them on one by one: norms, depthwise convolutions.
        reads: layers that read them.
        holds: per counted quantity, the share that would be gone with all of its units: whatever writes, scales or
            reads them. A weight between two groups is held by both, so the shares of all groups may add up to
            more than one.
        saves: per quantity, the share that is saved when this group alone is cut to its floor.
    """

    id: str
    kind: str
    units: int
    least: int
    width: int
    writes: tuple[str, ...]
    scales: tuple[str, ...]
    reads: tuple[str, ...]
    holds: Mapping[str, float]
    saves: Mapping[str, float]


@dataclass(frozen=True)
class Unprunable:
    """Layers whose outputs stay whole for one reason. Other groups may still narrow what they read.

    Attributes:
        reason: why; where layers differ in a name alone it is written `'*'`.
        layers: which, in the order of the network.
        holds: per counted quantity, their share of the dense model's total.
        left: the same once every group is at its floor, still as a share of the dense total.
    """

    reason: str
    layers: tuple[str, ...]
    holds: Mapping[str, float]
    left: Mapping[str, float]


@dataclass(frozen=True)
class Ask:
    """One bound of a budget, held against the floor.

    Attributes:
        quantity: what is bounded.
        as_written: the bound as it was given.
        at_most: the bound in absolute numbers; None for drift, which only scores can tell.
        floor: the least that can be left; None for drift.
        reachable: whether the bound is no less than the floor; None for drift.
    """

    quantity: str
    as_written: float | str
    at_most: float | None
    floor: float | None
    reachable: bool | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        model_id: fingerprint of the architecture.
        totals: per quantity, what the dense model costs.
        floors: per quantity, what is left with every group at its floor: no budget can be met below.
        untouched: per counted quantity, the share of the dense total that no plan changes at all.
        min_keep: least share of every group's units that stays, which the floors follow from.
        groups: in execution order.
        unprunable: what stays whole, by reason; the reason that holds most comes first.
        asks: the bounds that were asked about.
    """

    model_id: str
    totals: Mapping[str, float]
    floors: Mapping[str, float]
    untouched: Mapping[str, float]
    min_keep: float
    groups: tuple[InspectedGroup, ...]
    unprunable: tuple[Unprunable, ...]
    asks: tuple[Ask, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"format": INSPECTION_FORMAT, **asdict(self)}


@as_verb
def inspect(graph: Graph, budget: Budget | None = None, *, costs: Mapping[str, Costs] | None = None) -> Inspection:
    """Say what a graph's groups weigh, how far a model can shrink, and what cannot shrink.

    Args:
        graph: from `trace`.
        budget: whose floors (`min_keep`, `protect`, `per_group`, `round_to`) hold and whose bounds are judged; the
            default floors, and nothing to judge, if left out.
        costs: further quantities to show, by name, each at the widths of `graph`; they are given back as they came.
            Multiply-adds, parameters and what the budget bounds are there without.

    Raises:
        BudgetError: a pattern of the budget matches nothing.
        PlanError: the budget bounds a cost that does not follow from the graph and is not among `costs`.
    """
    limits = budget or Budget(macs=1.0)
    least = {name: widths[-1] for name, widths in widths_of(graph, limits).items()}
    named = dict.fromkeys((*ALWAYS, *(budget.quantities if budget else ())))
    every = {name: costs_of(name, graph) for name in named if name not in (costs or {})} | dict(costs or {})
    totals = {name: cost.total for name, cost in every.items()}
    groups = tuple(_group(group, least[group.id], every, totals) for group in graph.groups)
    floors = {name: _floor(graph, cost, least) for name, cost in every.items()}
    counted = tuple(name for name in every if name in COUNTED and name not in (costs or {}))
    touched = {member.param for group in graph.groups for member in group.members}
    fixed = {name: _by_tensor(graph, name) for name in counted}
    return Inspection(
        model_id=graph.model_id,
        totals=totals,
        floors=floors,
        untouched={
            name: _share(sum(value for tensor, value in held.items() if tensor not in touched), totals[name])
            for name, held in fixed.items()
        },
        min_keep=limits.min_keep,
        groups=groups,
        unprunable=_unprunable(graph, least, counted, totals),
        asks=() if budget is None else _asks(budget, totals, floors),
    )


def _group(group: Group, least: int, costs: Mapping[str, Costs], totals: Mapping[str, float]) -> InspectedGroup:
    sides = group.of_role("consume") if group.kind == "head" else group.of_role("produce")
    return InspectedGroup(
        id=group.id,
        kind=group.kind,
        units=group.units,
        least=least,
        width=group.units * min((member.width() for member in sides), default=1),
        writes=_layers(group.of_role("produce")),
        scales=_layers(group.of_role("affine")),
        reads=_layers(group.of_role("consume")),
        holds={n: _share(c.saving(group, group.units), totals[n]) for n, c in costs.items() if n in COUNTED},
        saves={n: _share(c.saving(group, group.units - least), totals[n]) for n, c in costs.items()},
    )


def _layers(members: Iterable[Member]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(member.layer or member.param for member in members))


def _share(part: float, total: float) -> float:
    return part / total if total else 0.0


def _floor(graph: Graph, cost: Costs, least: Mapping[str, int]) -> float:
    for group in graph.groups:
        cost.remove(group, group.units - least[group.id])
    found = cost.total
    for group in graph.groups:
        cost.remove(group, least[group.id] - group.units)
    return found


def _asks(budget: Budget, totals: Mapping[str, float], floors: Mapping[str, float]) -> tuple[Ask, ...]:
    found = []
    for name in budget.quantities:
        bound = budget.bound(name, totals[name])
        found.append(Ask(name, budget.as_written[name], bound, floors[name], floors[name] <= bound))
    if budget.drift is not None:
        found.append(Ask("drift", budget.drift, None, None, None))
    return tuple(found)


def _by_tensor(graph: Graph, quantity: str, keep: Mapping[str, Tensor] | None = None) -> dict[str, int]:
    """What each tensor costs, once only the units in `keep` are left."""
    sizes = graph.sizes(keep)
    return {name: times * math.prod(sizes[name]) for name, times in graph.times(quantity).items()}


def _unprunable(
    graph: Graph, least: Mapping[str, int], counted: Iterable[str], totals: Mapping[str, float]
) -> tuple[Unprunable, ...]:
    keep = {group.id: torch.arange(group.units) < least[group.id] for group in graph.groups}
    layers = {reason: list(names) for reason, names in reasons_of(graph.skipped).items()}
    # That a block cannot be skipped is no reason for a layer in it to stay whole.
    why = {layer: reason for reason, names in layers.items() for layer in names if not reason.startswith(RESIDUAL)}
    shaped = {m.param for g in graph.groups for m in g.members if m.role != "consume"}
    touched = shaped | {m.param for g in graph.groups for m in g.of_role("consume")}
    sums: dict[str, dict[str, list[int]]] = {}
    for quantity in counted:
        dense, floor = _by_tensor(graph, quantity), _by_tensor(graph, quantity, keep)
        for tensor, cost in dense.items():
            reason = _reason(tensor, why, shaped, touched)
            if reason is None or not cost or (tensor == REST and quantity != "macs"):
                continue
            both = sums.setdefault(reason, {}).setdefault(quantity, [0, 0])
            both[0] += cost
            both[1] += floor[tensor]
            if reason == OUT_OF_REACH:
                layers.setdefault(reason, []).append(tensor.rpartition(".")[0] or tensor)
    found = []
    for reason in dict.fromkeys([*layers, *sums]):
        held = sums.get(reason, {})
        shares = [{n: _share(held.get(n, [0, 0])[i], totals[n]) for n in counted} for i in (0, 1)]
        found.append(Unprunable(reason, tuple(dict.fromkeys(layers.get(reason, ()))), *shares))
    return tuple(sorted(found, key=lambda row: -row.holds.get("macs", 0.0)))


def _reason(tensor: str, why: Mapping[str, str], shaped: set[str], touched: set[str]) -> str | None:
    """Why a tensor stays whole on its writing side; None where it does not."""
    if tensor == REST:
        return NO_LAYER
    layer = tensor.split(WORK)[0] if WORK in tensor else tensor.rpartition(".")[0]
    if layer in why:
        return why[layer]
    if tensor in shaped:
        return None
    parts = layer.split(".")
    above = next((".".join(parts[:end]) for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in why), None)
    if above is not None:
        return why[above]
    return None if tensor in touched else OUT_OF_REACH


def reasons_of(skipped: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Layers by the reason they stay whole; reasons that differ in a quoted name alone are one, with `'*'` for it."""
    alike: dict[str, list[str]] = {}
    for layer, reason in skipped.items():
        alike.setdefault(re.sub(r"'[^']*'", "'*'", reason), []).append(layer)
    found = {}
    for pattern, layers in alike.items():
        one = {skipped[layer] for layer in layers}
        found[one.pop() if len(one) == 1 else pattern] = tuple(layers)
    return found
