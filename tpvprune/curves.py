"""Sensitivity curves as values: what each group alone costs the outputs at several widths."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor

from tpvprune.errors import InputError, PlanError
from tpvprune.files import write_text
from tpvprune.types import check_format, read_json

CURVES_FORMAT = 1


@dataclass(frozen=True)
class SensitivityPoint:
    """One group cut to one width, all others whole.

    Attributes:
        share: of its units that was to stay; 0 for a block, which is gone.
        kept: units that stay: the share rounded up, to the unit. A plan may round to wider steps.
        macs_saved: multiply-adds saved, as a share of the dense model's.
        params_saved: parameters saved, as a share of the dense model's.
        predicted_kl: KL(dense || cut) in nats to first order: half the TPV of the units that leave, together.
        stderr: standard error of the prediction over samples; None where there is one sample.
        measured_kl: KL(dense || cut) in nats on held-out images; None where it was not measured.
    """

    share: float
    kept: int
    macs_saved: float
    params_saved: float
    predicted_kl: float
    stderr: float | None
    measured_kl: float | None = None

    def price(self, per: Literal["macs", "params"] = "macs") -> float | None:
        """Predicted nats for each whole model's worth of multiply-adds (or parameters); None where none is saved."""
        saved = self.macs_saved if per == "macs" else self.params_saved
        return self.predicted_kl / saved if saved > 0 else None


@dataclass(frozen=True)
class SensitivityCurve:
    """The points of one group.

    Attributes:
        group: its id.
        kind: what a unit is.
        units: how many it has.
        order: its units, least important first; the first `units - kept` of them leave.
        points: one a share, widest first; a single one for a block.
        measured: KL in nats by units kept, of all widths that were measured so far, at other shares too.
    """

    group: str
    kind: str
    units: int
    order: tuple[int, ...]
    points: tuple[SensitivityPoint, ...]
    measured: Mapping[int, float] = field(default_factory=dict)

    def gone(self, kept: int) -> tuple[int, ...]:
        """Units that leave when `kept` stay."""
        return self.order[: self.units - kept]

    def keep(self, kept: int) -> Tensor:
        """Bool mask `(units,)` of the `kept` most important units."""
        mask = torch.ones(self.units, dtype=torch.bool)
        mask[list(self.gone(kept))] = False
        return mask

    def with_measured(self, more: Mapping[int, float]) -> SensitivityCurve:
        """The curve with more widths measured, its points too."""
        known = {**self.measured, **more}
        points = tuple(replace(point, measured_kl=known.get(point.kept)) for point in self.points)
        return replace(self, points=points, measured=known)

    def at(self, share: float) -> SensitivityPoint:
        """The point of a share; of a block, the only one it has.

        Raises:
            InputError: there is no point of that share.
        """
        if self.kind == "block":
            return self.points[0]
        for point in self.points:
            if math.isclose(point.share, share):
                return point
        known = ", ".join(f"{point.share:g}" for point in self.points)
        raise InputError(f"there is no point at a share of {share:g}; there are points at {known}")


@dataclass(frozen=True)
class SensitivityCurves:
    """What `sensitivity` found.

    Attributes:
        model_id: fingerprint of the architecture.
        shares: of its units that each group was cut to, descending.
        curves: one a group, in execution order.
        unprunable: layers whose outputs stay whole, with the reason: they have no curve, and are not robust.
        samples: images that the predictions are of.
        measured_images: held-out images that was measured on; None where nothing was.
        made_of: criterion, and digests of the weights and of the held-out images, by which measured points are
            known again.
    """

    model_id: str
    shares: tuple[float, ...]
    curves: tuple[SensitivityCurve, ...]
    unprunable: Mapping[str, str]
    samples: int
    measured_images: int | None = None
    made_of: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, group_id: str) -> SensitivityCurve:
        for curve in self.curves:
            if curve.group == group_id:
                return curve
        raise PlanError(f"there is no curve of group {group_id!r}; there are {', '.join(c.group for c in self.curves)}")

    @property
    def usual_share(self) -> float:
        """The share nearest to one half, which groups are ranked at if no other is named."""
        return min(self.shares, key=lambda share: abs(share - 0.5))

    def ranked(self, at: float | None = None, per: Literal["macs", "params"] = "macs") -> tuple[SensitivityCurve, ...]:
        """The curves from most robust to most sensitive: by predicted KL for what is saved at one share.

        Groups that save nothing there come last: no plan gains by them.

        Args:
            at: the share; `usual_share` if left out.
            per: what is saved.

        Raises:
            InputError: there is no point of that share.
        """
        share = self.usual_share if at is None else at

        def price(curve: SensitivityCurve) -> float:
            found = curve.at(share).price(per)
            return math.inf if found is None else found

        return tuple(sorted(self.curves, key=price))

    def ratios(self) -> dict[float, float]:
        """Per share, the median over groups of measured over predicted KL: how far the first order can be trusted.

        Blocks do not count: they have no share.
        """
        found = {}
        for share in self.shares:
            points = [curve.at(share) for curve in self.curves if curve.kind != "block"]
            known = [p.measured_kl / p.predicted_kl for p in points if p.measured_kl is not None and p.predicted_kl > 0]
            if known:
                found[share] = statistics.median(known)
        return found

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form; `from_json` is its inverse."""
        return {"format": CURVES_FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SensitivityCurves:
        """Rebuild curves from `to_json`.

        Raises:
            PlanError: the data is of another format, or incomplete.
        """
        check_format(data, CURVES_FORMAT, "sensitivity curves")
        values = {name: value for name, value in data.items() if name != "format"}
        try:
            curves = []
            for one in values["curves"]:
                points = tuple(SensitivityPoint(**point) for point in one["points"])
                measured = {int(kept): kl for kept, kl in one["measured"].items()}
                changed = {"order": tuple(one["order"]), "points": points, "measured": measured}
                curves.append(SensitivityCurve(**{**one, **changed}))
            return cls(**{**values, "shares": tuple(values["shares"]), "curves": tuple(curves)})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"the sensitivity curves are incomplete ({error!r}); make them again") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the curves as JSON, whole or not at all."""
        write_text(path, json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SensitivityCurves:
        """Read curves written by `save`."""
        return cls.from_json(read_json(path, "sensitivity curves"))
