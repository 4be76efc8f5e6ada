"""Spending nats on bits, for what a plan leaves of a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tpvprune.analysis.energies import Energies
from tpvprune.analysis.perturbations import step_of
from tpvprune.analysis.quantise import Per
from tpvprune.copies import copied
from tpvprune.members import WORK
from tpvprune.plan import Plan
from tpvprune.scoring.perturb import Rounding
from tpvprune.surgery.removal import apply
from tpvprune.types import Graph

FLOAT = 32  # bits of a weight that is left alone
Cost = Literal["bytes", "bitops"]


@dataclass(frozen=True)
class Mix:
    """One way to spend the budget.

    Attributes:
        pruning: predicted nats of the plan.
        rounding: predicted nats of rounding what is left.
        macs: share of multiply-adds left.
        cost: what is left of the cost, as a share of the dense model's in 32 bits.
        mean_bits: of all weights that may be rounded.
    """

    pruning: float
    rounding: float
    macs: float
    cost: float
    mean_bits: float

    @property
    def total(self) -> float:
        """Predicted nats in all."""
        return self.pruning + self.rounding


Tables = Mapping[str, Mapping[int, float]]


class Rounder:
    """Spends nats on bits, for what a plan leaves of a model."""

    def __init__(
        self, model: nn.Module, energies: Energies, widths: tuple[int, ...], per: Per, cost: Cost, graph: Graph
    ) -> None:
        self.model, self.energies, self.widths, self.per, self.cost = model, energies, widths, per, cost
        self.graph = graph
        self._charged = copied(model)  # a model whose weights are their energies, so that a plan cuts both alike
        with torch.no_grad():
            for name, value in energies.values.items():
                self._charged.get_parameter(name).copy_(value)
        self._whole = self._cost(Plan({}, graph), {})

    def tables(self, plan: Plan) -> dict[str, dict[int, float]]:
        """Nats of every weight that is left, by bits."""
        weights, energies = (
            {name: p.detach() for name, p in (apply(m, plan) if plan.removed else m).named_parameters()}
            for m in (self.model, self._charged)
        )
        found = {}
        for name in self.energies.values:
            if name not in weights or not weights[name].numel():
                continue  # it lies in a block that is skipped
            found[name] = {
                count: 0.0 if count == FLOAT else nats(name, weights[name], energies[name], Rounding(count, self.per))
                for count in self.widths
            }
        return found

    def mix(self, plan: Plan, spent: float, left: float) -> tuple[Mix, dict[str, int]]:
        """The bits that make a plan's remains cheapest for the nats that are left."""
        tables = self.tables(plan)
        sizes = self._sizes(plan)
        chosen, nats = dict.fromkeys(tables, FLOAT), 0.0
        open_ = set(tables)
        while open_:
            best, name = -1.0, ""
            for one in open_:
                saved, added = self._step(one, chosen, tables, sizes)
                gain = saved / max(added, 1e-30)
                if gain > best:
                    best, name = gain, one
            follows = self._next(name, chosen)
            added = tables[name][follows] - tables[name][chosen[name]]
            if nats + added > left:
                open_.discard(name)
                continue
            nats += added
            chosen[name] = follows
            if follows == self.widths[-1]:
                open_.discard(name)
        shapes = self.graph.sizes(plan.keep)
        total = sum(math.prod(shapes[name]) for name in tables)
        bits = sum(math.prod(shapes[name]) * count for name, count in chosen.items())
        share = self._cost(plan, chosen) / self._whole
        macs = plan.macs / self.graph.macs() if self.graph.macs() else 1.0
        return Mix(spent, nats, macs, share, bits / max(1, total)), chosen

    def _next(self, name: str, chosen: Mapping[str, int]) -> int:
        return self.widths[self.widths.index(chosen[name]) + 1]

    def _step(
        self,
        name: str,
        chosen: Mapping[str, int],
        tables: Mapping[str, Mapping[int, float]],
        sizes: Mapping[str, float],
    ) -> tuple[float, float]:
        now, follows = chosen[name], self._next(name, chosen)
        return sizes[name] * (now - follows), tables[name][follows] - tables[name][now]

    def _sizes(self, plan: Plan) -> dict[str, float]:
        """What a bit of every weight costs."""
        sizes = self.graph.sizes(plan.keep)
        if self.cost != "bitops":
            return {name: float(math.prod(sizes[name])) for name in self.energies.values}
        macs: Counter[str] = Counter()
        for name, times in self.graph.reuse.items():  # what a layer's weight costs may lie in work tensors of the layer
            weight = f"{name.partition(WORK)[0]}.weight" if WORK in name else name
            macs[weight] += times * math.prod(sizes[name])
        return {name: float(macs[name]) for name in self.energies.values}

    def _cost(self, plan: Plan, chosen: Mapping[str, int]) -> float:
        sizes, total = self._sizes(plan), 0.0
        for name, size in sizes.items():
            total += size * chosen.get(name, FLOAT)
        if self.cost == "bytes":
            total += FLOAT * (plan.params - sum(sizes.values()))
        return total


def nats(name: str, weight: Tensor, energy: Tensor, rounding: Rounding) -> float:
    """KL of rounding one weight: half of `step^2 / 12` times its energies."""
    step = step_of(rounding, name, weight).double()
    return float((energy.double() * step.square()).sum()) / 24
