"""Cut the same model by several criteria to the same budgets, and measure what each has kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from tpvprune.batches import Batch, Progress, Selector, repeatable
from tpvprune.budget import Budget
from tpvprune.comparison import ComparedPoint, Comparison
from tpvprune.described import described
from tpvprune.digests import weights_digest
from tpvprune.errors import InputError
from tpvprune.groupwise import checked_shares, digest_of
from tpvprune.kinds import as_verb
from tpvprune.planning.widths import check_reachable
from tpvprune.recovery.reconstruct import Reconstruct, reconstruct
from tpvprune.report import compare
from tpvprune.schedule import Planning, plan_for
from tpvprune.scoring.criteria import Criterion, score
from tpvprune.scoring.resume import units_digest
from tpvprune.surgery.removal import apply, refitted
from tpvprune.types import Graph

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)


@as_verb
def compare_criteria(
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    criteria: Mapping[str, Criterion],
    held_out: Iterable[Batch],
    *,
    shares: Sequence[float] = SHARES,
    budget: Budget | None = None,
    planning: Planning | None = None,
    refit_with: Reconstruct | None = None,
    output: Selector = None,
    progress: Progress | None = None,
    save: str | PathLike[str] | None = None,
) -> Comparison:
    """Compare criteria: each scores once, plans for every budget, and what is left is measured on other images.

    Args:
        model: the model `graph` was traced from. It is left as it was.
        batches: unlabeled, to score (and refit) on; criteria that need labels find them here.
        graph: from `trace`.
        criteria: by the name they are shown under.
        held_out: other batches to measure on, with labels or without.
        shares: of the multiply-adds to keep at most.
        budget: how plans are rounded and what is protected; what it bounds does not count.
        planning: how plans are made; in one step by default.
        refit_with: refit every model in closed form before it is measured; left out by default.
        output: which part of what the model returns counts, see `TPV`.
        progress: called as `progress(stage, done, total)`; "compare" counts criteria.
        save: a file that the comparison is saved to after every criterion. Criteria in a file that exists are not
            done again if weights, graph, images and settings are the same.

    Raises:
        InputError: there is no criterion, or a share does not lie between 0 and 1.
        BudgetError: the least share cannot be reached.
        DataError: there is no batch, or a criterion needs labels.
    """
    if not criteria:
        raise InputError("there is no criterion to compare; give at least one")
    wanted, rules = checked_shares(shares), budget or Budget(macs=0.5)
    planning = planning or Planning()
    repeatable(batches, "every criterion reads them")
    repeatable(held_out, "every criterion is measured on them")
    check_reachable(graph, rules.only(macs=wanted[-1]))
    settings = {"budget": repr(rules.only(macs=0.5)), "planning": repr(planning), "refit": repr(refit_with)}
    images = {"scored": digest_of(batches), "held_out": digest_of(held_out)}
    made_of: dict[str, Any] = {"weights": weights_digest(model), "graph": units_digest(graph), **images, **settings}
    made_of |= {"output": described(output), "shares": list(wanted)}
    criteria_of = {name: json.dumps(described(criterion)) for name, criterion in criteria.items()}
    found = Comparison.load(save) if save is not None and Path(save).is_file() else None
    done: dict[str, str] = {}
    if found is not None and {k: v for k, v in found.made_of.items() if k != "criteria"} == made_of:
        done = dict(found.made_of["criteria"])
    else:
        found = None
    for number, (name, criterion) in enumerate(criteria.items()):
        if progress:
            progress("compare", number, len(criteria))
        if found is not None and done.get(name) == criteria_of[name]:
            continue
        scores = score(model, batches, graph, criterion, progress=progress)
        models, costs = dict[str, nn.Module](), dict[str, tuple[float, float]]()
        for share in wanted:
            limit = rules.only(macs=share)
            plan = plan_for(model, batches, graph, limit, criterion=criterion, planning=planning, scores=scores)
            small = apply(model, plan)
            if refit_with is not None:
                refit = partial(reconstruct, batches=batches, teacher=model, settings=refit_with, progress=progress)
                small = refitted(small, model, plan, refit)
            models[f"{share}"] = small
            costs[f"{share}"] = plan.macs / graph.macs(), plan.params / graph.params()
        metrics, count = compare({"dense": model, **models}, model, held_out, output=output, progress=progress)
        points = tuple(ComparedPoint(name, s, *costs[f"{s}"], metrics[f"{s}"]) for s in wanted)
        before = () if found is None else tuple(point for point in found.points if point.criterion != name)
        done[name] = criteria_of[name]
        found = Comparison(
            model_id=graph.model_id,
            shares=wanted,
            points=before + points,
            dense=metrics["dense"],
            images=count,
            samples=max(scores.samples, 0 if found is None else found.samples),
            refitted=refit_with is not None,
            made_of={**made_of, "criteria": dict(done)},
        )
        if save is not None:
            found.save(save)
    if progress:
        progress("compare", len(criteria), len(criteria))
    assert found is not None
    named = tuple(point for name in criteria for point in found.of(name))
    return replace(found, points=named)
