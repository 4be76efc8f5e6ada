"""What each group alone costs when it loses its least important units: predicted from scores, measured by cutting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from torch import nn

from tpvprune.batches import Batch, Progress, Selector, length_of, repeatable
from tpvprune.budget import Budget
from tpvprune.curves import SensitivityCurve, SensitivityCurves, SensitivityPoint
from tpvprune.described import described
from tpvprune.digests import weights_digest
from tpvprune.errors import DataError, InputError, ModelError, PlanError
from tpvprune.kinds import as_verb
from tpvprune.members import Group
from tpvprune.plan import Plan
from tpvprune.planning.widths import costs_of, floors_of
from tpvprune.report import compare
from tpvprune.scores import Scores
from tpvprune.scoring.criteria import check_groups, check_model, score
from tpvprune.scoring.engine import Watched
from tpvprune.scoring.tpv import TPV
from tpvprune.surgery.removal import apply
from tpvprune.types import Graph

SHARES = (0.9, 0.75, 0.5, 0.25)


@as_verb
def sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
    graph: Graph,
    scores: Scores | None = None,
    shares: Sequence[float] = SHARES,
    held_out: Iterable[Batch] | None = None,
    progress: Progress | None = None,
    *,
    output: Selector = None,
    save: str | PathLike[str] | None = None,
) -> SensitivityCurves:
    """Cut each group alone to several widths and say what the outputs drift: predicted, and measured if asked.

    Args:
        model: the model `graph` was traced from. It is left as it was.
        batches: unlabeled, to score on; not read where scores are given.
        graph: from `trace`.
        scores: of this model, in nats and with sensitivities; made with `TPV()` if left out.
        shares: of each group's units that stay. A block has one point instead, at a share of zero: gone.
        held_out: other batches to measure every point on, by applying the plan of that group alone; read once more
            than there are groups. Nothing is measured without them.
        progress: called as `progress("measure", batches_done, batches_to_do)`, and by scoring.
        output: which part of what the model returns counts, see `TPV`.
        save: a file that the curves are saved to, on the way too. Points in a file that exists are not measured
            again if weights, held-out images, the output and the units that leave are the same.

    Raises:
        InputError: a share does not lie between 0 and 1.
        PlanError: the graph has no group or is of another model, the scores are of other units, not in nats or
            without sensitivities, or `save` holds something else.
        DataError: there is no batch.
        ModelError: measured outputs are not `(batch, classes)`.
    """
    wanted = checked_shares(shares)
    check_model(model, graph)
    check_groups(graph)
    _check_kinds(graph)
    if held_out is not None:
        repeatable(held_out, "every group is measured on them")
    earlier = SensitivityCurves.load(save) if save is not None and Path(save).is_file() else None
    scores = score(model, batches, graph, TPV(output=output), progress=progress) if scores is None else scores
    _check_scores(scores, graph)
    images = None if held_out is None else digest_of(held_out)
    found = SensitivityCurves(
        model_id=graph.model_id,
        shares=wanted,
        curves=_predicted(scores, graph, wanted),
        unprunable=dict(graph.skipped),
        samples=scores.samples if scores.sensitivities is None else scores.sensitivities.samples,
        made_of={
            "criterion": scores.criterion,
            "weights": weights_digest(model),
            "held_out": images,
            "output": described(output),
        },
    )
    found = _with_measured(found, earlier)
    states = iter([found]) if held_out is None else _measured(found, model, graph, held_out, output, progress)
    for state in states:
        found = state
        if save is not None:
            found.save(save)
    return found


def checked_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """Shares in descending order, each once.

    Raises:
        InputError: there is none, or one does not lie between 0 and 1.
    """
    for share in shares:
        if not 0 < share < 1:
            raise InputError(f"a share of {share:g} is not between 0 and 1; give shares of units that stay, as 0.5")
    if not shares:
        raise InputError("there is no share; give at least one, as 0.5")
    return tuple(sorted({float(share) for share in shares}, reverse=True))


def _check_kinds(graph: Graph) -> None:
    loose = next((group.id for group in graph.groups if group.kind == "weight"), None)
    if loose is not None:
        raise PlanError(f"the units of {loose!r} are single weights, which cannot be cut out; trace the model")


def _check_scores(scores: Scores, graph: Graph) -> None:
    if scores.model_id != graph.model_id:
        raise PlanError(f"the scores are of model {scores.model_id}, the graph of {graph.model_id}; score again")
    if not scores.in_nats or scores.sensitivities is None:
        raise PlanError(
            f"curves are drawn from scores in nats with sensitivities, and {scores.criterion} holds none; score with "
            "TPV() and the softmax head, not compensated"
        )
    if scores.sensitivities.groups != tuple((group.id, group.units) for group in graph.groups):
        raise PlanError("the scores are of other groups than the graph's; score again")


def _predicted(scores: Scores, graph: Graph, shares: tuple[float, ...]) -> tuple[SensitivityCurve, ...]:
    assert scores.sensitivities is not None
    kept = {share: floors_of(graph, Budget(macs=1.0, min_keep=share)) for share in shares}
    costs = {name: costs_of(name, graph) for name in ("macs", "params")}

    def saved(name: str, group: Group, units: int) -> float:
        return costs[name].saving(group, units) / costs[name].total if costs[name].total else 0.0

    curves = []
    for group in graph.groups:
        order = tuple(scores.values[group.id].double().argsort(stable=True).tolist())
        curve = SensitivityCurve(group.id, group.kind, group.units, order, ())
        points = []
        for share in shares if group.kind != "block" else (0.0,):
            stays = kept[share][group.id] if share else 0
            drift, error = scores.sensitivities.drift({group.id: curve.keep(stays)})
            points.append(
                SensitivityPoint(
                    share=share,
                    kept=stays,
                    macs_saved=saved("macs", group, group.units - stays),
                    params_saved=saved("params", group, group.units - stays),
                    predicted_kl=drift / 2,
                    stderr=None if math.isnan(error) else error / 2,
                )
            )
        curves.append(replace(curve, points=tuple(points)))
    return tuple(curves)


def digest_of(batches: Iterable[Batch]) -> str:
    """A fingerprint of batches, by which what was measured on them is known again.

    Raises:
        DataError: there is none.
    """
    watched = Watched(batches)
    if not sum(1 for _ in watched):
        raise DataError("there is no batch to measure on; give at least one")
    return watched.digests[-1]


def _with_measured(found: SensitivityCurves, earlier: SensitivityCurves | None) -> SensitivityCurves:
    """The curves with what was measured before, where it is of the same weights, images and units."""
    same_way = ("weights", "output")
    if earlier is None or any(earlier.made_of.get(name) != found.made_of[name] for name in same_way):
        return found
    images = earlier.made_of.get("held_out")
    if images is None or found.made_of["held_out"] not in (None, images):
        return found
    known = {curve.group: curve for curve in earlier.curves}
    curves = []
    for curve in found.curves:
        old = known.get(curve.group)
        same = (
            {}
            if old is None
            else {kept: kl for kept, kl in old.measured.items() if set(old.gone(kept)) == set(curve.gone(kept))}
        )
        curves.append(curve.with_measured(same))
    made_of = {**found.made_of, "held_out": images}
    return replace(found, curves=tuple(curves), measured_images=earlier.measured_images, made_of=made_of)


def _measured(
    found: SensitivityCurves,
    model: nn.Module,
    graph: Graph,
    held_out: Iterable[Batch],
    output: Selector,
    progress: Progress | None,
) -> Iterator[SensitivityCurves]:
    """The curves with one group more measured, until all are."""
    whole = tuple(c.with_measured({c.units: 0.0}) for c in found.curves)  # with all of its units nothing drifts
    found = replace(found, curves=whole)
    todo = [c for c in found.curves if any(point.measured_kl is None for point in c.points)]
    each = length_of(held_out)
    total = None if each is None else each * len(todo)
    done = 0

    def tell(stage: str, batch: int, batches: int | None) -> None:
        nonlocal done
        done += 1
        if progress:
            progress("measure", done, total)

    for curve in todo:
        kept = sorted({point.kept for point in curve.points if point.measured_kl is None}, reverse=True)
        cut = {str(n): apply(model, Plan({curve.group: curve.keep(n)}, graph)) for n in kept}
        metrics, images = compare(cut, model, held_out, output=output, progress=tell)
        if any("kl" not in told for told in metrics.values()):
            raise ModelError(
                "KL is measured between outputs (batch, classes); measure without held_out, or name output="
            )
        more = curve.with_measured({n: metrics[str(n)]["kl"] for n in kept})
        curves = tuple(more if c.group == curve.group else c for c in found.curves)
        found = replace(found, curves=curves, measured_images=images)
        yield found
    if not todo:
        yield found
