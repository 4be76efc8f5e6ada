"""Plans in one step or several: what is left is scored again after each, and the steps are one plan in the end."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpvprune.batches import (
    Batch,
    Progress,
    device_of,
    evaluation_mode,
    finite_output,
    inputs_of,
    is_classifier,
    repeatable,
)
from tpvprune.budget import QUANTITIES, Budget, Quantity
from tpvprune.errors import BudgetError, DataError, ModelError, PlanError
from tpvprune.kinds import as_verb
from tpvprune.plan import Plan
from tpvprune.planning.allocate import ALLOCATORS, Allocator, allocate, warn_of_few
from tpvprune.planning.graph import trace
from tpvprune.planning.latency import LatencyTable
from tpvprune.planning.optimism import LEAST, tells_of_others
from tpvprune.planning.sparsity import sparsify
from tpvprune.planning.weights import weight_graph
from tpvprune.planning.widths import check_reachable, costs_of, widths_of
from tpvprune.planstate import begun_with, gone_on, keep
from tpvprune.processes import from_first, of_all, process
from tpvprune.recovery.reconstruct import Reconstruct
from tpvprune.refits import Refits
from tpvprune.report import Answers, compare
from tpvprune.scores import Scores
from tpvprune.scoring.criteria import Criterion, name_of, score
from tpvprune.scoring.losses import JBR
from tpvprune.scoring.shares import kept_scores
from tpvprune.scoring.tpv import TPV
from tpvprune.stepping import Asked, Step
from tpvprune.surgery.removal import apply
from tpvprune.trust import First, may_doubt, trusted_shrinkage
from tpvprune.types import Graph

logger = logging.getLogger(__name__)
_UNITS = {"latency_ms": " ms", "bytes": " B", "units": " units"}  # with a unit, no number is read as a share


@dataclass(frozen=True)
class Planning:
    """How a plan is made of scores.

    Attributes:
        steps: how often units are scored and removed; what is left is scored again in between, as far from the dense
            model as it is by then.
        spacing: "linear" takes the same amount off each bounded cost in every step, "geometric" the same share.
        allocator: see `allocate`.
        per: see `allocate`.
        shrinkage: see `allocate`; the estimated one, or a larger one where plans made with that are measured to drift
            less (not where steps are refitted).
        refit: whether what is left is refitted in closed form, from the dense weights, before it is scored again. What
            comes out is a plan all the same; the model it leaves is refitted by whoever recovers it.
    """

    steps: int = 1
    spacing: Literal["linear", "geometric"] = "linear"
    allocator: Allocator = "auto"
    per: Quantity | None = None
    shrinkage: float | None = None
    refit: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise BudgetError(f"steps={self.steps!r} must be a whole number from 1")
        if self.spacing not in ("linear", "geometric"):
            raise BudgetError(f"spacing={self.spacing!r} must be 'linear' or 'geometric'")
        if self.allocator not in ALLOCATORS or self.per not in (None, *QUANTITIES):
            raise BudgetError(
                f"allocator={self.allocator!r} must be one of {', '.join(ALLOCATORS)}, and per={self.per!r} one of "
                f"{', '.join(QUANTITIES)}"
            )
        if self.refit and self.steps == 1:
            raise BudgetError("refit=True is for plans in steps: give steps=4, or leave the refit to recovery")
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise BudgetError(f"shrinkage={self.shrinkage} must lie between 0 and 1")

    def bounds(self, dense: float, bound: float) -> list[float]:
        """Where a cost is to stand after each step."""
        if self.spacing == "geometric":
            return [dense * (bound / dense) ** (n / self.steps) for n in range(1, self.steps + 1)]
        return [dense - (dense - bound) * n / self.steps for n in range(1, self.steps + 1)]


@as_verb
def plan_for(
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    budget: Budget,
    *,
    criterion: Criterion | None = None,
    planning: Planning | None = None,
    scores: Scores | None = None,
    latency: LatencyTable | None = None,
    progress: Progress | None = None,
    save: str | PathLike[str] | None = None,
    refit_with: Reconstruct | None = None,
    refit_batches: Iterable[Batch] | None = None,
) -> Plan:
    """Score and allocate, in as many steps as asked; one plan of the dense model.

    How far the joint allocator trusts products of units is measured on the first of the batches, by plans that cost the
    same, where outputs are logits and `planning` does not say.

    After the first step, TPV and JBR score what is left with the dense model as the reference, so that the drift
    that is already there counts. Where drift is bounded, what is left is measured against the dense model after every
    step, on the batches that are scored, and what it is expected to drift further on others is added (`optimism` of
    `allocate`). Where steps are refitted, the refitted model is measured: by refits on each half of the samples, on
    the other half. Under drift alone a step gets its share of the bound; one that drifts more is taken again, smaller,
    or left out, and one that a refit brings far below it is taken again, larger. With costs, the plan meets them within
    that drift, or there is an error. Outputs that are not `(batch, classes)`, and batches that can be read once only,
    leave it at the prediction, which is warned of: in one step only.

    Under several processes each gives its own share of the batches, and all get the same plan.

    Args:
        model: the dense model.
        batches: unlabeled; read once a step, and where drift is bounded to measure it.
        graph: from `trace`, of the dense model.
        budget: what the result may cost.
        criterion: how to score; `TPV()` by default.
        planning: how to plan; one step by default.
        scores: of the dense model, if there are any.
        latency: see `allocate`.
        progress: called as `progress("plan", steps_done, steps)`, by `score`, `allocate` and `compare`.
        save: where the plan so far is kept, and beside it the scores that its next step is made of; what is found
            there of the same arguments is gone on with. Of several processes the first one's counts.
        refit_with: settings of the refits between steps, where `planning` asks for them.
        refit_batches: unlabeled batches for those, the same in all of several processes; `batches` by default.

    Raises:
        BudgetError: the bounds cannot be met, in one step or in those asked for (says in which, and how far it got).
        PlanError: `save` holds what was begun with something else; names what.
        InputError: see `score` and `allocate`; what is kept in `save` stays valid.
    """
    planning, criterion = planning or Planning(), criterion or TPV()
    choice: dict[str, Any] = {field.name: getattr(planning, field.name) for field in fields(planning)}
    del choice["steps"], choice["spacing"], choice["refit"]
    choice |= {"latency": latency, "progress": progress}
    by = name_of(criterion) if scores is None else scores.criterion
    finals = check_reachable(graph, budget, latency=latency, criterion=by)
    state, kept = None if save is None else Path(save), None
    told = cache(partial(_measurable, model, batches, criterion))  # which a pass has to tell, once
    measurable = budget.drift is None or planning.steps > 1 or told()
    answers = Answers(model, getattr(criterion, "output", None))
    on_first = partial(_measured, answers=answers, batches=First(batches), progress=progress)
    if planning.steps == 1 and (budget.drift is None or not measurable):
        if not measurable:
            logger.warning(
                "the drift is predicted to first order and not measured: that takes logits (batch, classes), and "
                "batches that can be read again"
            )
        if scores is None:
            kept = _kept(state, model, "step1")
            scores = score(model, batches, graph, criterion, progress=progress, save=kept, exact=True)
        if measurable and may_doubt(scores, choice) and told():
            choice["shrinkage"] = trusted_shrinkage(model, scores, graph, budget, choice, on_first)
        plan = from_first(allocate(scores, graph, budget, **choice))
        _forget(kept)
        return plan
    repeatable(batches, "every step reads them")
    example = _example(batches)
    ways = {
        name: planning.bounds(costs_of(name, graph, latency=latency).total, bound) for name, bound in finals.items()
    }
    keeps = from_first(state is not None) and planning.steps > 1
    begun = dict[str, Any]()
    if keeps:
        begun = begun_with(
            model,
            batches,
            graph,
            criterion,
            scores=scores,
            latency=latency,
            refit_batches=refit_batches,
            budget=budget,
            planning=planning,
            refits=refit_with,
        )
    plan = gone_on(state, begun) or Plan({}, graph, {"steps": []})
    if planning.refit and refit_batches is None and process()[1] > 1:
        raise BudgetError("refit=True under several processes: give refit_batches, the same in all of them")
    source = batches if refit_batches is None else refit_batches
    refit = Refits(answers, source, refit_with, progress) if planning.refit else None
    on_scored = partial(_measured, answers=answers, batches=batches, progress=progress)

    def measure(plan: Plan, cut: nn.Module) -> float:
        """KL in nats to the dense model, refitted if asked for."""
        if refit is None:
            return on_scored(cut)
        crossed = from_first(refit.drift(plan))
        return on_scored(refit(plan)) if crossed is None else crossed

    asked = Asked.of(budget, finals, planning.steps, latency)
    small = model if not plan.removed else apply(model, plan) if refit is None else refit(plan)
    for step in range(len(plan.made_by["steps"]), planning.steps):
        if progress:
            progress("plan", step, planning.steps)
        first = not plan.removed
        now = graph if first else _again(small, example, plan, progress)
        lacking = [g.id for g in graph.groups if g.kind == "block" and g.id not in now and bool(plan.mask(g.id).all())]
        if lacking and "units" in budget.quantities:
            raise PlanError(
                f"block {lacking[0]!r} counts as a unit, but cannot be skipped any more after step {step}: plan in one "
                "step, or bound another quantity than units"
            )
        if step and all(len(widths) == 1 for widths in widths_of(now, budget, None if first else plan).values()):
            break  # nothing can leave any more
        found = scores if first else None
        if found is None:
            again, kept = criterion if first else _from(criterion, model), _kept(state, small, f"step{step + 1}")
            found = score(small, batches, now, again, progress=progress, save=kept, exact=True)
            scores = found if first else None  # good for the next step too, where nothing leaves in this one
        if budget.drift is not None and not (tells_of_others(found) if refit is None else found.samples >= LEAST):
            warn_of_few(found)
        limit = _limit_of(budget, {name: way[step] for name, way in ways.items()})
        how = dict(choice)
        if refit is None and may_doubt(found, choice) and told():
            after = None if first else plan
            how["shrinkage"] = trusted_shrinkage(small, found, now, limit, choice, on_first, after)
        taken = Step(step, asked, plan, small, now, found, limit, how, refit, measure)
        plan, small = taken.taken()
        if state is not None and keeps and process()[0] == 0:
            keep(state, plan, begun)
        _forget(kept)
    asked.check(plan)
    if progress:
        progress("plan", planning.steps, planning.steps)
    return plan


def _kept(state: Path | None, model: nn.Module, what: str) -> Path | None:
    """Where scores that a plan is made of next are kept, in all processes."""
    return from_first(None if state is None else kept_scores(state, model, what))


def _forget(kept: Path | None) -> None:
    if kept is not None and process()[0] == 0:
        kept.unlink(missing_ok=True)


def _example(batches: Iterable[Batch]) -> Tensor:
    """One input of any process, `(1, ...)`."""
    first = next(iter(batches), None)
    for found in of_all(None if first is None else inputs_of(first)[:1]):
        if found is not None:
            return found
    raise DataError("there is no batch; give at least one")


def _measurable(model: nn.Module, batches: Iterable[Batch], criterion: Criterion) -> bool:
    """Whether the drift of what a plan leaves can be measured, with the batches of all processes."""
    first = None if iter(batches) is batches else next(iter(batches), None)
    logits = None
    if first is not None:
        with evaluation_mode(model), torch.no_grad():
            try:
                inputs = inputs_of(first).to(device_of(model))
                logits = is_classifier(finite_output(model, inputs, getattr(criterion, "output", None)))
            except ModelError:  # the scores may have been made by a criterion that knows which output counts
                logits = False
    told = [found for found in of_all(logits) if found is not None]
    return bool(told) and all(told)


def _measured(small: nn.Module, answers: Answers, batches: Iterable[Batch], progress: Progress | None) -> float:
    """KL to the dense model on the batches of all processes."""
    metrics, samples = {"now": {"kl": 0.0}}, 0
    if process()[1] == 1 or next(iter(batches), None) is not None:
        metrics, samples = compare(
            {"now": small},
            answers.model,
            batches,
            output=answers.output,
            kept=answers,
            labelled=False,
            progress=progress,
        )
    found = of_all((metrics["now"].get("kl"), samples))
    told = [(kl, count) for kl, count in found if kl is not None]
    if len(told) < len(found):
        raise BudgetError(
            "drift is measured after every step on logits (batch, classes), and the model gives others: plan in one "
            "step, or bound a cost"
        )
    return told[0][0] if len(told) == 1 else sum(kl * count for kl, count in told) / sum(count for _, count in told)


def _again(small: nn.Module, inputs: Any, plan: Plan, progress: Progress | None) -> Graph:
    """The graph of what a plan has left, with units of the kinds that the dense model's graph has."""
    kinds = {group.kind for group in plan.graph.groups}
    now = trace(small, inputs, depth="block" in kinds, bundles="bundle" in kinds, progress=progress)
    # A block of blocks may come to count as one once most of those in it are gone.
    return replace(now, groups=tuple(g for g in now.groups if g.kind != "block" or g.id in plan.graph))


