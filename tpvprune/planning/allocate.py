"""Turn scores into a plan: which units leave so that a budget holds, at the least predicted drift."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tpvprune.budget import QUANTITIES, Budget
from tpvprune.errors import BudgetError, PlanError
from tpvprune.plan import Plan
from tpvprune.planning.joint import Joint
from tpvprune.planning.widths import Cost, check_reachable, floors_of, kept_widths
from tpvprune.scores import Scores
from tpvprune.types import Graph, Group

Allocator = Literal["auto", "joint", "global"]


def allocate(
    scores: Scores,
    graph: Graph,
    budget: Budget,
    *,
    allocator: Allocator = "auto",
    per: Literal["macs", "params", "units"] | None = None,
    shrinkage: float | None = None,
) -> Plan:
    """Remove, step by step, the units that cost the least predicted drift per multiply-add (or parameter).

    Units leave in steps of their group's rounding; groups compete by what a step adds to the drift over what it
    saves at the widths of that moment. Last, steps that turned out unnecessary are taken back, dearest first, so
    that the plan ends close below the bound.

    Args:
        scores: from `score`, for this graph.
        graph: from `trace`.
        budget: what is bounded, and what stays whole.
        allocator: "joint" counts what a step adds to the drift of the whole plan, covariances and the drift already
            there included, and needs sensitivities in the scores; "global" adds up scores as if units did not
            matter to each other; "auto" is joint where it can be.
        per: what a step's drift is divided by; the quantity that the budget bounds by default.
        shrinkage: of the covariances that "joint" counts, 0 to 1; estimated from the sensitivities by default.

    Returns:
        A plan whose cost is at most the bound; `Plan.macs` and `Plan.params` are exact.

    Raises:
        PlanError: the scores belong to another model or lack a group, or "joint" lacks sensitivities.
        BudgetError: a pattern matches nothing, the bound lies below what the floors allow, or a setting is unknown.
    """
    if scores.model_id != graph.model_id:
        raise PlanError(f"the scores are of model {scores.model_id}, the graph of {graph.model_id}; score again")
    for group in graph.groups:
        if group.id not in scores.values or len(scores.values[group.id]) != group.units:
            raise PlanError(f"the scores lack group {group.id!r} with its {group.units} units; score again")
        if group.kind == "weight":
            raise PlanError(f"the units of {group.id!r} are single weights, which save no budget; trace the model")
    if allocator not in ("auto", "joint", "global") or per not in (None, *QUANTITIES):
        raise BudgetError(
            f"allocator={allocator!r}, per={per!r}: an allocator is auto, joint or global, and per is one of "
            f"{', '.join(QUANTITIES)}"
        )
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise BudgetError(f"shrinkage={shrinkage} must lie between 0 and 1")
    if allocator == "auto":
        allocator = "global" if scores.sensitivities is None else "joint"
    check_reachable(graph, budget)
    floors, bound = floors_of(graph, budget), budget.bound(graph)
    widths = {g.id: kept_widths(g, floors[g.id], budget) for g in graph.groups}
    steps: Joint | _Ladders
    if allocator == "joint":
        if scores.sensitivities is None:
            raise PlanError("allocator='joint' needs scores with sensitivities: score with TPV(sensitivities=1280)")
        steps = Joint(graph, widths, scores.sensitivities, shrinkage)
    else:
        steps = _Ladders(graph, widths, scores)
    per = per or budget.quantity
    made_by = {
        "allocator": allocator,
        "rank": f"score per {per}" if per != "units" else "score",
        "criterion": scores.criterion,
        "samples": scores.samples,
        "asked": {budget.quantity: bound},
    }
    return Plan(_greedy(graph, steps, Cost(graph, budget.quantity), Cost(graph, per), bound), graph, made_by)


def _greedy(graph: Graph, steps: Joint | _Ladders, cost: Cost, rank: Cost, bound: int) -> dict[str, Tensor]:
    """Keep-masks of the groups that lose something."""
    taken: list[tuple[Group, Tensor, float]] = []
    saving: dict[str, int] = {}
    closed: set[str] = set()  # groups within skipped blocks, which compete no more
    while cost.total > bound:
        for group in graph.groups:
            count = steps.next_units(group.id)
            if group.id not in saving and count:
                saving[group.id] = rank.saving(group, count)
        best, ratio = steps.best(
            {name: saved for name, saved in saving.items() if name not in closed and steps.next_units(name)}
        )
        group = graph[best]
        gone = steps.take(best)
        closed.update(graph.within(best))
        taken.append((group, gone, ratio))
        cost.remove(group, len(gone))
        if rank is not cost:
            rank.remove(group, len(gone))
        for other in graph.groups:
            if other.id == best or rank.touches(group, other):
                saving.pop(other.id, None)
    keep = {group.id: torch.ones(group.units, dtype=torch.bool) for group, _, _ in taken}
    for group, gone, _ in taken:
        keep[group.id][gone] = False
    for group, gone, _ in sorted(taken, key=lambda step: -step[2]):
        if group.id in closed:
            continue
        if cost.total - cost.saving(group, -len(gone)) <= bound and _lands_on_a_width(steps, group, keep, gone):
            cost.remove(group, -len(gone))
            keep[group.id][gone] = True
            closed.difference_update(graph.within(group.id))
    return {name: mask for name, mask in keep.items() if not bool(mask.all())}


def _lands_on_a_width(steps: Joint | _Ladders, group: Group, keep: dict[str, Tensor], gone: Tensor) -> bool:
    return int(keep[group.id].sum()) + len(gone) in steps.widths[group.id]


class _Ladders:
    """Each group's steps in the order of its scores, which do not depend on what else has left."""

    def __init__(self, graph: Graph, widths: dict[str, list[int]], scores: Scores) -> None:
        self.widths = widths
        self._rungs = {g.id: _Ladder.of(scores.values[g.id], g.units, widths[g.id]) for g in graph.groups}
        self._around = {inner: g.id for g in graph.groups for inner in graph.within(g.id)}

    def next_units(self, name: str) -> int:
        """Units in a group's next step; 0 at its floor."""
        return self._rungs[name].next_units

    def best(self, saving: dict[str, int]) -> tuple[str, float]:
        """The group whose next step adds least per saving, and that ratio."""
        ratios = {n: self._rungs[n].next_score / saved if saved else math.inf for n, saved in saving.items()}
        name = min(ratios, key=lambda n: ratios[n])
        return name, ratios[name]

    def take(self, name: str) -> Tensor:
        """Take a group's next step; the units that leave."""
        ladder = self._rungs[name]
        if name in self._around:  # what has left of a block is no more lost when the block goes
            self._rungs[self._around[name]].cumulative[1] -= ladder.next_score
        gone = ladder.order[ladder.sizes[ladder.taken] : ladder.sizes[ladder.taken + 1]]
        ladder.taken += 1
        return gone


@dataclass
class _Ladder:
    """The steps in which one group can shrink: cheapest units first."""

    order: Tensor  # units, least score first
    cumulative: Tensor  # score of the first n units of `order`, n from 0
    sizes: list[int]  # units that have left after 0, 1, 2, ... steps
    taken: int = 0

    @classmethod
    def of(cls, values: Tensor, units: int, widths: list[int]) -> _Ladder:
        order = values.double().argsort(stable=True)
        cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), values.double()[order].cumsum(0)])
        return cls(order, cumulative, [units - kept for kept in widths])

    @property
    def next_units(self) -> int:
        return 0 if self.taken + 1 == len(self.sizes) else self.sizes[self.taken + 1] - self.sizes[self.taken]

    @property
    def next_score(self) -> float:
        return float(self.cumulative[self.sizes[self.taken + 1]] - self.cumulative[self.sizes[self.taken]])
