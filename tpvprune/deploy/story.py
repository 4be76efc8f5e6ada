"""What a report page tells, as values: read off a run's folder, or put together from the parts of `prune`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from tpvprune.card import name_of
from tpvprune.checkpoint import ABOUT, PLAN
from tpvprune.comparison import COMPARISON, Comparison
from tpvprune.deploy.examples import Example
from tpvprune.errors import PlanError
from tpvprune.files import read_text
from tpvprune.members import WORK
from tpvprune.plan import Plan
from tpvprune.report import stored_report
from tpvprune.runfolder import PRODUCTS, RECIPE
from tpvprune.scores import Scores
from tpvprune.types import REST, read_json

EXAMPLES = "examples.json"
MOST_ROWS = 40  # of a chart; beyond it, layers of one part of the network are drawn together


@dataclass(frozen=True, eq=False)
class Story:
    """All that a page about one pruned model can show.

    Attributes:
        name: of the model.
        plan: what was removed.
        report: its JSON form.
        scores: that the plan was made from; None leaves their distribution out.
        recipe: the resolved recipe as YAML; None leaves it out.
        examples: images whose answer changed, most changed first.
        changed: how many answers changed; None where it was not looked at.
        source: how the dense original is built, see `card.model_card`.
        comparison: of criteria, where `tpvprune compare` made one.
    """

    name: str
    plan: Plan
    report: Mapping[str, Any]
    scores: Scores | None = None
    recipe: str | None = None
    examples: tuple[Example, ...] = ()
    changed: int | None = None
    source: Mapping[str, Any] | None = None
    comparison: Comparison | None = None

    @classmethod
    def of(cls, folder: str | PathLike[str]) -> Story:
        """Read what a run left in its folder; neither its images nor its checkpoint are needed.

        Raises:
            PlanError: the report or the plan is missing, damaged or of another version.
        """
        place = Path(folder)
        report, plan = stored_report(place / PRODUCTS["eval"]), Plan.load(place / PLAN)
        source = read_json(place / ABOUT, "description")["model"]
        stored = place / PRODUCTS["score"]
        changed = read_json(place / EXAMPLES, "examples") if (place / EXAMPLES).is_file() else {}
        try:
            examples = tuple(Example(**example) for example in changed.get("examples", ()))
        except (TypeError, AttributeError) as error:
            raise PlanError(f"{place / EXAMPLES} is damaged ({error}); measure again with tpvprune eval") from error
        return cls(
            name=name_of(source),
            plan=plan,
            report=report,
            scores=Scores.load(stored) if stored.is_file() else None,
            recipe=read_text(place / RECIPE) if (place / RECIPE).is_file() else None,
            examples=examples,
            changed=changed.get("changed"),
            source=source,
            comparison=Comparison.load(place / COMPARISON) if (place / COMPARISON).is_file() else None,
        )

    def shapes(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Every weight of two dimensions or more: its layer, its shape before, and now (`(0,)`: gone)."""
        left = self.plan.graph.sizes(self.plan.keep)
        weights = ((n, s) for n, s in self.plan.graph.shapes.items() if len(s) > 1 and WORK not in n)
        return [(name.removesuffix(".weight"), shape, left[name]) for name, shape in weights]

    def widths(self) -> list[tuple[str, int, int]]:
        """Every group, in order: its name, units before, units now; of a block, one unit or none."""
        return [(row["group"], row["units"], row["kept"]) for row in self.plan.summary() if row["kind"] != "weight"]

    def macs(self) -> list[tuple[str, int, int]]:
        """Multiply-adds before and now of every layer that has any, in order."""
        graph = self.plan.graph
        before, now = graph.sizes(), graph.sizes(self.plan.keep)
        found: dict[str, tuple[int, int]] = {}
        for name, times in graph.reuse.items():
            layer = "outside of layers" if name == REST else name.partition(WORK)[0].removesuffix(".weight")
            a, b = found.get(layer, (0, 0))
            found[layer] = a + times * math.prod(before[name]), b + times * math.prod(now[name])
        return [(layer, a, b) for layer, (a, b) in found.items() if a]

    def scored(self) -> tuple[list[float], list[float]] | None:
        """Scores of the units that stay, and of those that leave; None where there are none."""
        if self.scores is None:
            return None
        kept: list[float] = []
        gone: list[float] = []
        for group in self.plan.graph.groups:
            values = self.scores.values.get(group.id)
            if values is not None and len(values) == group.units:
                mask = self.plan.mask(group.id)
                kept += values[mask].tolist()
                gone += values[~mask].tolist()
        return (kept, gone) if kept or gone else None

    def drift(self) -> list[tuple[str, float]]:
        """KL in nats under its names, in the order it came about; what is not known is left out."""
        drift = self.report["drift"]
        steps = self.plan.made_by.get("steps")
        found: list[tuple[str, float | None]] = [("predicted", drift.get("predicted_kl"))]
        for number, step in enumerate(steps if isinstance(steps, list) else (), 1):
            found.append((f"measured after step {number}", step.get("measured_kl")))
        found += [("measured, pruned", drift.get("pruned_kl")), ("measured, recovered", drift.get("recovered_kl"))]
        return [(name, value) for name, value in found if value is not None]


def merged(rows: list[tuple[str, int, int]], most: int = MOST_ROWS) -> list[tuple[str, int, int]]:
    """The same sums in at most about `most` rows: names lose their last parts until they are few enough."""
    depth = max((name.count(".") for name, *_ in rows), default=0)
    while len(rows) > most and depth:
        together: dict[str, tuple[int, int]] = {}
        for name, before, now in rows:
            part = ".".join(name.split(".")[:depth])
            a, b = together.get(part, (0, 0))
            together[part] = a + before, b + now
        rows, depth = [(part, a, b) for part, (a, b) in together.items()], depth - 1
    return rows
