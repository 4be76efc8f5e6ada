"""The state of a plan in steps on disk, and what it began with, by which it is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tpvprune.batches import Batch, inputs_of
from tpvprune.described import described
from tpvprune.digests import raw_bytes, samples_digest, weights_digest
from tpvprune.errors import InputError, PlanError
from tpvprune.plan import Plan
from tpvprune.planning.latency import LatencyTable
from tpvprune.processes import from_first, of_all, process
from tpvprune.scores import Scores
from tpvprune.scoring.criteria import Criterion
from tpvprune.scoring.resume import units_digest
from tpvprune.types import Graph

BEGUN = "begun"  # in what a state's plan is made by
OTHERS = {
    "weights": "other weights",
    "graph": "another graph",
    "criterion": "another criterion",
    "budget": "another budget",
    "planning": "another way of planning",
    "refits": "other refits",
    "latency": "another table of latencies",
    "images": "other images",
    "scores": "other scores",
}


def begun_with(
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    criterion: Criterion,
    *,
    scores: Scores | None,
    latency: LatencyTable | None,
    refit_batches: Iterable[Batch] | None,
    **settings: Any,
) -> dict[str, Any]:
    """What a plan in steps follows from; the same in all of several processes, each of which gives its own batches.

    Args:
        model: the dense model.
        batches: that are scored; in any order.
        graph: of the model.
        criterion: how they are scored.
        scores: of the first step, where they are given.
        latency: the table of a budget in milliseconds.
        refit_batches: what is refitted on, where that is something else; the same in all processes.
        **settings: what prints as what it is.
    """
    images = sum(of_all(_samples(batches)))
    if refit_batches is not None:
        images += _samples(refit_batches)
    values = () if scores is None else (raw_bytes(value) for value in scores.values.values())
    return {
        "weights": weights_digest(model),
        "graph": units_digest(graph),
        "criterion": described(criterion),
        **{name: repr(value) for name, value in settings.items()},
        "latency": None if latency is None else hashlib.sha256(repr(latency).encode()).hexdigest(),
        "images": f"{images:x}",
        "scores": None if scores is None else hashlib.sha256(b"".join(values)).hexdigest(),
    }


def _samples(batches: Iterable[Batch]) -> int:
    return sum(samples_digest(inputs_of(batch)) for batch in batches)


def keep(path: Path, plan: Plan, begun: dict[str, Any]) -> None:
    """Write what a plan has come to."""
    replace(plan, made_by={**plan.made_by, BEGUN: begun}).save(path)


def gone_on(path: Path | None, begun: dict[str, Any]) -> Plan | None:
    """What was written there, in all processes; None where there is nothing to go on with.

    Args:
        path: that of the first process counts.
        begun: from `begun_with`; empty where nothing is kept.

    Raises:
        PlanError: it is of something else; names what differs.
    """
    found: Plan | InputError | None = None
    if path is not None and begun and process()[0] == 0 and path.is_file():
        try:
            found = _of_same(path, begun)
        except InputError as error:
            found = error
    found = from_first(found)
    if isinstance(found, InputError):
        raise found
    return found


def _of_same(path: Path, begun: dict[str, Any]) -> Plan:
    plan = Plan.load(path)
    had = plan.made_by.get(BEGUN)
    differs = ["an older version of tpvprune"]
    if isinstance(had, dict):
        unknown = {"scores"} if None in (had.get("scores"), begun["scores"]) else set()
        differs = [told for name, told in OTHERS.items() if had.get(name) != begun[name] and name not in unknown]
    if differs:
        raise PlanError(
            f"{path} holds a plan that was begun with {' and '.join(differs)}; give another file, delete it, or give "
            "what it began with"
        )
    return replace(plan, made_by={name: value for name, value in plan.made_by.items() if name != BEGUN})
