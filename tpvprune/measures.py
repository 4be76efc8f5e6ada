"""What was measured of a model, and the report of a run: frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

REPORT_FORMAT = 2


def scored_on(samples: int) -> str:
    """In words, what scores were made of."""
    return f"scored on {samples:,} images" if samples else "scored by the weights alone"


@dataclass(frozen=True)
class Measure:
    """What one model costs and how well it does.

    Attributes:
        params: number of parameters.
        macs: multiply-adds per example.
        latency_ms: median milliseconds of one forward pass; the report's environment says batch and device.
        metrics: `kl` (nats, dense to this model) and `agreement` (share of equal top-1) on held-out
            images, `top1` where labels were given.
    """

    params: int
    macs: int
    latency_ms: float | None
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """What was asked, what came out, and how it was measured.

    Attributes:
        asked: per quantity that the budget bounds, `at_most` in absolute numbers and `as_written`.
        got: per quantity, `value` of the model that came out and its `share` of the dense model's.
        before: the dense model.
        pruned: cut, not yet recovered.
        recovered: after recovery; None if none was asked for.
        drift: KL in nats, predicted from the scores' own first-order formula and measured.
        steps: what was done, in order, with what each said of itself.
        seconds: wall-clock seconds per stage.
        data: how many images each stage saw and how many were skipped.
        environment: versions, device, threads, batch size of the latency.
        format: version of the JSON form.
    """

    asked: Mapping[str, Any]
    got: Mapping[str, Any]
    before: Measure
    pruned: Measure
    recovered: Measure | None
    drift: Mapping[str, float | None]
    steps: tuple[Mapping[str, Any], ...]
    seconds: Mapping[str, float]
    data: Mapping[str, Any]
    environment: Mapping[str, Any]
    format: int = REPORT_FORMAT

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)
