"""Which widths a group may have, and what a network costs while its groups shrink."""

from __future__ import annotations

import math
from collections import defaultdict

import torch

from tpvprune.budget import Budget
from tpvprune.errors import BudgetError
from tpvprune.planning.patterns import matching_groups
from tpvprune.types import Graph, Group

ROUND_WIDE = 8
WIDTHS_TO_CHOOSE = 8


def floors_of(graph: Graph, budget: Budget) -> dict[str, int]:
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


def step_of(group: Group, budget: Budget) -> int:
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


def kept_widths(group: Group, floor: int, budget: Budget) -> list[int]:
    """Units a group may keep, from all of them down: multiples of its step that are no less than the floor."""
    step = step_of(group, budget)
    return [group.units, *(k for k in range(group.units - 1, floor - 1, -1) if k % step == 0)]


def check_reachable(graph: Graph, budget: Budget) -> None:
    """Refuse a budget that no plan can meet, before any scoring is done.

    Raises:
        BudgetError: the bound lies below the floor (names it and what holds it), or a pattern matches nothing.
    """
    floors, bound = floors_of(graph, budget), budget.bound(graph)
    keep = {}
    for group in graph.groups:
        mask = torch.ones(group.units, dtype=torch.bool)
        mask[kept_widths(group, floors[group.id], budget)[-1] :] = False
        keep[group.id] = mask
    floor = graph.cost(budget.quantity, keep)
    if floor <= bound:
        return
    dense = graph.cost(budget.quantity)
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


class Cost:
    """Exact cost of a network while its groups shrink, and what one more step would save.

    Args:
        graph: from `trace`.
        quantity: macs, params or units.
    """

    def __init__(self, graph: Graph, quantity: str) -> None:
        self.each = 1 if quantity == "units" else 0  # what a unit counts by itself
        times = {"macs": dict(graph.reuse), "params": dict.fromkeys(graph.parameters, 1), "units": {}}[quantity]
        self.sizes = {name: list(graph.shapes[name]) for name in times}
        self.times = times
        self.total = graph.cost(quantity)
        self.slopes: dict[str, list[tuple[str, int, int]]] = {
            g.id: [(m.param, m.axis, m.width()) for m in g.members if m.param in times] for g in graph.groups
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
        return before - after + self.each * units

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
