"""Pruning and quantisation in one currency: nats of KL, and how to spend a budget of them on both.

What rounding a layer's weights to b bits costs is half the trace form, `step^2 / 12` times the layer's part of `Tr(H)`;
what a plan costs is half its TPV. Errors of rounding are taken as independent with mean zero, so that the costs of
layers add up, and add to that of a plan.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpvprune.analysis.energies import Energies, weight_energies
from tpvprune.analysis.perturbations import parameters_of, step_of
from tpvprune.analysis.quantise import Per
from tpvprune.batches import Batch, Progress, Selector, repeatable
from tpvprune.budget import Budget
from tpvprune.errors import BudgetError, InputError
from tpvprune.plan import Plan
from tpvprune.planning.allocate import allocate
from tpvprune.scores import Scores
from tpvprune.scoring.criteria import TPV, score
from tpvprune.scoring.perturb import Rounding
from tpvprune.surgery.removal import apply
from tpvprune.types import Graph

FLOAT = 32  # bits of a weight that is left alone
BITS = (8, 6, 5, 4, 3, 2)
MACS = (0.9, 0.8, 0.7, 0.6, 0.5)  # shares of multiply-adds that totals of pruning are told at
SPLITS = 10  # parts of the budget that go to pruning, or not
Cost = Literal["bytes", "bitops"]


@dataclass(frozen=True)
class LayerAdvice:
    """One weight.

    Attributes:
        name: of the parameter.
        params: its entries.
        kl_at_bits: nats, by bits, with the layer alone rounded and nothing pruned.
        relative_error: standard error of each of them, over it.
        kept: share of its entries that the plan leaves.
        bits: what it can bear in the mixed plan; 32 where it is left alone.
        kl: nats that those bits cost what is left of it.
    """

    name: str
    params: int
    kl_at_bits: Mapping[int, float]
    relative_error: float
    kept: float
    bits: int
    kl: float


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


@dataclass(frozen=True, eq=False)
class Advice:
    """What `advise` found.

    Attributes:
        drift: the budget in nats.
        cost: what is made small: "bytes" of the weights, or "bitops", multiply-adds times bits of a weight.
        layers: in the order of the model.
        pruning_totals: nats by share of multiply-adds kept, of plans of their own.
        rounding_totals: nats by bits, of all weights.
        mixed: the mix that was chosen.
        alone: the best with pruning alone, and with rounding alone.
        plan: what leaves in the mix.
        bits: of every weight that is rounded in the mix, for `quantise` after `apply`.
        samples: inputs it is all of.
        groups: per group of the graph, units that stay in the mix, and all units.
    """

    drift: float
    cost: Cost
    layers: tuple[LayerAdvice, ...]
    pruning_totals: Mapping[float, float]
    rounding_totals: Mapping[int, float]
    mixed: Mix
    alone: Mapping[str, Mix]
    plan: Plan
    bits: Mapping[str, int]
    samples: int
    groups: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form, all but the plan."""
        return {
            "drift": self.drift,
            "cost": self.cost,
            "layers": [asdict(one) for one in self.layers],
            "pruning_totals": dict(self.pruning_totals),
            "rounding_totals": dict(self.rounding_totals),
            "mixed": {**asdict(self.mixed), "total": self.mixed.total},
            "alone": {name: {**asdict(mix), "total": mix.total} for name, mix in self.alone.items()},
            "groups": {name: {"kept": kept, "units": units} for name, (kept, units) in self.groups.items()},
            "samples": self.samples,
        }


