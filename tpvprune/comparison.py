"""What `compare_criteria` finds, as values: one curve a criterion over the multiply-adds that stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from tpvprune.errors import PlanError
from tpvprune.files import write_text
from tpvprune.types import check_format, read_json

COMPARISON_FORMAT = 1
COMPARISON = "comparison.json"  # in a run's folder
METRICS = {"top1": "accuracy", "agreement": "same answer as the dense model", "mse": "mean squared distance"}


@dataclass(frozen=True)
class ComparedPoint:
    """One criterion at one budget.

    Attributes:
        criterion: its name in the comparison.
        asked: share of the multiply-adds to keep at most.
        macs: share of the multiply-adds that is left.
        params: share of the parameters that is left.
        metrics: on held-out images: "kl" in nats, "agreement" and, with labels, "top1"; "mse" where outputs are no
            classes.
    """

    criterion: str
    asked: float
    macs: float
    params: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """Criteria at the same budgets, on the same images, allocated alike.

    Attributes:
        model_id: fingerprint of the architecture.
        shares: of the multiply-adds that were asked for, descending.
        points: criterion by criterion, in the order of `shares`.
        dense: metrics of the dense model.
        images: held-out images that were measured on.
        samples: images that were scored on.
        refitted: whether each model was refitted in closed form before it was measured.
        made_of: digests of weights and images and the settings, by which points are known again.
    """

    model_id: str
    shares: tuple[float, ...]
    points: tuple[ComparedPoint, ...]
    dense: Mapping[str, float]
    images: int
    samples: int
    refitted: bool = False
    made_of: Mapping[str, Any] = field(default_factory=dict)

    @property
    def criteria(self) -> tuple[str, ...]:
        """Names, in the order they were compared in."""
        return tuple(dict.fromkeys(point.criterion for point in self.points))

    @property
    def metric(self) -> str:
        """What is compared by: accuracy where there are labels, agreement where there are classes."""
        return next(name for name in METRICS if name in self.dense)

    def of(self, criterion: str) -> tuple[ComparedPoint, ...]:
        """A criterion's points, most multiply-adds first.

        Raises:
            PlanError: it was not compared.
        """
        found = tuple(point for point in self.points if point.criterion == criterion)
        if not found:
            raise PlanError(f"{criterion!r} was not compared; there are {', '.join(self.criteria)}")
        return found

    def mean(self, criterion: str) -> float:
        """Mean of the metric over all budgets."""
        values = [point.metrics[self.metric] for point in self.of(criterion)]
        return sum(values) / len(values)

    def ranked(self) -> tuple[str, ...]:
        """Criteria, best first by `mean`."""
        return tuple(sorted(self.criteria, key=self.mean, reverse=self.metric != "mse"))

    def curves(self) -> list[tuple[str, list[tuple[float, float]]]]:
        """Per criterion, best first: (share of the multiply-adds that is left, metric), the dense model first."""
        whole = (1.0, self.dense[self.metric])
        return [(n, [whole, *((p.macs, p.metrics[self.metric]) for p in self.of(n))]) for n in self.ranked()]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form; `from_json` is its inverse."""
        return {"format": COMPARISON_FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Comparison:
        """Rebuild a comparison from `to_json`.

        Raises:
            PlanError: the data is of another format, or incomplete.
        """
        check_format(data, COMPARISON_FORMAT, "comparison")
        values = {name: value for name, value in data.items() if name != "format"}
        try:
            points = tuple(ComparedPoint(**point) for point in values["points"])
            return cls(**{**values, "shares": tuple(values["shares"]), "points": points})
        except (KeyError, TypeError) as error:
            raise PlanError(f"the comparison is incomplete ({error!r}); compare again") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the comparison as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Comparison:
        """Read a comparison written by `save`.

        Raises:
            PlanError: the file is missing, damaged or of another format.
        """
        return cls.from_json(read_json(path, "comparison"))