def _limit_of(budget: Budget, bounds: dict[str, float]) -> Budget:
    """The same budget with other bounds, in absolute numbers."""
    written: dict[str, Any] = {
        name: f"{bound if name == 'latency_ms' else math.floor(bound + 1e-6)}{_UNITS.get(name, '')}"
        for name, bound in bounds.items()
    }
    return replace(budget, **written)


def _from(criterion: Criterion, dense: nn.Module) -> Criterion:
    """The criterion with drift counted from the dense model, where it has a notion of that."""
    counts = isinstance(criterion, JBR) or (isinstance(criterion, TPV) and criterion.cap > 0)
    if counts and criterion.reference is None:  # type: ignore[attr-defined]  # both have it
        return replace(criterion, reference=dense)  # type: ignore[type-var]  # both are dataclasses
    return criterion


def hold_zeros(
    dense: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    criterion: Criterion,
    asked: Mapping[str, Any],
    progress: Progress | None = None,
    save: str | PathLike[str] | None = None,
) -> Plan:
    """A plan, and single weights of what it leaves held at zero.

    Args:
        dense: the dense model.
        plan: what leaves it.
        batches: to score what is left on.
        criterion: how to.
        asked: arguments of `sparsify`.
        progress: see `score`.
        save: beside which the scores are kept, as in `plan_for`; whoever keeps the plan removes them.

    Raises:
        ModelError: the criterion cannot score a weight.
        BudgetError: what is asked for cannot be met.
    """
    small = apply(dense, plan)
    weights, kept = weight_graph(small), _kept(None if save is None else Path(save), small, "zeros")
    scores = score(small, batches, weights, criterion, progress=progress, save=kept)
    return sparsify(scores, weights, after=plan, **asked)
