"""Which widths a group may have, and what a network costs while its groups shrink."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from tpvprune.budget import Budget
from tpvprune.errors import BudgetError, PlanError
from tpvprune.members import Group
from tpvprune.plan import Plan
from tpvprune.planning.blocks import RESIDUAL
from tpvprune.planning.latency import LatencyCost, LatencyTable
from tpvprune.planning.patterns import matching_groups
from tpvprune.scores import in_nats
from tpvprune.types import Graph

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
    # A linear layer behind `flatten` reads a channel at every position, which makes it no wider.
    sides = group.of_role("consume"), group.of_role("produce", "affine")
    channels = min(max(member.width() for member in side) for side in sides)
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


def widths_of(graph: Graph, budget: Budget, after: Plan | None = None) -> dict[str, list[int]]:
    """Units each group may keep, from all of them down.

    Args:
        graph: what shrinks.
        budget: floors and roundings.
        after: the plan that has made this graph's model, whose dense widths floors and roundings are of.

    Raises:
        BudgetError: a pattern matches nothing.
        PlanError: `after` leaves another model than this graph's.
    """
    dense = graph if after is None else after.graph
    floors = floors_of(dense, budget)
    widths = {}
    for group in graph.groups:
        if after is not None and (group.id not in dense or int(after.mask(group.id).sum()) != group.units):
            raise PlanError(f"group {group.id!r} is not what the earlier plan leaves; trace the model it leaves")
        allowed = kept_widths(dense[group.id], floors[group.id], budget)
        widths[group.id] = [group.units, *(width for width in allowed if width < group.units)]
    return widths


def check_reachable(
    graph: Graph,
    budget: Budget,
    after: Plan | None = None,
    latency: LatencyTable | None = None,
    criterion: str | None = None,
) -> dict[str, float]:
    """The bounds on costs in absolute numbers; refuses a budget that no plan can meet, before any scoring is done.

    Args:
        graph: what shrinks.
        budget: what is asked.
        after: see `widths_of`; fractions are of its dense model.
        latency: of the dense model; needed where milliseconds are bounded.
        criterion: name of what scores, where it is known; must give nats where drift is bounded.

    Raises:
        PlanError: milliseconds are bounded and `latency` is missing, or of another model; drift is, and the criterion
            gives no nats.
        BudgetError: a bound lies below the floor (names it and what holds it), or a pattern matches nothing.
    """
    if budget.most_drift is not None and criterion is not None and not in_nats(criterion):
        raise PlanError(
            f"a budget of drift needs scores in nats, and {criterion} gives none; score with TPV() "
            "(score.criterion=tpv) and the softmax head, not compensated"
        )
    source = graph if after is None else after.graph
    if latency is not None and latency.model_id != source.model_id:
        raise PlanError(
            f"the latency table is of model {latency.model_id}, the graph of {source.model_id}; measure again"
        )
    dense = {name: costs_of(name, source, latency=latency).total for name in budget.quantities}
    bounds: dict[str, float] = {}
    widths = widths_of(graph, budget, after)
    for name in budget.quantities:
        cost = costs_of(name, graph, latency=latency)
        bounds[name] = bound = budget.bound(name, dense[name])
        for group in graph.groups:
            cost.remove(group, group.units - widths[group.id][-1])
        if cost.total > bound:
            raise BudgetError(_unreachable(graph, budget, widths, name, bound, cost.total, dense[name]))
    return bounds


def _unreachable(
    graph: Graph, budget: Budget, widths: dict[str, list[int]], name: str, bound: float, floor: float, dense: float
) -> str:
    whole = [group_id for group_id, allowed in widths.items() if len(allowed) == 1]
    held = [f"min_keep={budget.min_keep:g}"]
    if whole:
        named = ", ".join(whole[:3]) + (", ..." if len(whole) > 3 else "")
        held.append(f"{len(whole)} {'group that stays' if len(whole) == 1 else 'groups that stay'} whole ({named})")
    layers = [reason for reason in graph.skipped.values() if not reason.startswith(RESIDUAL)]
    if layers:
        held.append(f"{len(layers)} layer{'s' * (len(layers) > 1)} that cannot be pruned")
    return (
        f"{name} <= {bound:,} cannot be reached: the floor is {floor:,} ({floor / dense:.1%} of {dense:,}), held by "
        f"{', '.join(held)}; ask for more than the floor, lower min_keep or protect less"
    )


class Costs(Protocol):
    """What a network costs while its groups shrink."""

    @property
    def total(self) -> float:
        """At the widths of the moment."""
        ...

    def saving(self, group: Group, units: int) -> float:
        """What removing `units` more units would save now; with negative `units`, minus what they would cost."""
        ...

    def remove(self, group: Group, units: int) -> None:
        """Shrink (or, with negative `units`, widen) a group."""
        ...

    def touches(self, group: Group, other: Group) -> bool:
        """Whether shrinking one group changes what a step of the other saves."""
        ...


def costs_of(
    quantity: str,
    graph: Graph,
    keep: Mapping[str, Tensor] | None = None,
    *,
    latency: LatencyTable | None = None,
) -> Costs:
    """The cost of a quantity, at the widths of a graph, or once only the units in `keep` are left.

    Raises:
        PlanError: milliseconds are asked for without a table.
    """
    costs: Costs
    if quantity != "latency_ms":
        costs = Cost(graph, quantity)
    elif latency is None:
        raise PlanError("latency_ms needs a table of the machine at hand; give latency=tpvprune.latency_table(...)")
    else:
        costs = LatencyCost(graph, latency)
    for name, mask in (keep or {}).items():
        costs.remove(graph[name], int((~mask).sum()))
    return costs


class Cost:
    """Exact cost of a network while its groups shrink, and what one more step would save.

    Args:
        graph: from `trace`.
        quantity: macs, params, bytes or units.

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
            self.times = dict(graph.times(quantity))
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
            self.gone ^= self.blocks[group.id] if units else set()
            return
        for name, dim, width in self.slopes[group.id]:
            self.sizes[name][dim] -= units * width

    def touches(self, group: Group, other: Group) -> bool:
        """Whether shrinking one group changes what a step of the other saves."""
        return other.id in self.neighbours[group.id]
