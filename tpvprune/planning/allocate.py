"""Turn scores into a plan: which units leave so that a budget holds, at the least predicted drift."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor

from tpvprune.batches import Progress
from tpvprune.budget import QUANTITIES, Budget, Quantity
from tpvprune.errors import BudgetError, PlanError
from tpvprune.kinds import as_verb
from tpvprune.plan import Plan
from tpvprune.planning.greedy import Ladders, Spending, Steps, shrink
from tpvprune.planning.joint import Joint
from tpvprune.planning.latency import LatencyTable
from tpvprune.planning.optimism import LEAST, RETAKES, drift_on, optimism, tells_of_others, widest
from tpvprune.planning.widths import check_reachable, costs_of, widths_of
from tpvprune.scores import Scores
from tpvprune.types import Graph

logger = logging.getLogger(__name__)
Allocator = Literal["auto", "joint", "global", "uniform", "isomorphic"]
ALLOCATORS: tuple[Allocator, ...] = get_args(Allocator)


@as_verb
def allocate(
    scores: Scores,
    graph: Graph,
    budget: Budget,
    *,
    allocator: Allocator = "auto",
    per: Quantity | None = None,
    shrinkage: float | None = None,
    exchange: bool = True,
    after: Plan | None = None,
    latency: LatencyTable | None = None,
    measured: bool = False,
    cross_validated: bool | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Remove, step by step, the units that cost the least predicted drift for what they save.

    Units leave in steps of their group's rounding; groups compete by what a step adds to the drift over what it
    saves at the widths of that moment. Last, steps that turned out unnecessary are taken back, dearest first, so
    that the plan ends close below the bounds. Where only drift is bounded, steps are taken as long as one fits.

    Args:
        scores: from `score`, for this graph.
        graph: from `trace`.
        budget: what is bounded, and what stays whole.
        allocator: "joint" counts what a step adds to the drift of the whole plan, covariances and the drift already
            there included, and needs sensitivities in the scores; "global" adds up scores as if units did not
            matter to each other; "isomorphic" does so among groups of the same structure, all structures losing the
            same share of units; "uniform" takes the same share of every group; "auto" is joint where it can be.
        per: what a step's drift is divided by. By default what the budget bounds (several: what is still above its
            bound, each as a share of what it has to lose), and multiply-adds where only drift is bounded.
        shrinkage: of the covariances that "joint" counts, 0 to 1; estimated from the sensitivities by default.
        exchange: whether "joint" betters its plan by exchanges at the end.
        after: the plan that has made the model which scores and graph are of, so that fractions, floors and
            roundings are those of the dense model. Drift is counted from that model on.
        latency: from `latency_table`, of the dense model; needed where milliseconds are bounded.
        measured: whether the caller measures the drift that comes of it and goes by that: a bound on drift is then
            held against what the scored samples say, and nothing is warned of.
        cross_validated: whether the drift on other samples is estimated too, by plans that halves of the samples make
            and judge (Efron 1986); where drift is bounded by default. It takes two more plans, and a bound on drift
            alone that they tell to be exceeded is held by at most five tries.
        progress: called as `progress("allocate", percent, 100)`, of the plans that may have to be made.

    Returns:
        A plan whose costs are at most the bounds, in the coordinates of `graph`; `Plan.macs` and `Plan.params` are
        exact, and `made_by` says what was asked and what came out; `predicted_kl`, where there is one: with
        `optimism`, the nats by which it drifts further on other samples than on those that it was made by, it is the
        drift on others, and otherwise that on those, products of different units shrunk as the allocator counts
        them, by `shrinkage`; `understated`, under a bound on drift, the groups that are cut before a norm that pools
        over their units, whose drift is more than is predicted.

    Raises:
        PlanError: the scores belong to another model or lack a group, or what the allocator or the budget needs is
            not in them.
        BudgetError: a pattern matches nothing, a bound lies below what the floors (or the drift) allow, or a setting
            is unknown.
    """
    _check(scores, graph, budget, allocator, per, shrinkage)
    if allocator == "auto":
        allocator = "global" if scores.sensitivities is None else "joint"
    widths, bounds = widths_of(graph, budget, after), check_reachable(graph, budget, after, latency, scores.criterion)
    may_go = next((group.id for group in graph.groups if group.kind == "block" and len(widths[group.id]) > 1), None)
    if allocator in ("uniform", "isomorphic") and may_go is not None:
        raise BudgetError(
            f"allocator={allocator!r} takes shares of groups, and block {may_go!r} goes whole or stays: protect the "
            "blocks, trace without depth=True, or choose joint or global"
        )
    if allocator == "joint" and scores.sensitivities is None:
        raise PlanError("allocator='joint' needs scores with sensitivities: score with TPV(sensitivities=1280)")
    if per is None and len(budget.quantities) < 2:
        per = next(iter(budget.quantities), "macs")
    most = budget.most_drift
    asked = most is not None if cross_validated is None else cross_validated
    judged = asked and scores.in_nats and tells_of_others(scores)
    if asked and not judged and scores.in_nats and not measured:
        warn_of_few(scores)
    if not bounds and scores.sensitivities is not None:
        # Chosen by its own noise, a slope that falls would make room for more than it gives.
        effects = scores.sensitivities
        scores = replace(scores, sensitivities=replace(effects, linear=effects.linear.clamp(min=0)))
    made_by = {
        "allocator": allocator,
        "rank": "score" if per == "units" else f"score per {per or ' and '.join(bounds)}",
        "criterion": scores.criterion,
        "samples": scores.samples,
        "asked": bounds | ({} if most is None else {"drift": most}),
    }

    alone = None if measured or bounds else most  # all that is bounded
    told = _Told(progress, (3 if judged else 1) * (RETAKES + 1 if judged and alone is not None else 1))
    way = _Way(graph, widths, allocator, per, latency, shrinkage, exchange, told)

    def taken(room: float | None) -> tuple[Plan, float]:
        """A plan that drifts by no more than `room` as the allocator counts it, and its drift in nats."""
        steps, spending = way.steps(scores), way.spending(bounds)
        # Under costs there is one plan of least drift, and who judges it says whether it may be.
        free = room is None or (bounds and (judged or measured))
        keep = way.keep(steps, spending, None if free or room is None else 2 * room)
        counted = max(0.0, steps.drift({name: ~mask for name, mask in keep.items()}) / 2)
        got = {name: cost.total for name, cost in spending.bounded.items()}
        about = {**made_by, "got": got, **({"predicted_kl": counted} if scores.in_nats else {})}
        about |= {"shrinkage": round(steps.shrinkage, 4)} if isinstance(steps, Joint) else {}
        if judged and keep:
            # Milliseconds are sums of floats, which each plan takes in another order.
            alike = bounds or {str(per): costs_of(per or "macs", graph, keep, latency=latency).total * (1 + 1e-9)}
            more = optimism(scores, graph, lambda half: way.keep(way.steps(half), way.spending(alike), None))
            if more is not None:
                counted = max(0.0, drift_on(scores, graph, keep) + more) / 2
                about |= {"predicted_kl": counted, "optimism": more / 2}
        return Plan(keep, graph, about), counted

    if alone is not None:
        plan = widest(taken, alone, alone)[0] or Plan({}, graph, {**made_by, "got": {}, "predicted_kl": 0.0})
    else:
        plan, drift = taken(most)
        if most is not None and not measured and drift > most:
            raise BudgetError(
                f"the budget cannot be met with a drift of at most {most:g} nats: the plan of least drift is predicted "
                f"at {drift:.3g} on samples that it was not made by; allow more drift, ask for less, or score more"
            )
    told.end()
    pooled = [] if most is None else understated(plan)
    if not measured:
        warn_of(pooled)
    return replace(plan, made_by={**plan.made_by, "understated": pooled}) if pooled else plan


