"""The joint allocator: what a step adds to the drift of the whole plan.

With `R` the sensitivities (rows by units) and `S` what has left, the drift is `|R 1_S|^2 / samples + linear . 1_S`, so
that unit `c` adds `linear_c + |R_c|^2 + 2 R_c . R 1_S` (over samples). Where there are too many units for all products
to be held, what units that leave do to all others takes a pass over `R`, which is shared by a small share of them.

A block that is skipped takes back what its own units have done before: what it does is its own effect less theirs.

With fewer samples than units the products of different units are noise as much as signal, and a greedy choice would
pick the units whose noise cancels. So they are shrunk by a factor `1 - shrinkage` (Schaefer and Strimmer 2005).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tpvprune.errors import PlanError
from tpvprune.planning.exchange import Exchange
from tpvprune.planning.greedy import Spending
from tpvprune.planning.takeback import Blocks
from tpvprune.scores import Sensitivities
from tpvprune.types import Graph

LOOKED_AT = 1280  # samples that the shrinkage is estimated from
SMALL = 4096  # units up to which all of `R^T R` is held
FRESH = 256  # one in so many of the units that have left may wait for its products with the others


class Joint:
    """Steps chosen by what they add to the drift of what has left already.

    Args:
        graph: from `trace`.
        widths: units each group may keep, from all of them down.
        sensitivities: of the same groups.
        shrinkage: how much of the products of different units is taken away, 0 to 1; estimated if None.
        exchange: whether `improve` does anything.

    Raises:
        PlanError: the sensitivities are of other groups.
    """

    def __init__(
        self,
        graph: Graph,
        widths: dict[str, list[int]],
        sensitivities: Sensitivities,
        shrinkage: float | None = None,
        exchange: bool = True,
    ) -> None:
        if sensitivities.groups != tuple((group.id, group.units) for group in graph.groups):
            raise PlanError("the sensitivities are of other groups than the graph's; score again")
        self.widths, self.dearest_first, self._exchange = widths, True, exchange
        if shrinkage is None:
            shrinkage = shrinkage_for(graph, sensitivities)
        self.shrinkage = shrinkage
        # A row a unit: they are read unit by unit.
        self._effects = torch.empty(sensitivities.rows.shape[::-1])
        self._effects.copy_(sensitivities.rows.mT).div_(math.sqrt(sensitivities.samples))
        self._linear = sensitivities.linear.double()
        self._adds = self._linear + torch.linalg.vector_norm(self._effects, dim=1, dtype=torch.float64).square()
        self._left = torch.ones(len(self._adds), dtype=torch.bool)
        self._span: dict[str, slice] = {}
        start = 0
        for name, units in sensitivities.groups:
            self._span[name] = slice(start, start + units)
            start += units
        self._taken = dict.fromkeys(self._span, 0)
        self._graph, self._blocks = graph, Blocks(graph, self._effects, self._adds, self.shrinkage, self._span)
        # Where the units of groups of about one size stand, a row a group, so that all are looked at in one go; what
        # is left of a row points past the last unit.
        sizes: dict[int, list[str]] = {}
        for name, units in sensitivities.groups:
            sizes.setdefault(units.bit_length(), []).append(name)
        self._places: list[tuple[list[str], Tensor]] = []
        for names in sizes.values():
            spans = [self._span[name] for name in names]
            most = torch.arange(max(span.stop - span.start for span in spans))
            rows = [torch.where(most < span.stop - span.start, most + span.start, start) for span in spans]
            self._places.append((names, torch.stack(rows)))
        self._inside: dict[str, Tensor] = {}
        self._products = self._effects @ self._effects.mT if len(self._adds) <= SMALL else None
        self._waiting = torch.zeros(self._effects.shape[1])  # effects of units whose products are not in `_adds` yet
        self._counts = 0, 0  # units that have left, and that wait

    def next_units(self, name: str) -> int:
        """Units in a group's next step; 0 at its floor."""
        widths, taken = self.widths[name], self._taken[name]
        return widths[taken] - widths[taken + 1] if taken + 1 < len(widths) else 0

    def best(self, saving: dict[str, float]) -> tuple[str, float]:
        """The group whose next step adds least per saving, and what it adds.

        Groups are looked at in the order of what the units of their step add one by one; the first whose true
        ratio, covariances within the step included, stays below the next one's guess is taken.
        """
        guesses = self._guesses(saving)
        found: tuple[str, float, float] | None = None
        self._chosen: dict[str, Tensor] = {}
        for name in sorted(guesses, key=lambda n: guesses[n]):
            if found is not None and guesses[name] >= found[1]:
                break
            self._chosen[name], added = self._together(name)
            ratio = self._ratio(added, saving[name])
            if found is None or ratio < found[1]:
                found = name, ratio, added
        assert found is not None
        return found[0], found[2]

    def take(self, name: str) -> Tensor:
        """Take a group's next step; the units that leave, numbered within the group."""
        columns = self._chosen[name]
        self._left[columns] = False
        changed = self._blocks.effect(name)  # of a block of which something has left
        if self._products is not None:
            products = self._products[columns].sum(0) if changed is None else self._effects @ changed
            self._adds += 2 * (1 - self.shrinkage) * products
        else:
            self._waiting += self._effects[columns].sum(0) if changed is None else changed
            self._counts = self._counts[0] + len(columns), self._counts[1] + len(columns)
            if self._counts[1] * FRESH >= self._counts[0]:
                self._adds += 2 * (1 - self.shrinkage) * (self._effects @ self._waiting)
                self._waiting.zero_()
                self._counts = self._counts[0], 0
        self._blocks.take(name, columns)
        self._taken[name] += 1
        return columns - self._span[name].start

    def drift(self, gone: Mapping[str, Tensor]) -> float:
        """Drift when the units of these bool masks `(units,)` have left; products shrunk like all others."""
        columns, lost = torch.zeros(len(self._adds), dtype=torch.bool), self._graph.lost(gone)
        for name, mask in gone.items():
            columns[self._span[name]] = mask & (name not in lost)
        effects = self._effects[columns].double()
        together, alone = effects.sum(0).square().sum(), effects.square().sum()
        return float(self._linear[columns].sum() + (1 - self.shrinkage) * together + self.shrinkage * alone)

    def improve(self, graph: Graph, gone: dict[str, Tensor], spending: Spending) -> None:
        """See `Steps`; blocks, and what lies in those that are skipped, are not exchanged."""
        if not self._exchange:
            return
        lost = graph.lost(gone)
        skipped = [self._span[name] for name, mask in gone.items() if graph[name].kind == "block" and bool(mask.any())]
        spans = {n: span for n, span in self._span.items() if graph[n].kind != "block" and n not in lost}
        exchange = Exchange(self._effects, self._linear, self.shrinkage, spans, self.widths, skipped)
        exchange.improve(graph, gone, spending)

    @staticmethod
    def _ratio(added: float, saved: float) -> float:
        return added / saved if saved else math.inf

    def _guesses(self, saving: dict[str, float]) -> dict[str, float]:
        """Per group, what the units of its next step that add least add one by one, over what they save."""
        adds = torch.cat([torch.where(self._left, self._adds, torch.inf), torch.tensor([torch.inf])])
        guesses: dict[str, float] = {}
        for names, places in self._places:
            counts = [max(1, self.next_units(name)) for name in names]
            rows = adds.index_select(0, places.flatten()).reshape(places.shape)
            if max(counts) == 1:
                sums = rows.amin(1)
            else:
                least = rows.topk(max(counts), largest=False).values.cumsum(1)
                sums = least.gather(1, torch.tensor(counts).unsqueeze(1) - 1)
            guesses |= dict(zip(names, sums.flatten().tolist(), strict=True))
        return {name: self._ratio(guesses[name], saved) for name, saved in saving.items()}

    def _together(self, name: str) -> tuple[Tensor, float]:
        """Columns of a step chosen unit by unit, and what they add together."""
        span, count = self._span[name], self.next_units(name)
        adds = torch.where(self._left[span], self._adds[span], torch.inf)
        if count > 1 and name not in self._inside:
            self._inside[name] = self._effects[span] @ self._effects[span].mT
        units, total = [], 0.0
        for _ in range(count):
            unit = int(adds.argmin())
            total += float(adds[unit])
            units.append(unit)
            if count > 1:
                adds += 2 * (1 - self.shrinkage) * self._inside[name][unit]
            adds[unit] = torch.inf
        return torch.tensor(units) + span.start, total


