"""Ranking checkpoints, and the correlation that judges a ranking."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tpvprune import analysis
from tpvprune.analysis.values import Estimate, crossed, crossed_ratio, rank_correlation


def scaled(factor: float) -> nn.Module:
    """A linear model behind a fixed scale: the larger, the more of the noise it follows."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * factor

    return randomise(Scaled())


def test_the_tpv_of_a_linear_model_is_its_effective_dimension() -> None:
    x = example(9, 4)
    models = {"large": scaled(3.0), "small": scaled(0.3), "middle": scaled(1.0)}
    found = analysis.select(models, [x[:5], x[5:]], ridge=2.0)
    assert found.names == ("small", "middle", "large")
    assert found.best == "small"
    assert found.method == "closed"
    for name, factor in (("large", 3.0), ("small", 0.3), ("middle", 1.0)):
        h = torch.linalg.eigvalsh(x.T @ x) * factor**2
        wanted = 2 * float((h / (h + 2.0)).square().sum()) / 9
        assert found.tpv[name].value == pytest.approx(wanted, rel=tolerances.EXACT)
    tuned = analysis.select(
        models, [x], ridge=2.0, method="fine-tuning", settings=analysis.LabelNoise(sigma=1.0, steps=100, repeats=25)
    )
    assert tuned.names == found.names
    for name in models:
        error = tuned.tpv[name].stderr
        assert abs(tuned.tpv[name].value - found.tpv[name].value) < tolerances.STDERRS * error


def test_the_ridge_is_common_and_follows_from_the_models() -> None:
    x = example(9, 4)
    models = {"a": scaled(2.0), "b": scaled(0.5)}
    found = analysis.select(models, list(x.split(1)))
    mean_square = [factor**2 * float(x.square().sum(1).mean()) for factor in (2.0, 0.5)]
    assert found.ridge == pytest.approx(math.sqrt(math.prod(mean_square)), rel=0.5)
    assert found.names == ("b", "a")


def test_rank_correlation_is_spearmans() -> None:
    generator = np.random.default_rng(0)
    a = generator.normal(size=40)
    b = a + generator.normal(size=40)
    b[3] = b[5]
    order = lambda v: np.array([np.mean([np.sum(v < x), np.sum(v <= x) - 1]) for x in v])  # noqa: E731
    wanted = np.corrcoef(order(a), order(b))[0, 1]
    assert rank_correlation(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(wanted, rel=tolerances.EXACT)
    found = analysis.correlation(a.tolist(), b.tolist())
    assert found.low < found.value < found.high
    # Fisher's approximation of the interval, which the bootstrap should be near.
    low, high = np.tanh(np.arctanh(wanted) + np.array([-1.96, 1.96]) * np.sqrt(1.06 / 37))
    assert found.low == pytest.approx(low, abs=0.12)
    assert found.high == pytest.approx(high, abs=0.12)
    assert found.pairs == 40


def test_errors_of_crossed_means_are_those_that_are_made() -> None:
    """Draws and inputs with an effect each, and noise on top: repeated from scratch."""
    generator = torch.Generator().manual_seed(0)
    means, stated, ratios, stated_ratios = [], [], [], []
    for _ in range(400):
        draw = torch.randn(6, 1, generator=generator)
        one, other = (
            5 + draw + 2 * torch.randn(1, 30, generator=generator) + torch.randn(6, 30, generator=generator)
            for _ in range(2)
        )
        found, ratio = crossed(one), crossed_ratio(one, other)
        means.append(found.value)
        stated.append(found.stderr**2)
        ratios.append(ratio.value)
        stated_ratios.append(ratio.stderr**2)
    for values, squares in ((means, stated), (ratios, stated_ratios)):
        spread = float(torch.tensor(values).std())
        assert spread / math.sqrt(sum(squares) / len(squares)) == pytest.approx(1.0, abs=tolerances.STATED_ERROR)


@pytest.mark.parametrize("draws", [1, 3])
def test_a_side_that_does_not_move_has_a_ratio_without_an_error(draws: int) -> None:
    still, moved = torch.zeros(draws, 5), torch.rand(draws, 4) + 1
    found = crossed_ratio(still, moved)
    assert (found.value, found.samples) == (0.0, 4)
    assert math.isnan(found.stderr)
    for above in (still, moved):
        found = crossed_ratio(above, still)
        assert math.isnan(found.value)
        assert math.isnan(found.stderr)


def test_ratios_of_estimates() -> None:
    ratio = Estimate(2.0, 0.2, 10).over(Estimate(4.0, 0.8, 7))
    assert (ratio.value, ratio.samples) == (0.5, 7)
    assert ratio.stderr == pytest.approx(0.5 * math.hypot(0.1, 0.2))
    assert Estimate(0.0, 0.0, 1).relative == 0
    assert Estimate(0.0, 1.0, 1).relative == math.inf


def test_errors_name_what_is_wrong(mlp) -> None:
    models = {"a": mlp.model, "b": mlp.model}
    with pytest.raises(tp.InputError, match="nothing to choose from"):
        analysis.select({"a": mlp.model}, [mlp.inputs])
    with pytest.raises(tp.InputError, match="ridge=0"):
        analysis.select(models, [mlp.inputs], ridge=0)
    with pytest.raises(tp.InputError, match="method='guess'"):
        analysis.select(models, [mlp.inputs], method="guess")
    with pytest.raises(tp.DataError, match="no batch"):
        analysis.select(models, [])
    with pytest.raises(tp.DataError, match="read once only"):
        analysis.select(models, iter([mlp.inputs]))
    with pytest.raises(tp.InputError, match="no pairs"):
        analysis.correlation([1.0], [2.0])
