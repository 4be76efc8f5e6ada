"""`prune`: the verbs in order."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import nn

from tpvprune import report as reporting
from tpvprune.batches import Batch, Progress, Selector, inputs_of, length_of, repeatable
from tpvprune.budget import Budget
from tpvprune.errors import DataError
from tpvprune.kinds import as_verb
from tpvprune.measures import Report
from tpvprune.plan import Plan
from tpvprune.planning.graph import trace
from tpvprune.planning.latency import LatencyTable
from tpvprune.planning.widths import check_reachable
from tpvprune.recovery.finetune import Finetune
from tpvprune.recovery.reconstruct import Reconstruct
from tpvprune.recovery.recover import CLOSED_FORM, recover
from tpvprune.recovery.settings import GaussNewton
from tpvprune.schedule import Planning, plan_for
from tpvprune.scores import Scores
from tpvprune.scoring.criteria import Criterion, name_of, predicted_kl, score
from tpvprune.scoring.probing import probes_for
from tpvprune.scoring.tpv import TPV
from tpvprune.surgery.removal import apply, refitted


@dataclass(frozen=True, eq=False)
class Pruned:
    """What `prune` gives back.

    Attributes:
        model: the smaller model.
        plan: what was removed; `plan.graph` is the graph.
        scores: reusable for any other budget.
        report: what was asked, what came out.
    """

    model: nn.Module
    plan: Plan
    scores: Scores
    report: Report

    def __repr__(self) -> str:
        return f"Pruned({type(self.model).__name__}, {self.plan!r})"


@as_verb
def prune(
    model: nn.Module,
    batches: Iterable[Batch],
    budget: Budget,
    *,
    criterion: Criterion | None = None,
    planning: Planning | None = None,
    output: Selector = None,
    depth: bool = False,
    latency: LatencyTable | None = None,
    held_out: Iterable[Batch] | None = None,
    reconstruct_with: Reconstruct | None = CLOSED_FORM,
    refine_with: GaussNewton | None = None,
    finetune_with: Finetune | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Trace, score, plan, cut, recover and measure. The model given is left as it was.

    Args:
        model: any module; one that was pruned before counts as the dense one, and what comes of it carries the plan
            from the first of them.
        batches: unlabeled; a list or a DataLoader.
        budget: what the result may cost.
        criterion: how to score; `TPV()` by default, compensated if the closed form follows (and drift is not
            bounded, nor the joint allocator asked for), each of few samples probed more often: about 1,280
            cotangents, at most eight a sample.
        planning: in how many steps, and by which allocator; one step by default.
        output: which part of what the model returns counts, where that is not one tensor: a key, attribute or
            index, or a function. A criterion of your own has its own `output`.
        depth: whether residual blocks may be skipped as a whole; see `trace`.
        latency: from `latency_table`, of the graph that `trace` gives; needed where milliseconds are bounded.
        held_out: other batches to measure on, with labels or without. Without them the report measures
            on the inputs of the scoring batches and says so.
        reconstruct_with: closed-form recovery; None leaves it out.
        refine_with: Gauss-Newton refit after it; left out by default.
        finetune_with: distillation; left out by default.
        progress: called as `progress(stage, done, total)`.

    Raises:
        BudgetError: the budget cannot be met; told before anything is scored.
        InputError: see the verbs; nothing of the model is changed.
    """
    repeatable(batches, "scoring and recovery both need them")
    if held_out is not None:
        repeatable(held_out, "the prediction and the report both need them")
    seconds: dict[str, float] = {}

    def timed(stage: str, since: float) -> float:
        seconds[stage] = round(time.perf_counter() - since, 2)
        return time.perf_counter()

    clock = time.perf_counter()
    first = next(iter(batches), None)
    if first is None:
        raise DataError("there is no batch; give at least one")
    if criterion is None:
        whole = budget.drift is not None or (planning is not None and planning.allocator == "joint")
        compensated, count = reconstruct_with is not None and not whole, length_of(batches)
        probes = 1 if count is None else probes_for(count * len(inputs_of(first)))
        criterion = TPV(output=output, compensated=compensated, probes=probes)
    graph = trace(model, inputs_of(first)[:1], depth=depth, progress=progress)
    clock = timed("trace", clock)
    check_reachable(graph, budget, latency=latency, criterion=name_of(criterion))
    scores = score(model, batches, graph, criterion, progress=progress)
    clock = timed("score", clock)
    plan = plan_for(
        model,
        batches,
        graph,
        budget,
        criterion=criterion,
        planning=planning,
        scores=scores,
        latency=latency,
        progress=progress,
        refit_with=reconstruct_with,
    )
    clock = timed("plan", clock)
    cut = apply(model, plan)
    clock = timed("apply", clock)
    small = None
    if any(stage is not None for stage in (reconstruct_with, refine_with, finetune_with)):
        refit = partial(
            recover,
            batches=batches,
            teacher=model,
            reconstruct_with=reconstruct_with,
            refine_with=refine_with,
            finetune_with=finetune_with,
            output=output,
            progress=progress,
        )
        small = refitted(cut, model, plan, refit)
        clock = timed("recover", clock)
    measured = batches if held_out is None else held_out
    predicted = predicted_kl(criterion, model, measured, plan, output=output)
    report = reporting.build(
        dense=model,
        pruned=cut,
        recovered=small,
        plan=plan,
        budget=budget,
        batches=measured,
        predicted=predicted,
        output=output,
        latency=latency,
        latency_batch=8 if latency is None else (latency.measured.get("batch") or [8])[0],
        seconds=seconds,
        labelled=held_out is not None,
        data={"scored": scores.samples, "measured_on": "scoring batches" if held_out is None else "held-out batches"},
        progress=progress,
    )
    return Pruned(cut if small is None else small, plan, scores, report)
