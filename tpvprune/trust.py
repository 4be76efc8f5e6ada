"""How far products of different units are trusted when a plan is chosen: as far as measuring bears out.

Units whose effects cancel to first order, as channels that sum to a constant before a norm, need not cancel when all
of them leave. Samples cannot tell that: it is no noise of theirs. So plans of the same cost, made with the products as
they are estimated and with a half and a quarter of them, are cut and measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from tpvprune.batches import Batch, inputs_of
from tpvprune.budget import Budget
from tpvprune.errors import BudgetError
from tpvprune.plan import Plan
from tpvprune.planning.allocate import allocate
from tpvprune.planning.joint import shrinkage_for
from tpvprune.processes import from_first
from tpvprune.scores import Scores
from tpvprune.surgery.removal import apply
from tpvprune.types import Graph

logger = logging.getLogger(__name__)
MEASURED_ON = 384  # samples
SHARES = (0.5, 0.25)  # of the products
CLEARLY = 0.9  # of the KL with all of them: what is gained by less was gained by chance


class First:
    """The first batches of some, as many as hold `MEASURED_ON` samples; read anew each time."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        samples = 0
        for batch in self.batches:
            yield batch
            samples += len(inputs_of(batch))
            if samples >= MEASURED_ON:
                return


def may_doubt(scores: Scores, choice: Mapping[str, Any]) -> bool:
    """Whether a plan rests on products of units, as far as nobody has said."""
    joint = choice["allocator"] in ("auto", "joint") and scores.sensitivities is not None
    return joint and scores.in_nats and choice["shrinkage"] is None


def trusted_shrinkage(
    model: nn.Module,
    scores: Scores,
    graph: Graph,
    limit: Budget,
    choice: Mapping[str, Any],
    measure: Callable[[nn.Module], float],
    after: Plan | None = None,
) -> float | None:
    """The shrinkage of the products with which a plan of the same cost is measured to drift least.

    Args:
        model: that the scores are of.
        scores: with sensitivities.
        graph: of the model.
        limit: what the plan may cost, or drift.
        choice: further arguments of `allocate`.
        measure: KL in nats from the dense model to what a plan leaves; the same in all of several processes.
        after: see `allocate`.

    Returns:
        None where the estimated one does as well, or there is no plan.
    """
    assert scores.sensitivities is not None

    def made(limit: Budget, **shrinkage: float) -> Plan:
        ways = {**choice, **shrinkage, "measured": True, "cross_validated": False}
        return from_first(allocate(scores, graph, limit, after=after, **ways))

    costs = {name: value for name, value in limit.as_written.items() if name != "drift"}
    try:
        plan = made(limit.only(**costs) if costs else limit)
    except BudgetError:  # which whoever plans is told by the plan itself
        return None
    if not plan.removed:
        return None
    # Plans that may drift as far would cost other things: what is compared costs the same.
    same = limit.only(**(costs or {"macs": str(plan.macs)}))
    estimated = shrinkage_for(graph, scores.sensitivities)
    best, least = None, measure(apply(model, plan))
    first = least
    for share in SHARES:
        shrinkage = 1 - (1 - estimated) * share
        drift = measure(apply(model, made(same, shrinkage=shrinkage)))
        if drift >= CLEARLY * least:
            break
        best, least = shrinkage, drift
    if best is not None:
        logger.info(
            "plan: units that should cancel do not; with products of units shrunk by %.2f, and not %.2f, a plan of the "
            "same cost drifts by %.3g nats, and not %.3g",
            best,
            estimated,
            least,
            first,
        )
    return best
