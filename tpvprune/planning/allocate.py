"""Turn scores into a plan: which units leave so that a budget holds, at the least predicted drift."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvprune.budget import Budget
from tpvprune.errors import BudgetError, PlanError
from tpvprune.plan import Plan
from tpvprune.planning.patterns import matching_groups
from tpvprune.scores import Scores
from tpvprune.types import Graph, Group

ROUND_WIDE = 8
WIDTHS_TO_CHOOSE = 8


def allocate(scores: Scores, graph: Graph, budget: Budget) -> Plan:
    """Remove, step by step, the units that cost the least predicted drift per multiply-add (or parameter).

    Units of one group leave in the order of their scores, in steps of the group's rounding; groups compete
    by summed score over what the step saves at the widths of that moment. Last, steps that turned out
    unnecessary are taken back, dearest first, so that the plan ends close below the bound.

    Args:
        scores: from `score`, for this graph.
        graph: from `trace`.
        budget: what is bounded, and what stays whole.

    Returns:
        A plan whose cost is at most the bound; `Plan.macs` and `Plan.params` are exact.

    Raises:
        PlanError: the scores belong to another model or lack a group.
        BudgetError: a pattern matches nothing, or the bound lies below what the floors allow.
    """
    if scores.model_id != graph.model_id:
        raise PlanError(f"the scores are of model {scores.model_id}, the graph of {graph.model_id}; score again")
    for group in graph.groups:
        if group.id not in scores.values or len(scores.values[group.id]) != group.units:
            raise PlanError(f"the scores lack group {group.id!r} with its {group.units} units; score again")
    check_reachable(graph, budget)
    floors = _floors(graph, budget)
    bound = budget.bound(graph)
    ladders = [_ladder(g, scores.values[g.id], _kept_widths(g, floors[g.id], budget)) for g in graph.groups]

    cost = _Cost(graph, budget.quantity)
    taken: list[tuple[_Ladder, float]] = []
    ratios: dict[int, float] = {}
    while cost.total > bound:
        for number, ladder in enumerate(ladders):
            if number not in ratios and ladder.left:
                saved = cost.saving(ladder.group, ladder.next_units)
                ratios[number] = ladder.next_score / saved if saved else math.inf
        best = min(ratios, key=lambda number: ratios[number])
        ladder = ladders[best]
        taken.append((ladder, ratios[best]))
        cost.remove(ladder.group, ladder.next_units)
        ladder.taken += 1
        for number, other in enumerate(ladders):
            if number == best or cost.touches(ladder.group, other.group):
                ratios.pop(number, None)
    for ladder, _ in sorted(taken, key=lambda step: -step[1]):
        ladder.taken -= 1
        if cost.total - cost.saving(ladder.group, -ladder.next_units) <= bound:
            cost.remove(ladder.group, -ladder.next_units)
        else:
            ladder.taken += 1
    keep = {ladder.group.id: ladder.mask() for ladder in ladders if ladder.taken}
    made_by = {
        "allocator": "global",
        "rank": f"score per {budget.quantity}",
        "criterion": scores.criterion,
        "samples": scores.samples,
        "asked": {budget.quantity: bound},
    }
    return Plan(keep, graph, made_by)


def _floors(graph: Graph, budget: Budget) -> dict[str, int]:
    """Least units of each group that stay."""
    share = {group.id: budget.min_keep for group in graph.groups}
    for pattern, least in budget.per_group.items():
        for group in matching_groups(graph, pattern):
            share[group.id] = least
    for pattern in budget.protect:
        for group in matching_groups(graph, pattern):
            share[group.id] = 1.0
    return {g.id: max(_least(g), math.ceil(share[g.id] * g.units - 1e-9)) for g in graph.groups}


def _least(group: Group) -> int:
    """A grouped convolution left with one channel a group would turn into a depthwise one."""
    return 2 if group.kind == "channel" and any(m.width() > 1 for m in group.members) else 1


def _step(group: Group, budget: Budget) -> int:
    """Units of a group that leave together, so that its width stays a multiple of the rounding."""
    channels = max(m.width() for m in group.of_role("consume"))
    if group.kind == "head":
        return 1
    if budget.round_to is not None:
        wanted = budget.round_to
    else:
        room = max(1, group.units * channels // WIDTHS_TO_CHOOSE)
        wanted = min(ROUND_WIDE, 1 << (room.bit_length() - 1))
    return wanted // math.gcd(wanted, channels)


@dataclass
class _Ladder:
    """The steps in which one group can shrink: cheapest units first."""

    group: Group
    order: Tensor  # units, least score first
    cumulative: Tensor  # score of the first n units of `order`, n from 0
    sizes: list[int]  # units that have left after 0, 1, 2, ... steps
    taken: int = 0

    @property
    def left(self) -> bool:
        return self.taken + 1 < len(self.sizes)

    @property
    def next_units(self) -> int:
        return self.sizes[self.taken + 1] - self.sizes[self.taken]

    @property
    def next_score(self) -> float:
        return float(self.cumulative[self.sizes[self.taken + 1]] - self.cumulative[self.sizes[self.taken]])

    def mask(self) -> Tensor:
        mask = torch.ones(self.group.units, dtype=torch.bool)
        mask[self.order[: self.sizes[self.taken]]] = False
        return mask


def _kept_widths(group: Group, floor: int, budget: Budget) -> list[int]:
    """Units a group may keep, from all of them down: multiples of its step that are no less than the floor."""
    step = _step(group, budget)
    return [group.units, *(k for k in range(group.units - 1, floor - 1, -1) if k % step == 0)]


def _ladder(group: Group, values: Tensor, widths: list[int]) -> _Ladder:
    order = values.double().argsort(stable=True)
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), values.double()[order].cumsum(0)])
    return _Ladder(group, order, cumulative, [group.units - kept for kept in widths])


def check_reachable(graph: Graph, budget: Budget) -> None:
    """Refuse a budget that no plan can meet, before any scoring is done.

    Raises:
        BudgetError: the bound lies below the floor (names it and what holds it), or a pattern matches nothing.
    """
    floors, bound = _floors(graph, budget), budget.bound(graph)
    keep = {}
    for group in graph.groups:
        mask = torch.ones(group.units, dtype=torch.bool)
        mask[_kept_widths(group, floors[group.id], budget)[-1] :] = False
        keep[group.id] = mask
    floor = graph.macs(keep) if budget.quantity == "macs" else graph.params(keep)
    if floor <= bound:
        return
    dense = graph.macs() if budget.quantity == "macs" else graph.params()
    whole = [g.id for g in graph.groups if floors[g.id] == g.units]
    held = [f"min_keep={budget.min_keep:g}"]
    if whole:
        named = ", ".join(whole[:3]) + (", ..." if len(whole) > 3 else "")
        held.append(f"{len(whole)} protected groups ({named})")
    if graph.skipped:
        held.append(f"{len(graph.skipped)} layers that cannot be pruned")
    raise BudgetError(
        f"{budget.quantity} <= {bound:,} cannot be reached: the floor is {floor:,} "
        f"({floor / dense:.1%} of {dense:,}), held by {', '.join(held)}; ask for more than the floor, lower "
        "min_keep or protect less"
    )


class _Cost:
    """Exact cost of a network while its groups shrink, and what one more step would save."""

    def __init__(self, graph: Graph, quantity: str) -> None:
        times = graph.reuse if quantity == "macs" else dict.fromkeys(graph.parameters, 1)
        self.sizes = {name: list(graph.shapes[name]) for name in times}
        self.times = times
        self.total = sum(self._of(name) for name in times)
        self.slopes: dict[str, list[tuple[str, int, int]]] = {
            g.id: [(m.param, m.dim, m.width()) for m in g.members if m.param in times] for g in graph.groups
        }
        readers: dict[str, set[str]] = defaultdict(set)
        for group_id, sides in self.slopes.items():
            for name, _, _ in sides:
                readers[name].add(group_id)
        self.neighbours = {
            group_id: set().union(*(readers[name] for name, _, _ in sides)) for group_id, sides in self.slopes.items()
        }

    def _of(self, name: str) -> int:
        return self.times[name] * math.prod(self.sizes[name])

    def saving(self, group: Group, units: int) -> int:
        """What removing `units` more units would save now; with negative `units`, minus what they would cost."""
        names = {name for name, _, _ in self.slopes[group.id]}
        before = sum(self._of(name) for name in names)
        self._shrink(group, units)
        after = sum(self._of(name) for name in names)
        self._shrink(group, -units)
        return before - after

    def remove(self, group: Group, units: int) -> None:
        """Shrink (or, with negative `units`, widen) a group."""
        self.total -= self.saving(group, units)
        self._shrink(group, units)

    def _shrink(self, group: Group, units: int) -> None:
        for name, dim, width in self.slopes[group.id]:
            self.sizes[name][dim] -= units * width

    def touches(self, group: Group, other: Group) -> bool:
        """Whether shrinking one group changes what a step of the other saves."""
        return other.id in self.neighbours[group.id]
