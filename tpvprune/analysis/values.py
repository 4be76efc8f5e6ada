"""Numbers that know how sure they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvprune.errors import InputError


@dataclass(frozen=True)
class Estimate:
    """A mean over inputs, and over whatever was drawn.

    Attributes:
        value: the mean.
        stderr: its standard error; NaN where a single draw was made.
        samples: inputs it is of.
    """

    value: float
    stderr: float
    samples: int

    @property
    def relative(self) -> float:
        """Standard error over value; infinite where the value is zero and its error is not."""
        if self.value == 0:
            return 0.0 if self.stderr == 0 else math.inf
        return self.stderr / abs(self.value)

    def times(self, factor: float) -> Estimate:
        """The estimate of a multiple."""
        return Estimate(self.value * factor, self.stderr * abs(factor), self.samples)

    def over(self, other: Estimate) -> Estimate:
        """The ratio to an independent estimate, its error to first order."""
        ratio = self.value / other.value if other.value else math.nan
        return Estimate(ratio, abs(ratio) * math.hypot(self.relative, other.relative), min(self.samples, other.samples))


def crossed(values: Tensor) -> Estimate:
    """Mean of values that were drawn and measured in every combination.

    The variance of the mean has a part for the draws, one for the inputs and one for the two together. The last is in
    both of the others' estimates, and is taken off once.

    Args:
        values: `(draws, inputs)`.
    """
    draws, inputs = values.shape
    values = values.double()
    mean = values.mean()
    if draws == 1 or inputs == 1:
        return Estimate(float(mean), math.nan if values.numel() == 1 else _stderr(values.flatten()), inputs)
    of_draws, of_inputs = values.mean(1), values.mean(0)
    rest = values - of_draws[:, None] - of_inputs[None, :] + mean
    together = rest.square().sum() / ((draws - 1) * (inputs - 1))
    variance = of_draws.var() / draws + of_inputs.var() / inputs - together / (draws * inputs)
    return Estimate(float(mean), float(variance.clamp(min=0).sqrt()), inputs)


def crossed_ratio(above: Tensor, below: Tensor) -> Estimate:
    """Ratio of the means of two sets of inputs that the same draws were measured on.

    A draw that moves outputs much does so on both sets, so the ratio is surer than its two parts.

    Args:
        above: `(draws, inputs)`.
        below: `(draws, other inputs)`, the same draws.

    Returns:
        The ratio, NaN where nothing moved below. Its error is NaN where nothing moved on either side.
    """
    above, below = above.double(), below.double()
    top, bottom, samples = above.mean(), below.mean(), min(above.shape[1], below.shape[1])
    ratio = float(top / bottom) if float(bottom) else math.nan
    if not ratio or math.isnan(ratio):  # one side did not move: it has no spread to tell an error from
        return Estimate(ratio, math.nan, samples)
    if len(above) == 1:
        one, other = _stderr(above[0]) / float(top), _stderr(below[0]) / float(bottom)
        return Estimate(ratio, abs(ratio) * math.hypot(one, other), samples)
    by_draw = above.mean(1) / top - below.mean(1) / bottom
    variance = float(by_draw.var()) / len(by_draw)
    for values, mean in ((above, top), (below, bottom)):
        variance += float(values.mean(0).var()) / values.shape[1] / float(mean) ** 2
    return Estimate(ratio, abs(ratio) * math.sqrt(variance), samples)


def _stderr(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def ranks(values: Tensor) -> Tensor:
    """Rank of each entry, ties sharing their mean rank."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse]


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation; NaN where one of the two is constant."""
    return float(torch.corrcoef(torch.stack([ranks(one.double()), ranks(other.double())]))[0, 1])


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of pairs.

    Attributes:
        value: of all pairs; NaN where one side is constant.
        low: its 2.5 % quantile over bootstrap resamples of the pairs.
        high: the 97.5 % quantile.
        pairs: how many there are.
    """

    value: float
    low: float
    high: float
    pairs: int


def correlation(one: Sequence[float], other: Sequence[float], resamples: int = 2000, seed: int = 0) -> Correlation:
    """Rank correlation with a bootstrap interval. Resamples in which one side is constant are left out.

    Args:
        one: a value for each pair.
        other: as many, in the same order.
        resamples: draws of the bootstrap.
        seed: of those draws.

    Raises:
        InputError: there are fewer than two pairs, or values without a partner.
    """
    a, b = torch.tensor(list(one), dtype=torch.float64), torch.tensor(list(other), dtype=torch.float64)
    if len(a) != len(b) or len(a) < 2:
        raise InputError(f"{len(a)} and {len(b)} values are no pairs to correlate; give two or more of each")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(resamples):
        chosen = torch.randint(0, len(a), (len(a),), generator=generator)
        value = rank_correlation(a[chosen], b[chosen])
        if not math.isnan(value):
            found.append(value)
    edges = torch.tensor(found or [math.nan], dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double())
    return Correlation(rank_correlation(a, b), float(edges[0]), float(edges[1]), len(a))
