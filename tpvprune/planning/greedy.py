"""Step by step: the group whose next step costs least drift for what it saves goes next, until the bounds hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tpvprune.errors import BudgetError
from tpvprune.members import Group
from tpvprune.planning.widths import Costs
from tpvprune.scores import Scores
from tpvprune.types import Graph

Pools = Literal["global", "uniform", "isomorphic"]


class Steps(Protocol):
    """The steps in which groups shrink, and what they add to the drift.

    Attributes:
        widths: units each group may keep, from all of them down.
        dearest_first: whether steps that turn out unnecessary are taken back in the order of what they cost, or
            last taken first and one a group, which keeps the shares of the groups.
    """

    widths: dict[str, list[int]]
    dearest_first: bool

    def next_units(self, name: str) -> int:
        """Units in a group's next step; 0 at its floor."""
        ...

    def best(self, saving: dict[str, float]) -> tuple[str, float]:
        """The group to shrink next, and what its step adds to the drift."""
        ...

    def take(self, name: str) -> Tensor:
        """Take a group's next step; the units that leave."""
        ...

    def drift(self, gone: Mapping[str, Tensor]) -> float:
        """Drift when the units of these bool masks have left."""
        ...

    def improve(self, graph: Graph, gone: dict[str, Tensor], spending: Spending) -> None:
        """Lower the drift of what has left, within the bounds; brings `gone` and `spending` up to date."""
        ...


class Spending:
    """What is bounded while groups shrink, and what a step saves of what is still too much.

    Args:
        bounded: cost of each bounded quantity.
        bounds: the same keys.
        rank: what a step's drift is divided by; None for what is still above its bound, each quantity as a share
            of what it has to lose.
    """

    def __init__(self, bounded: dict[str, Costs], bounds: dict[str, float], rank: Costs | None) -> None:
        self.bounded, self.bounds, self.rank = bounded, bounds, rank
        self.to_lose = {name: max(cost.total - bounds[name], 1e-12) for name, cost in bounded.items()}

    @property
    def unmet(self) -> tuple[str, ...]:
        """Quantities above their bound."""
        return tuple(name for name, cost in self.bounded.items() if cost.total > self.bounds[name])

    @property
    def lost(self) -> float:
        """Share of what has to be lost that has been, of the quantity that is furthest from its bound."""
        return min(1 - (cost.total - self.bounds[n]) / self.to_lose[n] for n, cost in self.bounded.items())

    @property
    def ranked(self) -> float:
        """What is left of the quantity that steps are ranked by, where it is not bounded itself."""
        return 0.0 if self.rank is None or self.rank in self.bounded.values() else self.rank.total

    def saving(self, group: Group, units: int, unmet: tuple[str, ...]) -> float:
        """What a step is worth."""
        if self.rank is not None:
            return self.rank.saving(group, units)
        return sum(self.bounded[name].saving(group, units) / self.to_lose[name] for name in unmet)

    def remove(self, group: Group, units: int) -> None:
        """Shrink (or, with negative `units`, widen) a group."""
        ranked = [] if self.rank is None or self.rank in self.bounded.values() else [self.rank]
        for cost in [*self.bounded.values(), *ranked]:
            cost.remove(group, units)

    def affords(self, group: Group, units: int) -> bool:
        """Whether all bounds hold once `units` have come back."""
        return all(c.total - c.saving(group, -units) <= self.bounds[n] for n, c in self.bounded.items())

    def exchange(self, back: Group, comes: int, out: Group, goes: int) -> bool:
        """Widen one group and shrink another, if all bounds hold afterwards and no less is saved of what is ranked by.

        Returns:
            Whether it was done.
        """
        before = self.ranked
        self.remove(back, -comes)
        self.remove(out, goes)
        if not self.unmet and self.ranked <= before:
            return True
        self.remove(out, -goes)
        self.remove(back, comes)
        return False

    def touches(self, group: Group, other: Group) -> bool:
        """Whether shrinking one group changes what a step of the other is worth."""
        costs = list(self.bounded.values()) if self.rank is None else [self.rank]
        return any(cost.touches(group, other) for cost in costs)


