"""Pruning and quantisation in one currency: nats of KL, and how to spend a budget of them on both.

What rounding a layer's weights to b bits costs is half the trace form, `step^2 / 12` times the layer's part of `Tr(H)`;
what a plan costs is half its TPV. Errors of rounding are taken as independent with mean zero, so that the costs of
layers add up, and add to that of a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from torch import nn

from tpvprune.analysis.energies import weight_energies
from tpvprune.analysis.perturbations import parameters_of
from tpvprune.analysis.quantise import Per
from tpvprune.analysis.rounder import FLOAT, Cost, Mix, Rounder
from tpvprune.batches import Batch, Progress, Selector, repeatable
from tpvprune.budget import Budget
from tpvprune.errors import BudgetError, InputError
from tpvprune.groupwise import sensitivity
from tpvprune.kinds import as_verb
from tpvprune.plan import Plan
from tpvprune.planning.allocate import allocate, warn_of, warn_of_few
from tpvprune.planning.optimism import tells_of_others
from tpvprune.scores import Scores
from tpvprune.scoring.criteria import score
from tpvprune.scoring.perturb import Rounding
from tpvprune.scoring.tpv import TPV
from tpvprune.types import Graph

BITS = (8, 6, 5, 4, 3, 2)
MACS = (0.9, 0.8, 0.7, 0.6, 0.5)  # shares of multiply-adds that totals of pruning are told at
SHARES = (0.75, 0.5)  # shares of a group's units that pruning it alone is told at
SPLITS = 10  # parts of the budget that go to pruning, or not


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
class GroupAdvice:
    """One group of units that can leave.

    Attributes:
        id: of the group.
        units: how many there are.
        kept: units that the mixed plan leaves.
        kl_at_share: nats, by share of the units that stay, with the group alone cut; a block has one, of share 0.
        saved_at_share: share of all multiply-adds that each of them saves.
    """

    id: str
    units: int
    kept: int
    kl_at_share: Mapping[float, float]
    saved_at_share: Mapping[float, float]


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
        groups: in execution order.
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
    groups: tuple[GroupAdvice, ...] = ()

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
            "groups": [asdict(one) for one in self.groups],
            "samples": self.samples,
        }


@as_verb
def advise(
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    drift: float,
    *,
    bits: Sequence[int] = BITS,
    per: Per = "channel",
    cost: Cost = "bytes",
    budget: Budget | None = None,
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
        per: one range a "tensor", or one a "channel": a slice along the first dimension, as `Rounding` has it.
        cost: what is made small.
        budget: how widths are rounded and what is protected; what it bounds does not count.
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
    rules = budget or Budget(macs=1.0)
    widths = (FLOAT, *sorted({Rounding(count, per).bits for count in bits}, reverse=True))
    repeatable(batches, "scores and energies both need them")
    if scores is None:
        scores = score(model, batches, graph, TPV(output=output, seed=seed), progress=progress)
    if not tells_of_others(scores):
        warn_of_few(scores)
    weights = {n: w for n, w in parameters_of(model, None).items() if w.ndim > 1}
    energies = weight_energies(model, batches, list(weights), seed=seed, output=output, progress=progress)
    rounder = Rounder(model, energies, widths, per, cost, graph)
    tables = rounder.tables(Plan({}, graph))
    found = []
    for split in range(SPLITS + 1):
        # What is chosen by few samples drifts by more than they say, the more so the less of it there is.
        plan = _pruned(scores, graph, rules, drift * (split / SPLITS) ** 2, progress)
        spent = math.inf if plan is None else float(plan.made_by.get("predicted_kl", 0.0))
        if plan is not None and spent <= drift:
            found.append((plan, *rounder.mix(plan, spent, drift - spent)))
        if progress:
            progress("advise", split + 1, SPLITS + 1)
    best = min(found, key=lambda one: one[1].cost)
    alone = {
        "rounding": found[0][1],
        "pruning": min((rounder.mix(plan, one.pruning, -1.0)[0] for plan, one, _ in found), key=lambda mix: mix.cost),
    }
    plan, mixed, chosen = best
    warn_of(plan.made_by.get("understated", ()))
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
        pruning_totals=_totals(scores, graph, rules),
        rounding_totals={count: sum(table[count] for table in tables.values()) for count in widths[1:]},
        mixed=mixed,
        alone=alone,
        plan=plan,
        bits={name: count for name, count in chosen.items() if count != FLOAT},
        samples=energies.samples,
        groups=_groups(model, graph, scores, plan),
    )


def _pruned(scores: Scores, graph: Graph, rules: Budget, drift: float, progress: Progress | None) -> Plan | None:
    """The plan of one share of the budget; None where nothing fits into it, or nothing can leave."""
    if not drift:
        return Plan({}, graph)
    try:
        return allocate(scores, graph, rules.only(drift=drift), measured=True, progress=progress)
    except BudgetError:
        return None


def _groups(model: nn.Module, graph: Graph, scores: Scores, plan: Plan) -> tuple[GroupAdvice, ...]:
    if not graph.groups:
        return ()
    curves = sensitivity(model, (), graph, scores, SHARES)
    return tuple(
        GroupAdvice(
            id=curve.group,
            units=curve.units,
            kept=int(plan.mask(curve.group).sum()),
            kl_at_share={point.share: point.predicted_kl for point in curve.points},
            saved_at_share={point.share: point.macs_saved for point in curve.points},
        )
        for curve in curves.curves
    )


def _totals(scores: Scores, graph: Graph, rules: Budget) -> dict[float, float]:
    found = {}
    for share in MACS:
        try:
            plan = allocate(scores, graph, rules.only(macs=share), measured=True, cross_validated=True)
            found[share] = float(plan.made_by["predicted_kl"])
        except BudgetError:
            break
    return found