@dataclass(frozen=True)
class _Way:
    """How units are chosen by scores, whichever these are; see `allocate`."""

    graph: Graph
    widths: dict[str, list[int]]
    allocator: Allocator
    per: Quantity | None
    latency: LatencyTable | None
    shrinkage: float | None
    exchange: bool
    told: _Told

    def keep(self, steps: Steps, spending: Spending, most: float | None) -> dict[str, Tensor]:
        """The masks of one plan."""
        keep = shrink(self.graph, steps, spending, most, self.told.within)
        self.told.next()
        return keep

    def steps(self, scores: Scores) -> Steps:
        """The steps in which groups shrink."""
        if self.allocator == "joint" and scores.sensitivities is not None:
            return Joint(self.graph, self.widths, scores.sensitivities, self.shrinkage, self.exchange)
        pools = self.allocator if self.allocator in ("uniform", "isomorphic") else "global"
        return Ladders(self.graph, self.widths, scores, pools)

    def spending(self, bounds: Mapping[str, float]) -> Spending:
        """What steps are taken for."""
        bounded = {name: costs_of(name, self.graph, latency=self.latency) for name in bounds}
        rank = (
            None if self.per is None else bounded.get(self.per) or costs_of(self.per, self.graph, latency=self.latency)
        )
        return Spending(bounded, dict(bounds), rank)


