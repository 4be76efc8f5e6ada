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
    """Least units of each group that stay.

    `min_keep` is about what is left of a layer, and holds no block; a pattern that names a layer holds the blocks
    around it.
    """
    share = {group.id: 0.0 if group.kind == "block" else budget.min_keep for group in graph.groups}
    for pattern, least in budget.per_group.items():
        for group in matching_groups(graph, pattern):
            share[group.id] = least
    for pattern in budget.protect:
        for group in matching_groups(graph, pattern):
            share[group.id] = 1.0
    return {g.id: max(_least(g), math.ceil(share[g.id] * g.units - 1e-9)) for g in graph.groups}


def _least(group: Group) -> int:
    """What keeps a convolution one of its kind: two channels a group, two groups. A block may go."""
    if group.kind == "block":
        return 0
    return 2 if group.kind in ("channel", "bundle") and any(m.width() > 1 for m in group.members) else 1


def step_of(group: Group, budget: Budget) -> int:
    """Units of a group that leave together, so that its width stays a multiple of the rounding."""
    if group.kind in ("head", "block"):
        return 1
    channels = max(m.width() for m in group.of_role("consume"))
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

    Tensors of a skipped block cost nothing, whatever else shrinks them.
    """

    def __init__(self, graph: Graph, quantity: str) -> None:
        blocks = {g.id: {m.param for m in g.members} for g in graph.groups if g.kind == "block"}
        if quantity == "units":  # each group is a tensor of its units
            self.times = {g.id: 1 for g in graph.groups}
            self.sizes = {g.id: [g.units] for g in graph.groups}
            self.slopes = {g.id: [(g.id, 0, 1)] for g in graph.groups}
            blocks = {name: {name, *graph.within(name)} for name in blocks}
        else:
            self.times = dict(graph.reuse) if quantity == "macs" else dict.fromkeys(graph.parameters, 1)
            self.sizes = {name: list(graph.shapes[name]) for name in self.times}
            members = {g.id: g.members if g.kind != "block" else () for g in graph.groups}
            self.slopes = {
                name: [(m.param, m.axis, m.width()) for m in own if m.param in self.times]
                for name, own in members.items()
            }
        self.total = graph.cost(quantity)
        self.blocks = {name: tensors & set(self.times) for name, tensors in blocks.items()}
        self.gone: set[str] = set()  # tensors of skipped blocks
        self.tensors = {
            name: {tensor for tensor, _, _ in own} | self.blocks.get(name, set()) for name, own in self.slopes.items()
        }
        readers: dict[str, set[str]] = defaultdict(set)
        for group_id, names in self.tensors.items():
            for name in names:
                readers[name].add(group_id)
        self.neighbours = {
            group_id: set().union(*(readers[name] for name in names)) for group_id, names in self.tensors.items()
        }

    def _of(self, name: str) -> int:
        return 0 if name in self.gone else self.times[name] * math.prod(self.sizes[name])

    def saving(self, group: Group, units: int) -> int:
        """What removing `units` more units would save now; with negative `units`, minus what they would cost."""
        names = self.tensors[group.id]
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
        if group.id in self.blocks:
            self.gone ^= self.blocks[group.id]
            return
        for name, dim, width in self.slopes[group.id]:
            self.sizes[name][dim] -= units * width

    def touches(self, group: Group, other: Group) -> bool:
        """Whether shrinking one group changes what a step of the other saves."""
        return other.id in self.neighbours[group.id]
