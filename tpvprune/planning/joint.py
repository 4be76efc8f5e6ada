"""The joint allocator: what a step adds to the drift of the whole plan.

With `R` the sensitivities (rows by units) and `S` what has left, the drift is `|R 1_S|^2 / samples + linear . 1_S`, so
that unit `c` adds `linear_c + |R_c|^2 + 2 R_c . R 1_S` (over samples). Columns of `R^T R` are made in blocks, for the
units that are likely to leave next: a block is one matrix product, a single column would read all of `R`.

With fewer samples than units the products of different units are noise as much as signal, and a greedy choice would
pick the units whose noise cancels. So they are shrunk by a factor `1 - shrinkage` (Schaefer and Strimmer 2005).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tpvprune.errors import PlanError
from tpvprune.scores import Sensitivities
from tpvprune.types import Graph

BLOCK = 256
LOOKED_AT = 1280  # samples that the shrinkage is estimated from
SMALL = 4096  # units up to which all of `R^T R` is made at once


class Joint:
    """Steps chosen by what they add to the drift of what has left already.

    Args:
        graph: from `trace`.
        widths: units each group may keep, from all of them down.
        sensitivities: of the same groups.
        shrinkage: how much of the products of different units is taken away, 0 to 1; estimated if None.

    Raises:
        PlanError: the sensitivities are of other groups.
    """

    def __init__(
        self,
        graph: Graph,
        widths: dict[str, list[int]],
        sensitivities: Sensitivities,
        shrinkage: float | None = None,
    ) -> None:
        if sensitivities.groups != tuple((group.id, group.units) for group in graph.groups):
            raise PlanError("the sensitivities are of other groups than the graph's; score again")
        self.widths = widths
        self.shrinkage = estimated_shrinkage(sensitivities) if shrinkage is None else shrinkage
        self._rows = sensitivities.rows.float() / math.sqrt(sensitivities.samples)
        self._adds = sensitivities.linear.double() + self._rows.double().square().sum(0)
        self._left = torch.ones(len(self._adds), dtype=torch.bool)
        self._span: dict[str, slice] = {}
        start = 0
        for name, units in sensitivities.groups:
            self._span[name] = slice(start, start + units)
            start += units
        self._taken = dict.fromkeys(self._span, 0)
        self._columns: dict[int, Tensor] = {}
        if len(self._adds) <= SMALL:
            whole = (self._rows.mT @ self._rows).double()
            self._columns = dict(enumerate(whole))

    def next_units(self, name: str) -> int:
        """Units in a group's next step; 0 at its floor."""
        widths, taken = self.widths[name], self._taken[name]
        return widths[taken] - widths[taken + 1] if taken + 1 < len(widths) else 0

    def best(self, saving: dict[str, int]) -> tuple[str, float]:
        """The group whose next step adds least per saving, and that ratio.

        Groups are looked at in the order of what the units of their step add one by one; the first whose true
        ratio, covariances within the step included, stays below the next one's guess is taken.
        """
        guesses = {name: self._ratio(self._cheapest(name)[1], saved) for name, saved in saving.items()}
        found: tuple[str, float] | None = None
        self._chosen: dict[str, Tensor] = {}
        for name in sorted(guesses, key=lambda n: guesses[n]):
            if found is not None and guesses[name] >= found[1]:
                break
            self._chosen[name], added = self._together(name)
            ratio = self._ratio(added, saving[name])
            if found is None or ratio < found[1]:
                found = name, ratio
        assert found is not None
        return found

    def take(self, name: str) -> Tensor:
        """Take a group's next step; the units that leave, numbered within the group."""
        columns = self._chosen[name]
        self._left[columns] = False
        for column in columns.tolist():
            self._adds += 2 * (1 - self.shrinkage) * self._column(column)
        self._taken[name] += 1
        return columns - self._span[name].start

    @staticmethod
    def _ratio(added: float, saved: int) -> float:
        return added / saved if saved else math.inf

    def _cheapest(self, name: str) -> tuple[Tensor, float]:
        """Columns of the units that add least, one by one, and the sum of that."""
        span = self._span[name]
        adds = torch.where(self._left[span], self._adds[span], torch.inf)
        values, columns = adds.topk(self.next_units(name), largest=False)
        return columns + span.start, float(values.sum())

    def _together(self, name: str) -> tuple[Tensor, float]:
        """Columns of a step chosen unit by unit, and what they add together."""
        count = self.next_units(name)
        if count == 1:
            return self._cheapest(name)
        span = self._span[name]
        adds = torch.where(self._left[span], self._adds[span], torch.inf)
        columns, total = [], 0.0
        for _ in range(count):
            unit = int(adds.argmin())
            total += float(adds[unit])
            columns.append(span.start + unit)
            adds = adds + 2 * (1 - self.shrinkage) * self._column(span.start + unit)[span]
            adds[unit] = torch.inf
        return torch.tensor(columns), total

    def _column(self, column: int) -> Tensor:
        """One column of `R^T R`, float64 `(units,)`."""
        if column not in self._columns:
            # The units that add least are those that leave next.
            likely = torch.where(self._left, self._adds, torch.inf)
            likely[column] = -torch.inf
            if self._columns:
                likely[list(self._columns)] = torch.inf
            if len(self._columns) > 8 * BLOCK:
                self._columns.clear()
            block = likely.topk(min(BLOCK, len(likely)), largest=False).indices
            made = self._rows[:, block].mT @ self._rows
            self._columns |= dict(zip(block.tolist(), made.double(), strict=True))
        return self._columns[column]


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