@dataclass
class _Told:
    """Tells how far `allocate` is, in percent."""

    progress: Progress | None
    plans: int
    made: int = 0
    last: int = -1

    def within(self, share: float) -> None:
        """That a share of the plan that is being made is done."""
        percent = int(100 * (self.made + min(1.0, max(0.0, share))) / self.plans)
        if self.progress and percent != self.last:
            self.last = percent
            self.progress("allocate", percent, 100)

    def next(self) -> None:
        """That a plan is done."""
        self.made += 1
        self.within(0.0)

    def end(self) -> None:
        """That no more plans are needed."""
        self.made = self.plans
        self.within(0.0)


def understated(plan: Plan) -> list[str]:
    """Groups that a plan cuts where zeroing units is not removing them: the norm they stand before pools over them."""
    graph, lost = plan.graph, plan.graph.lost({name: ~mask for name, mask in plan.keep.items()})
    return [n for n, mask in plan.keep.items() if n not in lost and not (graph[n].exact_mask or bool(mask.all()))]


def warn_of_few(scores: Scores) -> None:
    """Say that a drift is held against the samples alone that were scored."""
    logger.warning(
        "the drift is that of the %d samples that were scored, and may be more on others: it takes %d samples, and "
        "scores with sensitivities or halves, to tell",
        scores.samples,
        LEAST,
    )


def warn_of(pooled: Sequence[str]) -> None:
    """Say that a plan drifts by more than is predicted, where groups of `understated` are cut."""
    if pooled:
        logger.warning(
            "groups that are cut (%s) stand before a norm that pools over their units: what that does to the rest "
            "is not predicted, and the drift may be about three times the bound; measure it, or plan in steps",
            ", ".join(pooled[:3]) + (", ..." if len(pooled) > 3 else ""),
        )


def _check(
    scores: Scores, graph: Graph, budget: Budget, allocator: str, per: str | None, shrinkage: float | None
) -> None:
    if scores.model_id != graph.model_id:
        raise PlanError(f"the scores are of model {scores.model_id}, the graph of {graph.model_id}; score again")
    for group in graph.groups:
        if group.id not in scores.values or len(scores.values[group.id]) != group.units:
            raise PlanError(f"the scores lack group {group.id!r} with its {group.units} units; score again")
        if group.kind == "weight":
            raise PlanError(f"the units of {group.id!r} are single weights, which save no budget; trace the model")
    if allocator not in ALLOCATORS or per not in (None, *QUANTITIES):
        raise BudgetError(
            f"allocator={allocator!r}, per={per!r}: an allocator is one of {', '.join(ALLOCATORS)}, and per one of "
            f"{', '.join(QUANTITIES)}"
        )
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise BudgetError(f"shrinkage={shrinkage} must lie between 0 and 1")
