"""Running sums over samples, with standard errors, that more can be added to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tpvprune.errors import PlanError

EVEN, ODD, SQUARES, CROSS = range(4)


@dataclass(frozen=True, eq=False)
class Tally:
    """Running sums that scores are made of, so that more batches can be added to them.

    A row is one independent estimate: of one sample, or of a batch whose samples cannot be told apart. Row `r`
    stands for `x_r` samples and adds `y_r = x_r * value_r`.

    Attributes:
        sums: per key `(4, entries)`: `sum y` of the even rows, of the odd rows, `sum y^2`, `sum x y`.
        samples: `sum x` of the even and of the odd rows.
        squares: `sum x^2`.
        rows: how many rows.
        batches: how many batches they came from.
    """

    sums: Mapping[str, Tensor] = field(default_factory=dict)
    samples: tuple[int, int] = (0, 0)
    squares: int = 0
    rows: int = 0
    batches: int = 0

    @classmethod
    def of_rows(cls, values: Mapping[str, Tensor], stands_for: int = 1) -> Tally:
        """The tally of one batch.

        Args:
            values: `(rows, entries)` per key. Half precision is summed in float32: a sum of its own would stand still
                after a few hundred batches.
            stands_for: samples each row stands for.
        """
        sums, rows = {}, 0
        for key, value in values.items():
            rows, y = len(value), (value if value.dtype == torch.float64 else value.float()) * stands_for
            total = y.sum(0)
            even = y[::2].sum(0)
            sums[key] = torch.stack([even, total - even, y.square().sum(0), total * stands_for]).cpu()
        even_rows = (rows + 1) // 2
        return cls(sums, (even_rows * stands_for, (rows - even_rows) * stands_for), rows * stands_for**2, rows, 1)

    @classmethod
    def of_units(cls, values: Tensor, sizes: Mapping[str, int]) -> Tally:
        """The tally of one batch, of a row a sample.

        Args:
            values: `(samples, entries of all keys)`.
            sizes: how many entries each key has, in their order.
        """
        whole = cls.of_rows({"": values})
        return replace(whole, sums=dict(zip(sizes, whole.sums[""].split(list(sizes.values()), 1), strict=True)))

    def __add__(self, other: Tally) -> Tally:
        """Both together; the rows of `other` are counted on from where this one ends."""
        return self.joined(other, turned=self.rows % 2 == 1)

    def joined(self, other: Tally, turned: bool = False) -> Tally:
        """Both together.

        Args:
            other: the even rows of which join the even rows of this one.
            turned: they join the odd ones.

        Raises:
            PlanError: they are of different units.
        """
        if self.rows and other.rows and set(self.sums) != set(other.sums):
            raise PlanError("tallies of different units cannot be added")
        order = [ODD, EVEN, SQUARES, CROSS] if turned else [EVEN, ODD, SQUARES, CROSS]
        mine, theirs = self.sums, {key: s[order] for key, s in other.sums.items()}
        both = self.rows and other.rows
        sums = {key: s + theirs[key] for key, s in mine.items()} if both else mine if self.rows else theirs
        even, odd = other.samples[::-1] if turned else other.samples
        return Tally(
            sums,
            (self.samples[0] + even, self.samples[1] + odd),
            self.squares + other.squares,
            self.rows + other.rows,
            self.batches + other.batches,
        )

    @property
    def total(self) -> int:
        """Samples in all."""
        return sum(self.samples)

    def means(self) -> dict[str, Tensor]:
        """Mean per sample, `(entries,)` per key."""
        return {key: (s[EVEN] + s[ODD]) / self.total for key, s in self.sums.items()}

    def halves(self) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
        """The means of the even and of the odd rows; None where one of them is empty."""
        if not min(self.samples):
            return None
        return (
            {key: s[EVEN] / self.samples[0] for key, s in self.sums.items()},
            {key: s[ODD] / self.samples[1] for key, s in self.sums.items()},
        )

    def stderr(self) -> dict[str, Tensor] | None:
        """Standard error of the means; None with fewer than two rows."""
        if self.rows < 2:
            return None
        out = {}
        for key, mean in self.means().items():
            s = self.sums[key]
            spread = (s[SQUARES] - 2 * mean * s[CROSS] + mean.square() * self.squares).clamp(min=0)
            out[key] = (spread * (self.rows / (self.rows - 1))).sqrt() / self.total
        return out

    def to_json(self) -> dict[str, Any]:
        """All but the sums."""
        return {
            "samples": list(self.samples),
            "squares": self.squares,
            "rows": self.rows,
            "batches": self.batches,
        }
