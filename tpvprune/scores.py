"""Importance of every unit, as a value that is saved once and used for any number of budgets."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tpvprune.errors import InputError, PlanError
from tpvprune.files import write_bytes
from tpvprune.tally import Tally
from tpvprune.types import check_format

SCORES_FORMAT = 2


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """What removing units does to the outputs, sample by sample, so that whole plans can be judged.

    With `S` the units removed, the outputs' drift from the reference is predicted to grow by
    `mean over samples of sum over its rows of (sum over S of rows)^2, plus the sum over S of linear`
    (design, "A plan is one perturbation").

    Attributes:
        groups: (id, units) of the columns, in order.
        rows: `(rows, units of all groups)`: first-order effect of each unit on each cotangent of each sample.
        linear: float64 `(units of all groups,)`: zero where the reference is the model itself.
        samples: how many samples the rows are of.
        total: what `linear` is the mean of, summed up, so that more can be added without rounding; None where that is
            not known any more. Kept on disk with rows that are kept as they are.
    """

    groups: tuple[tuple[str, int], ...]
    rows: Tensor
    linear: Tensor
    samples: int
    total: Tensor | None = None

    def __post_init__(self) -> None:
        units = sum(count for _, count in self.groups)
        if self.rows.ndim != 2 or self.rows.shape[1] != units or self.linear.shape != (units,):
            raise PlanError(f"sensitivities need {units} columns, one a unit; score again")

    def __repr__(self) -> str:
        return f"Sensitivities({self.rows.shape[1]:,} units, {self.samples:,} samples, {len(self.rows):,} rows)"

    def tensors(self, exact: bool = False) -> dict[str, Tensor]:
        """Half-precision rows, each column scaled to at most one, and what undoes it; rows as they are if `exact`."""
        if exact:
            scale = torch.ones(self.rows.shape[1])
            kept = {"rows": self.rows.float().contiguous(), "scale": scale, "linear": self.linear.contiguous()}
            return kept if self.total is None else {**kept, "total": self.total.contiguous()}
        scale = self.rows.float().abs().amax(0).clamp(min=1e-30)
        return {
            "rows": (self.rows.float() / scale).half().contiguous(),
            "scale": scale,
            "linear": self.linear.contiguous(),
        }

    def drift(self, keep: Mapping[str, Tensor]) -> tuple[float, float]:
        """TPV of a plan (growth of the drift, if a reference was given), and its standard error.

        Args:
            keep: bool mask `(units,)` per group id, of a plan; a group that is missing stays whole. One that is gone
                whole lies in a skipped block, whose effect stands for it.
        """
        within = {name for name, units in self.groups if units > 1 and name in keep and not bool(keep[name].any())}
        counted = {name: mask for name, mask in keep.items() if name not in within}
        gone = torch.cat(
            [~counted[name] if name in counted else torch.zeros(units, dtype=torch.bool) for name, units in self.groups]
        )
        moved = self.rows[:, gone].double().sum(1).square().reshape(self.samples, -1).sum(1)
        error = float(moved.std() / math.sqrt(self.samples)) if self.samples > 1 else math.nan
        return float(moved.mean() + self.linear[gone].sum()), error


@dataclass(frozen=True, eq=False)
class Scores:
    """Importance of every unit: what the outputs are predicted to move when it alone is removed.

    Attributes:
        values: float64 `(units,)` per group (of weights: of the model's type, float32 at least). For `TPV` with the
            softmax head, half of a value is nats of KL.
        stderr: standard error of each value, same shapes; None where the criterion has none.
        criterion: how they were made, in words.
        samples: examples seen.
        probes: cotangents per example; "exact" if the sum over outputs was taken.
        seed: seed of the probes.
        model_id: fingerprint of the model scored.
        tally: the sums behind them, where the criterion is a sum over batches.
        halves: the scores of the even and of the odd rows, by the number of the batch plus the place in it.
        sensitivities: effects sample by sample, where they were asked for.
        manifest: versions, digest of the data, and what else may be asked of the file later.
    """

    values: Mapping[str, Tensor]
    stderr: Mapping[str, Tensor] | None
    criterion: str
    samples: int
    probes: int | str
    seed: int
    model_id: str
    tally: Tally | None = None
    halves: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
    sensitivities: Sensitivities | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if value.ndim != 1 or not bool(torch.isfinite(value).all()):
                raise PlanError(f"scores of group {name!r} are not finite values of shape (units,)")

    def __repr__(self) -> str:
        units = sum(len(value) for value in self.values.values())
        more = ", with sensitivities" if self.sensitivities is not None else ""
        of = f"{units:,} units in {len(self.values):,} groups"
        return f"Scores({of} by {self.criterion}, {self.samples:,} samples{more})"

    @property
    def in_nats(self) -> bool:
        """Whether half a value predicts KL(dense || pruned) in nats: TPV of the softmax head, of the cut alone."""
        return in_nats(self.criterion)

    def summary(self, cut: float = 0.5, share: float = 0.01) -> dict[str, Any]:
        """How sure the ranking is.

        All units are ranked together by score, and the share `cut` of them with the largest is kept.

        Args:
            cut: share of the units that stays, in (0, 1).
            share: expected share of units on the wrong side of the cut that counts as settled.

        Returns:
            `samples`; `relative_stderr`: median of standard error over score; `rank_correlation`: Spearman's, between
            the scores of two halves of the samples; `wrong_side`: share of the units expected on the wrong side of
            the cut; `settled`; `samples_to_settle`: estimated samples needed in all. None where it cannot be known, as
            of compensated single weights.
        """
        if not 0 < cut < 1 or not 0 < share < 1:
            raise InputError(f"cut={cut} and share={share} must lie between 0 and 1")
        values = torch.cat([v.double() for v in self.values.values()]) if self.values else torch.zeros(0)
        found: dict[str, Any] = {"samples": self.samples, "units": values.numel()}
        found |= dict.fromkeys(
            ("relative_stderr", "rank_correlation", "wrong_side", "settled", "samples_to_settle"), None
        )
        if self.halves is not None and values.numel() > 1:
            one, other = (torch.cat([half[n].double() for n in self.values]) for half in self.halves)
            correlation = float(torch.corrcoef(torch.stack([_ranks(one), _ranks(other)]))[0, 1])
            found["rank_correlation"] = None if math.isnan(correlation) else correlation
        if self.stderr is None or values.numel() < 2:
            return found
        errors = torch.cat([self.stderr[n].double() for n in self.values])
        known = values > 0
        if bool(known.any()):
            found["relative_stderr"] = float((errors[known] / values[known]).median())
        found["wrong_side"] = _wrong_side(values, errors, cut)
        found["settled"] = found["wrong_side"] <= share
        found["samples_to_settle"] = self._to_settle(values, errors, cut, share)
        return found

    def _to_settle(self, values: Tensor, errors: Tensor, cut: float, share: float) -> int | None:
        """Least number of samples at which errors, falling with its root, leave `share` on the wrong side."""
        few, many = 1.0, 1e9
        if _wrong_side(values, errors * math.sqrt(self.samples / many), cut) > share:
            return None
        while many / few > 1.01:
            middle = math.sqrt(few * many)
            if _wrong_side(values, errors * math.sqrt(self.samples / middle), cut) > share:
                few = middle
            else:
                many = middle
        return math.ceil(many)

    def save(self, path: str | PathLike[str], *, exact: bool = False) -> None:
        """Write the scores as safetensors, with how they were made in the header.

        Args:
            path: the file.
            exact: keep sensitivities in full precision, in twice the room, so that more can be added as if there had
                been no file.
        """
        tensors = {f"value/{name}": value.contiguous() for name, value in self.values.items()}
        tensors |= {f"stderr/{name}": value.contiguous() for name, value in (self.stderr or {}).items()}
        about: dict[str, Any] = {"format": SCORES_FORMAT, "criterion": self.criterion, "samples": self.samples}
        about |= {"probes": self.probes, "seed": self.seed, "model_id": self.model_id}
        about["manifest"] = dict(self.manifest)
        if self.tally is not None:
            about["tally"] = self.tally.to_json()
            tensors |= {f"sums/{key}": value.contiguous() for key, value in self.tally.sums.items()}
        for number, half in enumerate(self.halves or ()):
            tensors |= {f"half{number}/{name}": value.contiguous() for name, value in half.items()}
        if self.sensitivities is not None:
            about["sensitivities"] = {
                "groups": [list(pair) for pair in self.sensitivities.groups],
                "samples": self.sensitivities.samples,
            }
            tensors |= {f"sensitivity/{key}": value for key, value in self.sensitivities.tensors(exact).items()}
        held: set[int] = set()
        for key, value in tensors.items():
            memory = value.untyped_storage().data_ptr()
            tensors[key] = value.clone() if memory in held else value  # the format refuses shared memory
            held.add(memory)
        about["checksum"] = _checksum(tensors)
        write_bytes(path, save(tensors, metadata={"tpvprune": json.dumps(about)}))  # several entries come in any order

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Scores:
        """Read scores written by `save`.

        Raises:
            PlanError: the file is missing, corrupt, or of another format.
        """
        if not Path(path).is_file():
            raise PlanError(f"no scores at {path}; run the score stage first")
        try:
            with safe_open(str(path), framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("tpvprune", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, ValueError) as error:
            raise PlanError(f"{path} is no scores file: {error}") from error
        check_format(about, SCORES_FORMAT, f"scores {path}")
        if about.pop("checksum", None) not in (None, _checksum(tensors)):  # files of earlier versions have none
            raise PlanError(f"scores {path} are damaged: they are not what was written; score again")

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{prefix}/")}

        try:
            tally = about.pop("tally", None)
            if tally is not None:
                counts = {**tally, "samples": tuple(tally["samples"])}
                about["tally"] = Tally(sums=part("sums"), **counts)
            halves = (part("half0"), part("half1"))
            about["halves"] = halves if halves[0] else None
            effects = about.pop("sensitivities", None)
            if effects is not None:
                held = part("sensitivity")
                groups = tuple((str(name), int(units)) for name, units in effects["groups"])
                rows = held["rows"].float() * held["scale"]
                samples, total = int(effects["samples"]), held.get("total")
                about["sensitivities"] = Sensitivities(groups, rows, held["linear"], samples, total)
            about.pop("format")
            return cls(values=part("value"), stderr=part("stderr") or None, **about)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"scores {path} are incomplete ({error}); score again") from error


@dataclass(frozen=True)
class Settled:
    """When scoring may stop: few enough units are expected on the wrong side of the cut.

    Attributes:
        cut: share of all units that stays.
        share: expected share of units on the wrong side.
        least: samples to see in any case.
    """

    cut: float = 0.5
    share: float = 0.01
    least: int = 128

    def __post_init__(self) -> None:
        if not (0 < self.cut < 1 and 0 < self.share < 1):
            raise InputError(f"cut={self.cut} and share={self.share} must lie between 0 and 1")

    def reached(self, scores: Scores) -> bool:
        """Whether these scores are settled."""
        return scores.samples >= self.least and bool(scores.summary(self.cut, self.share)["settled"])


def in_nats(criterion: str) -> bool:
    """Whether half a value of a criterion of that name predicts KL(dense || pruned) in nats."""
    other = "compensated" in criterion or re.search(r"perturbation=(?!removal\b)", criterion)
    return criterion.startswith("tpv(head=softmax, over=consume") and not other


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names and values."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def _ranks(values: Tensor) -> Tensor:
    """Rank of each entry, ties sharing their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]


def _wrong_side(values: Tensor, errors: Tensor, cut: float) -> float:
    """Expected share of units whose true score lies on the other side of the cut, scores being normal."""
    ordered = values.sort().values
    place = min(max(round(len(values) * (1 - cut)), 1), len(values) - 1)
    threshold = (ordered[place - 1] + ordered[place]) / 2
    distance = (values - threshold).abs() / errors
    # What is known without error lies on no wrong side, at the threshold neither.
    return float(torch.where(errors > 0, torch.special.ndtr(-distance), 0).mean())