def shrinkage_for(graph: Graph, sensitivities: Sensitivities) -> float:
    """How much of the products of a graph's units is taken away where nobody says."""
    return estimated_shrinkage(_of_small_units(graph, sensitivities))


def _of_small_units(graph: Graph, sensitivities: Sensitivities) -> Sensitivities:
    """Without the blocks, few and far larger than the rest: with or without them, the rest is as noisy."""
    small = [graph[name].kind != "block" for name, _ in sensitivities.groups]
    if all(small) or not any(small):
        return sensitivities
    columns = torch.cat([torch.full((n,), one) for (_, n), one in zip(sensitivities.groups, small, strict=True)])
    groups = tuple(pair for pair, one in zip(sensitivities.groups, small, strict=True) if one)
    rows, linear = sensitivities.rows[:, columns], sensitivities.linear[columns]
    return Sensitivities(groups, rows, linear, sensitivities.samples)


def estimated_shrinkage(sensitivities: Sensitivities) -> float:
    """How much of the products of different units is noise: the root of the share of their squares that is.

    The share itself makes the estimated products best on average (Schaefer and Strimmer 2005, with the variances kept
    as they are). A greedy choice meets the worst of them, and its root was measured to do better.
    """
    samples = min(sensitivities.samples, LOOKED_AT)
    if samples < 2:
        return 1.0
    each = len(sensitivities.rows) // sensitivities.samples
    rows = sensitivities.rows[: samples * each].float()
    rows = rows / rows.abs().amax().clamp(min=1e-30)
    within = rows.reshape(samples, each, -1)
    diagonal = within.double().square().sum(1)
    single = (within @ within.mT).double().square().sum() - diagonal.square().sum()
    if len(rows) <= rows.shape[1]:
        gram = rows @ rows.mT
    else:
        gram = rows.mT @ rows
    together = (gram.double().square().sum() - diagonal.sum(0).square().sum()) / samples**2
    if float(together) <= 0:
        return 1.0
    noise = (single / samples - together) / samples
    return min(1.0, max(0.0, float(noise / together))) ** 0.5
