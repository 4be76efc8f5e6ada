"""Criteria: frozen dataclasses with one method that turns batches into `Scores`."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from tpvprune.batches import Batch, Progress, Selector
from tpvprune.errors import InputError, ModelError, PlanError, UnseenError
from tpvprune.kinds import as_verb
from tpvprune.plan import Plan
from tpvprune.processes import process
from tpvprune.scores import Scores, Settled
from tpvprune.scoring.collect import collect
from tpvprune.scoring.heads import Softmax
from tpvprune.scoring.magnitude import FromWeights
from tpvprune.scoring.streaming import Streaming
from tpvprune.scoring.tpv import TPV
from tpvprune.types import Graph, fingerprint

logger = logging.getLogger(__name__)
REASONS = 3  # why nothing can be pruned, that are told


class Criterion(Protocol):
    """What a criterion offers; `testing.check_criterion` checks one of your own."""

    def measure(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, progress: Progress | None = None
    ) -> Scores:
        """Score every unit of every group, leaving the model as it was."""
        ...


def name_of(criterion: Criterion | None) -> str | None:
    """What scores by a criterion will say that they are by; None where it tells that with the scores alone."""
    return criterion.label if isinstance(criterion, (Streaming, FromWeights)) else None


def predicted_kl(
    criterion: Criterion | None,
    model: nn.Module,
    batches: Iterable[Batch],
    plan: Plan,
    progress: Progress | None = None,
    output: Selector = None,
) -> float | None:
    """KL(dense || pruned) in nats that a plan is predicted to cost, to first order; None where that cannot be told.

    Args:
        criterion: a `TPV` predicts with its own settings, any other (or None) with those of `TPV(output=output)`.
        model: the dense model.
        batches: inputs to predict on.
        plan: what leaves.
        progress: called as `progress("score", batches_done, batches_to_do)`.
        output: which part of what the model returns counts.
    """
    tpv = criterion if isinstance(criterion, TPV) else TPV(output=output)
    if not (tpv.head == "softmax" or isinstance(tpv.head, Softmax)):
        return None
    try:
        return tpv.drift(model, batches, plan, progress)[0] / 2
    except ModelError as error:
        if isinstance(criterion, TPV) and not isinstance(error, UnseenError):
            raise
        logger.warning("%s; the drift of the plan is not predicted", str(error).partition(";")[0])
        return None


@as_verb
def score(
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    criterion: Criterion | None = None,
    *,
    progress: Progress | None = None,
    start: Scores | None = None,
    until: Settled | None = None,
    save: str | PathLike[str] | None = None,
    exact: bool = False,
) -> Scores:
    """Score every unit of a graph from unlabeled batches.

    Under several processes (torchrun, accelerate) each gives its own share of the batches, and all get the scores
    of all of them.

    Args:
        model: the model `graph` was traced from. It is left as it was.
        batches: any iterable of input tensors `(batch, ...)`, of tuples or dicts whose first item is the
            input, or a DataLoader. Labels are looked at by criteria that say so alone.
        graph: from `trace`, or from `weight_graph` for single weights.
        criterion: how to score; `TPV()` by default.
        progress: called as `progress("score", batches_done, batches_to_do)`.
        start: earlier scores that these batches are added to.
        until: stop as soon as the ranking is settled.
        save: a file that the scores are saved to, on the way too. One that exists is gone on with: batches it has seen
            are read and left out. What it is of must be what is asked for: units, weights, and settings, functions by
            their name, code and the values they close over (not by what they call, or by global variables).
            Several processes each keep their share beside it (`NAME.0-of-2.safetensors`) until the scores of all are
            there, and go on with that. A criterion that does not learn from batches one by one is saved at the end
            alone.
        exact: `save` keeps sensitivities in full precision, in twice the room; see `Scores.save`.

    Raises:
        PlanError: the graph has no group or was traced from another model, or `start` or `save` holds scores of other
            units, weights or settings.
        DataError: there is no batch, one holds no tensor, labels are needed and missing, or `save` holds scores of
            other batches (or labels, where they are read).
        NonFiniteError: the model gives NaN or infinity.
        ModelError: the model is not called on one tensor, or was made inside `torch.inference_mode()`.
        InputError: what is given as the criterion is none; the criterion does not learn from batches one by one, and
            `start` or `until` is given, or has no standard errors, and `until` is; batches would be added to
            compensated scores.
    """
    check_model(model, graph)
    check_groups(graph)
    criterion = TPV() if criterion is None else criterion
    if isinstance(criterion, type) or not callable(getattr(criterion, "measure", None)):
        given = f"the class {criterion.__name__}" if isinstance(criterion, type) else f"{criterion!r}"
        raise InputError(f"criterion={given} is no criterion; give one that is made, as tp.TPV() or tp.L1()")
    if isinstance(criterion, Streaming):
        how: dict[str, Any] = {"start": start, "until": until, "save": save, "exact": exact}
        return collect(criterion, model, batches, graph, progress=progress, **how)
    if start is not None or until is not None:
        name = type(criterion).__name__
        raise InputError(f"{name} does not learn from batches one by one: leave start and until out")
    before = Scores.load(save) if save is not None and Path(save).is_file() else None
    scores = criterion.measure(model, batches, graph, progress)
    if before is not None and (before.criterion, before.model_id) != (scores.criterion, scores.model_id):
        raise PlanError(f"{save} holds scores of another model or of {before.criterion}; score to another file")
    if save is not None and process()[0] == 0:
        scores.save(save, exact=exact)
    return scores


def check_model(model: nn.Module, graph: Graph) -> None:
    """Refuse a model that is not the one a graph was traced from.

    Raises:
        PlanError: names or shapes differ.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = fingerprint((name, tuple(tensor.shape)) for name, tensor in tensors)
    if found != graph.model_id:
        have = {name: tuple(tensor.shape) for name, tensor in tensors}
        wrong = next((n for n, s in graph.shapes.items() if "#" not in n and have.get(n) != s), None)
        detail = f": {wrong!r} is {have.get(wrong)}, the graph says {graph.shapes[wrong]}" if wrong else ""
        raise PlanError(f"the graph was traced from another {type(model).__name__}{detail}; trace this model first")


def check_groups(graph: Graph) -> None:
    """Refuse a graph of a model of which nothing can leave.

    Raises:
        PlanError: it has no group; the first of the reasons are told.
    """
    if graph.groups:
        return
    reasons: dict[str, str] = {}
    for layer, why in graph.skipped.items():
        reasons.setdefault(why, f"{layer!r}: {why}" if layer else why)
    told = "; ".join(list(reasons.values())[:REASONS]) or "it has no layer that could be"
    raise PlanError(f"nothing of this model can be pruned, its graph has no groups; see graph.skipped ({told})")