def shrink(
    graph: Graph,
    steps: Steps,
    spending: Spending,
    most: float | None,
    tell: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Take steps until all bounds hold, or, where only drift is bounded, until no step fits under it.

    Args:
        graph: what shrinks.
        steps: how.
        spending: what for.
        most: bound on the drift, in the units of the scores.
        tell: called with the share of the way that the steps have come.

    Returns:
        Keep-masks of the groups that lose something.

    Raises:
        BudgetError: the bounds cannot hold under that drift.
    """
    taken: list[tuple[Group, Tensor, float]] = []
    saving: dict[str, float] = {}
    unmet, drift, closed = spending.unmet, 0.0, set[str]()
    while unmet or not spending.bounded:
        for group in graph.groups:
            count = steps.next_units(group.id)
            if group.id not in saving and count:
                saving[group.id] = spending.saving(group, count, unmet)
        candidates = {n: saved for n, saved in saving.items() if steps.next_units(n) and n not in closed}
        if not candidates:
            break
        best, added = steps.best(candidates)
        if most is not None and drift + added > most:
            closed.add(best)
            continue
        group, ratio = graph[best], added / saving[best] if saving[best] else math.inf
        gone = steps.take(best)
        taken.append((group, gone, ratio))
        drift += added
        if tell:
            tell(spending.lost if spending.bounded else drift / (most or math.inf))
        closed.update(graph.within(best))  # what lies in a skipped block competes no more
        spending.remove(group, len(gone))
        if spending.unmet != unmet:
            unmet, saving = spending.unmet, {}
        for other in graph.groups:
            if other.id == best or spending.touches(group, other):
                saving.pop(other.id, None)
    while most is not None and taken and steps.drift(_gone_of(graph, taken)) > most:  # what steps add is nearly exact
        group, gone, _ = taken.pop()
        spending.remove(group, -len(gone))
        unmet = spending.unmet
    if unmet:
        found = ", ".join(f"{n} {_number(spending.bounded[n].total)} > {_number(spending.bounds[n])}" for n in unmet)
        raise BudgetError(
            f"the budget cannot be met with a drift of at most {(most or 0) / 2:g} nats: within it stays {found}; "
            "allow more drift or ask for less"
        )
    gone_of = _gone_of(graph, taken)
    if spending.bounded:
        _give_back(graph, steps, spending, taken, gone_of, most)
    greedy = {name: mask.clone() for name, mask in gone_of.items()}
    steps.improve(graph, gone_of, spending)
    if most is not None and steps.drift(gone_of) > most:  # what came back had lowered the drift by leaving
        for group in graph.groups:
            spending.remove(group, int(greedy[group.id].sum() - gone_of[group.id].sum()))
        gone_of = greedy
    return {name: ~mask for name, mask in gone_of.items() if bool(mask.any())}


def _gone_of(graph: Graph, taken: list[tuple[Group, Tensor, float]]) -> dict[str, Tensor]:
    gone_of = {group.id: torch.zeros(group.units, dtype=torch.bool) for group in graph.groups}
    for group, gone, _ in taken:
        gone_of[group.id][gone] = True
    return gone_of


def _give_back(
    graph: Graph,
    steps: Steps,
    spending: Spending,
    taken: list[tuple[Group, Tensor, float]],
    gone_of: dict[str, Tensor],
    most: float | None,
) -> None:
    """Take back what the bounds do not ask for."""
    last = {step[0].id: step for step in taken}
    back = sorted(taken, key=lambda step: -step[2]) if steps.dearest_first else [*last.values()][::-1]
    for group, gone, _ in back:
        if group.id in graph.lost(gone_of):
            continue
        if not spending.affords(group, len(gone)) or not _lands_on_a_width(steps, group, gone_of[group.id], gone):
            continue
        gone_of[group.id][gone] = False
        if most is not None and steps.drift(gone_of) > most:  # what leaves together may cancel out
            gone_of[group.id][gone] = True
            continue
        spending.remove(group, -len(gone))


def _number(value: float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def _lands_on_a_width(steps: Steps, group: Group, gone: Tensor, back: Tensor) -> bool:
    return group.units - int(gone.sum()) + len(back) in steps.widths[group.id]


class Ladders:
    """Each group's steps in the order of its scores, which do not depend on what else has left.

    Args:
        graph: from `trace`.
        widths: units each group may keep, from all of them down.
        scores: of the same groups.
        pools: which groups compete. "global": all; "isomorphic": those of one structure, while all structures lose
            the same share of their units (Fang 2024, arXiv 2407.04616); "uniform": none, every group loses the
            same share.
    """

    def __init__(self, graph: Graph, widths: dict[str, list[int]], scores: Scores, pools: Pools = "global") -> None:
        self.widths, self._values, self.dearest_first = widths, scores.values, pools == "global"
        self._graph = graph
        self._around = {inner: g.id for g in graph.groups for inner in graph.within(g.id)}
        self._rungs = {g.id: _Ladder.of(scores.values[g.id], g.units, widths[g.id]) for g in graph.groups}
        pool = {"global": lambda g: "", "uniform": lambda g: g.id, "isomorphic": lambda g: g.signature}[pools]
        self._pool: dict[str, str] = {g.id: pool(g) for g in graph.groups}
        self._units: dict[str, int] = {}
        for group in graph.groups:
            self._units[self._pool[group.id]] = self._units.get(self._pool[group.id], 0) + group.units
        self._gone = dict.fromkeys(self._units, 0)

    def next_units(self, name: str) -> int:
        """See `Steps`."""
        return self._rungs[name].next_units

    def best(self, saving: dict[str, float]) -> tuple[str, float]:
        """See `Steps`: of the pool that has lost the smallest share, the group whose step adds least per saving."""
        shares = {self._pool[name]: self._gone[self._pool[name]] / self._units[self._pool[name]] for name in saving}
        pool = min(shares, key=lambda p: shares[p])
        ratios = {
            n: self._rungs[n].next_score / saved if saved else math.inf
            for n, saved in saving.items()
            if self._pool[n] == pool
        }
        name = min(ratios, key=lambda n: ratios[n])
        return name, self._rungs[name].next_score

    def take(self, name: str) -> Tensor:
        """See `Steps`."""
        ladder = self._rungs[name]
        if name in self._around:  # what has left of a block is no more lost when the block goes
            self._rungs[self._around[name]].cumulative[1] -= ladder.next_score
        gone = ladder.order[ladder.sizes[ladder.taken] : ladder.sizes[ladder.taken + 1]]
        ladder.taken += 1
        self._gone[self._pool[name]] += len(gone)
        return gone

    def drift(self, gone: Mapping[str, Tensor]) -> float:
        """See `Steps`: the sum of scores."""
        lost = self._graph.lost(gone)
        return sum(float(self._values[name][mask].sum()) for name, mask in gone.items() if name not in lost)

    def improve(self, graph: Graph, gone: dict[str, Tensor], spending: Spending) -> None:
        """See `Steps`: the ranking is kept as it is, to be compared with others."""


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
