"""One step of a plan in several: taken within the costs of its turn, and within a drift that is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tpvprune.budget import Budget
from tpvprune.errors import BudgetError
from tpvprune.plan import Plan, drift_of
from tpvprune.planning.allocate import allocate, understated
from tpvprune.planning.latency import LatencyTable
from tpvprune.planning.optimism import widest
from tpvprune.planning.widths import costs_of
from tpvprune.processes import from_first
from tpvprune.scores import Scores
from tpvprune.surgery.removal import apply
from tpvprune.types import Graph


@dataclass(frozen=True)
class Step:
    """What one step of a plan is made of.

    Attributes:
        number: of the step, from 0.
        asked: of the whole plan, and in how many steps.
        plan: what has left so far.
        small: what that leaves.
        graph: of `small`.
        scores: of `small`.
        limit: what the step may cost.
        choice: further arguments of `allocate`.
        refit: gives what a plan leaves, refitted; None where nothing is refitted.
        measure: KL in nats from the dense model to what a plan leaves, given both; refitted, where that is asked for.
    """

    number: int
    asked: Asked
    plan: Plan
    small: nn.Module
    graph: Graph
    scores: Scores
    limit: Budget
    choice: Mapping[str, Any]
    refit: Callable[[Plan], nn.Module] | None
    measure: Callable[[Plan, nn.Module], float]

    def taken(self) -> tuple[Plan, nn.Module]:
        """The plan with this step in it, and what it leaves.

        Raises:
            BudgetError: the costs of this step cannot be met within the drift that is asked for.
        """
        if self.asked.drift is None:
            plan, cut = self._under(self.limit, 0.0)
        else:
            before = measured_kl(self.plan) if self.plan.removed else 0.0
            before = (self.measure(self.plan, self.small) if before is None else before) + self._optimism
            plan, cut = self._promised(before) if self.asked.costs else self._drifting(before)
        last = self.number + 1 == self.asked.steps
        return plan, cut if self.refit is None or last else self.refit(plan)

    def _promised(self, before: float) -> tuple[Plan, nn.Module]:
        """Under costs, the plan of least drift that meets them: within the drift, or an error."""
        most = self.asked.drift or 0.0
        if before >= most:
            raise BudgetError(self.asked.too_far(self.number, self.plan, before))
        try:
            plan, small = self._under(replace(self.limit, drift=f"{most - before} nats"), before)
        except BudgetError as error:
            gone = f" ({before:.3g} nats measured before it)" if before else ""
            where = f"step {self.number + 1} of {self.asked.steps} of {self.asked.words}{gone}"
            raise BudgetError(f"in {where}: {error}") from error
        plan = _told(plan, self.measure(plan, small))
        now = drift_of(plan.made_by)
        if now > most:
            raise BudgetError(self.asked.too_far(self.number + 1, plan, now))
        return plan, small

    def _drifting(self, before: float) -> tuple[Plan, nn.Module]:
        """Under drift alone: a step that measures more than its share is taken again, smaller, or left out.

        A refit brings a step far below what is predicted of it: that is taken again, larger.
        """
        most = (self.asked.drift or 0.0) * (self.number + 1) / self.asked.steps
        tried = list[Plan]()

        def take(room: float) -> tuple[tuple[Plan, nn.Module], float]:
            plan, small = self._under(replace(self.limit, drift=f"{room} nats"), before)
            known = next((one for one in tried if not plan.diff(one)), None)
            measured = None if known is None else measured_kl(known)
            plan = _told(plan, self.measure(plan, small) if measured is None else measured)
            tried.append(plan)
            return (plan, small), drift_of(plan.made_by)

        best, found = widest(take, most - before, most, wider=self.refit is not None)
        if best is not None:
            return best
        last = self.plan if found is None else found[0]
        steps = [*self.plan.made_by["steps"], {"got": {}}]
        about = {**last.made_by, **self.plan.made_by, "asked": self.asked.bounds, "steps": steps}
        about |= {"predicted_kl": before} | ({} if self.plan.removed else {"understated": []})
        about |= {"optimism": self._optimism} if "optimism" in about else {}
        return _told(replace(self.plan, made_by=about), before - self._optimism), self.small

    @property
    def _optimism(self) -> float:
        """What the steps before this one are expected to drift further on other samples."""
        return float(self.plan.made_by.get("optimism", 0.0)) if self.plan.removed else 0.0

    def _under(self, limit: Budget, before: float) -> tuple[Plan, nn.Module]:
        after = self.plan if self.plan.removed else None
        # A refit makes up for units that were badly chosen too, on all samples.
        judged = None if self.refit is None else False
        choice = {**self.choice, "measured": True, "cross_validated": judged}
        part = from_first(allocate(self.scores, self.graph, limit, after=after, **choice))
        own = {key: part.made_by[key] for key in ("got", "shrinkage") if key in part.made_by}
        steps = [*self.plan.made_by["steps"], own]
        about = {**part.made_by, "asked": self.asked.bounds, "steps": steps}
        if self.asked.drift is None:
            about.pop("predicted_kl", None)  # of this step alone
        else:
            about["predicted_kl"] = before + part.made_by["predicted_kl"]
            if "optimism" in about or self._optimism:
                about["optimism"] = self._optimism + about.get("optimism", 0.0)
        small = apply(self.small, part)
        plan = part if after is None else after.compose(part)  # `small` may carry more, of what the dense model was
        if self.asked.drift is not None:
            about["understated"] = understated(plan)
        plan = replace(plan, made_by=about)
        return plan, small


@dataclass(frozen=True)
class Asked:
    """What is asked of a plan in steps, as a whole.

    Attributes:
        steps: how many.
        words: the bounds as they were written.
        costs: the bounds on costs, in absolute numbers.
        drift: the bound on drift in nats, or None.
        latency: see `allocate`.
    """

    steps: int
    words: str
    costs: dict[str, float]
    drift: float | None
    latency: LatencyTable | None = None

    @classmethod
    def of(cls, budget: Budget, costs: dict[str, float], steps: int, latency: LatencyTable | None) -> Asked:
        """What a budget asks."""
        words = ", ".join(f"{name}={value}" for name, value in budget.as_written.items())
        return cls(steps, words, costs, budget.most_drift, latency)

    @property
    def bounds(self) -> dict[str, float]:
        """All bounds in absolute numbers."""
        return self.costs | ({} if self.drift is None else {"drift": self.drift})

    def check(self, plan: Plan) -> None:
        """Refuse what exceeds the bounds once all steps are taken.

        Raises:
            BudgetError: a cost, or the measured drift, is above what was asked.
        """
        if self.drift is not None and measured_kl(plan) is not None and drift_of(plan.made_by) > self.drift:
            raise BudgetError(self.too_far(self.steps, plan, drift_of(plan.made_by)))
        # Milliseconds are sums of floats, which each step takes in another order.
        if any(self._cost(name, plan) > bound * (1 + 1e-9) for name, bound in self.costs.items()):
            raise BudgetError(
                f"{self.words} in {self.steps} steps: nothing more can leave at {self._reached(plan)}; ask for no less "
                "than that, or plan in one step"
            )

    def too_far(self, done: int, plan: Plan, drift: float) -> str:
        """What to say of a plan that drifts more than asked after so many steps."""
        reached = f", with {self._reached(plan)}" if self.costs else ""
        more = float(plan.made_by.get("optimism", 0.0))
        others = f", and {more:.3g} more are expected on others" if more else ""
        return (
            f"{self.words} cannot be met: after step {done} of {self.steps} the drift measured on the scored batches "
            f"is {drift - more:.3g} nats{others}{reached}; allow more drift, ask for less to leave, score more images, "
            "or take other steps"
        )

    def _reached(self, plan: Plan) -> str:
        dense = {name: costs_of(name, plan.graph, latency=self.latency).total for name in self.costs}
        return ", ".join(f"{n} {self._cost(n, plan):,.10g} ({self._cost(n, plan) / dense[n]:.1%})" for n in self.costs)

    def _cost(self, name: str, plan: Plan) -> float:
        return costs_of(name, plan.graph, plan.keep, latency=self.latency).total


def measured_kl(plan: Plan) -> float | None:
    """KL in nats that was measured of what a plan leaves; None if it was not."""
    found = plan.made_by.get("measured_kl")
    return float(found) if isinstance(found, float) else None


def drift_told(plan: Plan) -> dict[str, float]:
    """Nats that a plan under a bound on drift was held at, and what they are made of, to four digits."""
    if "drift" not in plan.made_by.get("asked", {}):
        return {}
    parts = {name: plan.made_by[name] for name in ("measured_kl", "optimism") if name in plan.made_by}
    return {name: float(f"{kl:.4g}") for name, kl in {"drift": drift_of(plan.made_by), **parts}.items()}


def _told(plan: Plan, measured: float) -> Plan:
    """With what its last step measures."""
    steps = [*plan.made_by["steps"]]
    steps[-1] = {**steps[-1], "measured_kl": measured}
    return replace(plan, made_by={**plan.made_by, "steps": steps, "measured_kl": measured})