def advise(
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    drift: float,
    *,
    bits: Sequence[int] = BITS,
    per: Per = "channel",
    cost: Cost = "bytes",
    scores: Scores | None = None,
    seed: int = 0,
    output: Selector = None,
    progress: Progress | None = None,
) -> Advice:
    """Which layers to prune, and which bit-width each can bear, under one budget of KL.

    Shares of the budget are given to pruning; what is left goes to bits, layer by layer, where a nat saves most. The
    cheapest of the results is taken.

    Args:
        model: a classifier, that returns logits; it is left as it was.
        batches: unlabeled inputs, readable more than once.
        graph: from `trace`.
        drift: KL from the dense model in nats, at most, as predicted.
        bits: widths a weight may be rounded to, besides being left alone.
        per: one range a "tensor", or one an output "channel".
        cost: what is made small.
        scores: of the model, in nats and with sensitivities; made with `TPV()` if left out.
        seed: of cotangents.
        output: which part of what the model returns counts.
        progress: called as `progress(stage, done, total)`.

    Raises:
        InputError: a setting is out of range.
        PlanError: the scores are of another model, or not in nats.
        DataError: there is no batch, or they can be read once only.
    """
    if not (math.isfinite(drift) and drift > 0):
        raise InputError(f"drift={drift!r} must be nats above zero, as 0.05")
    if cost not in get_args(Cost):
        raise InputError(f"cost={cost!r} must be one of {', '.join(get_args(Cost))}")
    if not bits:
        raise InputError("bits= is empty; give at least one width, as 8")
    widths = (FLOAT, *sorted({Rounding(count, per).bits for count in bits}, reverse=True))
    repeatable(batches, "scores and energies both need them")
    if scores is None:
        scores = score(model, batches, graph, TPV(output=output, seed=seed), progress=progress)
    weights = {n: w for n, w in parameters_of(model, None).items() if w.ndim > 1}
    energies = weight_energies(model, batches, weights, seed=seed, output=output, progress=progress)
    rounder = _Rounder(model, energies, widths, per, cost, graph)
    tables = rounder.tables(Plan({}, graph))
    found = []
    for split in range(SPLITS + 1):
        plan = _pruned(scores, graph, drift * split / SPLITS)
        if plan is None:
            continue
        spent = float(plan.made_by.get("predicted_kl", 0.0))
        found.append((plan, *rounder.mix(plan, spent, drift - spent)))
        if progress:
            progress("advise", split + 1, SPLITS + 1)
    best = min(found, key=lambda one: one[1].cost)
    alone = {
        "rounding": found[0][1],
        "pruning": min((rounder.mix(plan, one.pruning, -1.0)[0] for plan, one, _ in found), key=lambda mix: mix.cost),
    }
    plan, mixed, chosen = best
    left = rounder.tables(plan)
    sizes = graph.sizes(plan.keep)
    layers = tuple(
        LayerAdvice(
            name=name,
            params=w.numel(),
            kl_at_bits={count: tables[name][count] for count in widths[1:]},
            relative_error=energies.relative[name],
            kept=(math.prod(sizes[name]) if name in left else 0) / w.numel(),
            bits=chosen.get(name, FLOAT),
            kl=left[name][chosen[name]] if name in chosen else 0.0,
        )
        for name, w in weights.items()
    )
    return Advice(
        drift=drift,
        cost=cost,
        layers=layers,
        pruning_totals=_totals(scores, graph),
        rounding_totals={count: sum(table[count] for table in tables.values()) for count in widths[1:]},
        mixed=mixed,
        alone=alone,
        plan=plan,
        bits={name: count for name, count in chosen.items() if count != FLOAT},
        samples=energies.samples,
        groups={group.id: (int(plan.mask(group.id).sum()), group.units) for group in graph.groups},
    )


def _pruned(scores: Scores, graph: Graph, drift: float) -> Plan | None:
    """The plan of one share of the budget; None where nothing fits into it, or nothing can leave."""
    if not drift:
        return Plan({}, graph)
    try:
        return allocate(scores, graph, Budget(drift=drift))
    except BudgetError:
        return None


def _totals(scores: Scores, graph: Graph) -> dict[float, float]:
    found = {}
    for share in MACS:
        try:
            found[share] = float(allocate(scores, graph, Budget(macs=share)).made_by["predicted_kl"])
        except BudgetError:
            break
    return found


_Tables = Mapping[str, Mapping[int, float]]


class _Rounder:
    """Spends nats on bits, for what a plan leaves of a model."""

    def __init__(
        self, model: nn.Module, energies: Energies, widths: tuple[int, ...], per: Per, cost: Cost, graph: Graph
    ) -> None:
        self.model, self.energies, self.widths, self.per, self.cost = model, energies, widths, per, cost
        self.graph = graph
        self._charged = copy.deepcopy(model)  # a model whose weights are their energies, so that a plan cuts both alike
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
                count: 0.0 if count == FLOAT else _nats(name, weights[name], energies[name], Rounding(count, self.per))
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
        times = self.graph.reuse if self.cost == "bitops" else {}
        return {n: math.prod(sizes[n]) * (times.get(n, 0) if times else 1.0) for n in self.energies.values}

    def _cost(self, plan: Plan, chosen: Mapping[str, int]) -> float:
        sizes, total = self._sizes(plan), 0.0
        for name, size in sizes.items():
            total += size * chosen.get(name, FLOAT)
        if self.cost == "bytes":
            total += FLOAT * (plan.params - sum(sizes.values()))
        return total


def _nats(name: str, weight: Tensor, energy: Tensor, rounding: Rounding) -> float:
    step = step_of(rounding, name, weight).double()
    return float((energy.double() * step.square()).sum()) / 24
