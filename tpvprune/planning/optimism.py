"""How much further a plan drifts on other samples than on those that it was chosen by.

Units that look cheap on some samples are dearer on others: the optimism of what was fitted (Efron 1986; Hastie,
Tibshirani and Friedman 2009, section 7.4). Two-fold cross-validation tells it: each half of the samples chooses a plan
of the same cost, and the other half judges it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from tpvprune.scores import Scores, Sensitivities
from tpvprune.types import Graph

LEAST = 4  # samples below which halves tell nothing
RETAKES = 4  # how often what drifts too far is taken again, under a smaller bound
ENOUGH = 0.7  # share of the bound that what is taken again is to come to
GROWTH = 4.0  # how much more is taken at most at once, where that may be
STEEP = 16  # how much smaller it is taken at most where nothing is known that fits
Taken = TypeVar("Taken")


def tells_of_others(scores: Scores) -> bool:
    """Whether scores know two halves of their samples apart."""
    if scores.sensitivities is None:
        return scores.halves is not None and scores.samples >= LEAST
    return scores.sensitivities.samples >= LEAST


def halved(scores: Scores) -> tuple[Scores, Scores] | None:
    """The scores of the even and of the odd samples; None where they are not known apart.

    The slope of a drift that is there already stays that of all samples.
    """
    found = scores.sensitivities
    if not tells_of_others(scores):
        return None
    if found is None:
        one, other = (_of(scores, half) for half in scores.halves or ())
        return one, other
    rows = found.rows.reshape(found.samples, -1, found.rows.shape[1])
    one, other = (_of_rows(scores, found, rows[number::2]) for number in (0, 1))
    return one, other


def _of(scores: Scores, values: Mapping[str, Tensor], effects: Sensitivities | None = None) -> Scores:
    return replace(scores, values=values, stderr=None, halves=None, tally=None, sensitivities=effects)


def _of_rows(scores: Scores, found: Sensitivities, rows: Tensor) -> Scores:
    each = found.linear + rows.double().square().sum((0, 1)) / len(rows)
    split = each.split([units for _, units in found.groups])
    values = {name: part for (name, _), part in zip(found.groups, split, strict=True)}
    return _of(scores, values, Sensitivities(found.groups, rows.flatten(0, 1), found.linear, len(rows)))


def drift_on(scores: Scores, graph: Graph, keep: Mapping[str, Tensor]) -> float:
    """Drift of a plan on the samples of some scores, nothing shrunk; where these have no sensitivities, their sum."""
    lost = graph.lost({name: ~mask for name, mask in keep.items()})
    left = {name: mask for name, mask in keep.items() if name not in lost}
    if scores.sensitivities is not None:
        return scores.sensitivities.drift(left)[0]
    return sum(float(scores.values[name][~mask].double().sum()) for name, mask in left.items())


def optimism(scores: Scores, graph: Graph, planned: Callable[[Scores], Mapping[str, Tensor]]) -> float | None:
    """How much further a plan drifts on other samples than on those of its scores; None where that cannot be told.

    It is what plans of half the samples do, and so more than less: a margin for rare samples that drift far, which
    few samples do not show.

    Args:
        scores: that the plan is made by.
        graph: of the same model.
        planned: the masks of a plan that costs as much, made by other scores of the same units.
    """
    halves = halved(scores)
    if halves is None:
        return None
    gaps = []
    for mine, other in (halves, halves[::-1]):
        keep = planned(mine)
        gaps.append(drift_on(other, graph, keep) - drift_on(mine, graph, keep))
    return max(0.0, sum(gaps) / 2)


def widest(
    take: Callable[[float], tuple[Taken, float]], room: float, most: float, *, wider: bool = False
) -> tuple[Taken | None, Taken | None]:
    """What is taken under the largest bound found at which it drifts by no more than `most`, and what was taken last.

    Args:
        take: takes under a bound, and says how far that drifts.
        room: the first bound, and the largest unless `wider`.
        most: drift that is allowed.
        wider: whether the bound may be widened where what is taken drifts by much less than is allowed.
    """
    fits, exceeds = 0.0, math.inf
    best: Taken | None = None
    last: Taken | None = None
    for _ in range(RETAKES + 1):
        if room <= 0:
            break
        last, drift = take(room)
        if drift <= most:
            best, fits = last, room
            if drift >= ENOUGH * most or (exceeds == math.inf and not wider):
                break
        else:
            exceeds = room
        if exceeds < math.inf:
            room = math.sqrt(max(fits, exceeds / STEEP) * exceeds)
        else:
            room *= min(GROWTH, most / max(drift, most / GROWTH))
    return best, last
