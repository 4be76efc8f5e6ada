"""Perturbations against their definitions, and the check of those that people write themselves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tpvprune.scoring.perturb import PERTURBATIONS, Perturbation, moments_of, perturbation_named
from tpvprune.testing import check_perturbation

WEIGHT = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """To the nearest of `2^bits` levels that span the weights."""
    levels = torch.linspace(float(weight.min()), float(weight.max()), 2**bits, dtype=weight.dtype)
    above = torch.searchsorted(levels, weight).clamp(1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    return torch.where(weight - low < high - weight, low, high)


def test_removal_takes_the_weight_away() -> None:
    mean, variance = tp.Removal().moments("w", WEIGHT)
    assert torch.equal(WEIGHT + mean, torch.zeros_like(WEIGHT))
    assert variance is None


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_rounding_varies_as_much_as_real_rounding_errors(bits: int, per: str) -> None:
    scale = torch.tensor([1.0, 0.01, 30.0, 2.0], dtype=torch.float64)
    uniform = torch.rand(4, 50, 400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = uniform * (scale.reshape(4, 1, 1) if per == "channel" else 1) - 0.3
    mean, variance = tp.Rounding(bits, per).moments("w", weight)
    assert mean is None
    parts = [weight] if per == "tensor" else list(weight)
    errors = torch.stack([(rounded(part, bits) - part).var() for part in parts])
    shape = () if per == "tensor" else (4, 1, 1)
    assert variance.shape == shape
    torch.testing.assert_close(variance.flatten(), errors, rtol=tolerances.MEASURED_VARIANCE, atol=0)


def test_a_channel_of_a_transposed_convolution_is_one_that_it_reads() -> None:
    generator = torch.Generator().manual_seed(2)
    layer = nn.ConvTranspose2d(3, 5, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64))
    rounded_layer = tp.analysis.quantise(layer, 3, per="channel")
    variance = tp.Rounding(3, "channel").moments("weight", layer.weight.detach())[1]
    for number, inputs in enumerate(layer.weight.detach()):
        wanted = rounded(inputs, 3)
        torch.testing.assert_close(rounded_layer.weight[number], wanted, rtol=tolerances.EXACT, atol=tolerances.EXACT)
        step = float(inputs.max() - inputs.min()) / 7
        assert float(variance[number]) == pytest.approx(step**2 / 12, rel=tolerances.EXACT)


def test_a_vector_has_one_step() -> None:
    vector = torch.tensor([-1.0, 0.5, 2.0])
    for per in ("tensor", "channel"):
        assert float(tp.Rounding(2, per).moments("b", vector)[1]) == pytest.approx(1 / 12)


def test_isotropic_noise_is_alike_everywhere() -> None:
    mean, variance = moments_of(tp.Isotropic(0.3), "w", WEIGHT)
    assert mean is None
    torch.testing.assert_close(variance, torch.full_like(WEIGHT, 0.09))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: tp.Rounding(0), "bits=0 must be a whole number from 1 to 16"),
        (lambda: tp.Rounding(17), "bits=17"),
        (lambda: tp.Rounding(True), "bits=True"),
        (lambda: tp.Rounding(2.5), "bits=2.5"),
        (lambda: tp.Rounding(per="row"), "per='row' must be 'tensor' or 'channel'"),
        (lambda: tp.Isotropic(-1), "sigma=-1"),
        (lambda: tp.Isotropic(float("nan")), "sigma=nan"),
        (lambda: tp.Isotropic(float("inf")), "sigma=inf"),
        (lambda: tp.TPV(perturbation="noise"), "no perturbation 'noise'; choose one of isotropic, removal, rounding"),
    ],
)
def test_wrong_settings_are_refused(make, match: str) -> None:
    with pytest.raises(tp.InputError, match=match):
        make()


@dataclass(frozen=True)
class Given:
    """Whatever it was made with."""

    mean: Tensor | float | None = None
    variance: Tensor | float | None = None

    def moments(self, name, weight):
        return self.mean, self.variance


def test_perturbations_are_found_by_name_or_taken_as_they_are() -> None:
    assert perturbation_named("rounding") == tp.Rounding(8, "tensor")
    assert perturbation_named("removal") == tp.Removal()
    assert perturbation_named("isotropic") == tp.Isotropic(1.0)
    own = Given()
    assert perturbation_named(own) is own
    assert all(isinstance(p(), Perturbation) for p in (*PERTURBATIONS.values(), Given))


def test_moments_come_at_the_shape_and_type_of_the_weight() -> None:
    mean, variance = moments_of(Given(torch.ones(4, 1), torch.arange(3).reshape(3, 1, 1)), "w", WEIGHT)
    assert mean.shape == variance.shape == WEIGHT.shape
    assert mean.dtype == variance.dtype == torch.float64
    assert variance[2].eq(2).all()
    assert moments_of(Given(), "w", WEIGHT) == (None, None)
    for half in (0.5, np.float32(0.5)):
        mean, variance = moments_of(Given(half, 2), "w", WEIGHT)
        assert torch.equal(mean, torch.full_like(WEIGHT, 0.5))
        assert torch.equal(variance, torch.full_like(WEIGHT, 2))
    with pytest.raises(tp.InputError, match=r"^Given: the perturbation's mean of 'w' is a ndarray; give a tensor"):
        moments_of(Given(np.ones(2)), "w", WEIGHT)


@pytest.mark.parametrize(
    ("own", "match"),
    [
        (Given(mean=torch.ones(5)), r"mean of 'w' has shape \(5,\), the weight \(3, 4, 2\)"),
        (Given(variance=torch.ones(1, 3, 4, 2)), r"variance of 'w' has shape \(1, 3, 4, 2\)"),
        (Given(mean=torch.tensor(torch.nan)), "mean of 'w' is not finite"),
        (Given(variance=torch.tensor(torch.inf)), "variance of 'w' is not finite"),
        (Given(variance=torch.tensor([0.0, -1e-9])), "variance of 'w' is below zero"),
    ],
)
def test_wrong_moments_are_refused_by_name(own: Given, match: str, mlp) -> None:
    with pytest.raises(tp.InputError, match=match):
        moments_of(own, "w", WEIGHT)
    with pytest.raises(AssertionError, match=r"mean|variance"):
        check_perturbation(own, "w", WEIGHT)
    with pytest.raises(tp.InputError, match="the perturbation's"):
        tp.score(mlp.model, [mlp.inputs], mlp.graph, tp.TPV(perturbation=Given(mean=torch.ones(1, 1, 1))))


@pytest.mark.parametrize("weight", [WEIGHT, WEIGHT[0, 0], WEIGHT.float(), torch.zeros(2, 3)], ids="wvfz")
@pytest.mark.parametrize("name", sorted(PERTURBATIONS))
def test_the_perturbations_keep_their_promise(name: str, weight: Tensor) -> None:
    check_perturbation(PERTURBATIONS[name](), "w", weight)
    check_perturbation(tp.Rounding(4, "channel"), "w", weight)
    check_perturbation(Given(torch.ones(()), torch.ones(1)), "w", weight)
    check_perturbation(Given(-0.1, 2), "w", weight)


class Changes:
    def moments(self, name, weight):
        return -weight.mul_(2), None


class Draws:
    def moments(self, name, weight):
        return torch.randn_like(weight), None


class Drifts:
    calls = 0

    def moments(self, name, weight):
        self.calls += 1
        return torch.tensor(float(self.calls)), None


@pytest.mark.parametrize(
    ("own", "phrase"),
    [
        (Changes(), "the weight was changed"),
        (Draws(), "global random state"),
        (Drifts(), "mean does not repeat"),
        (Given("half"), "mean of 'w' is a str; give a tensor, a number, or None"),
        (Given(-1, [2]), "variance of 'w' is a list of 1"),
        (Given(torch.ones(5)), "does not broadcast"),
        (Given(None, -torch.ones(())), "below zero"),
    ],
)
def test_wrong_perturbations_are_caught(own, phrase: str) -> None:
    with pytest.raises(AssertionError, match=phrase):
        check_perturbation(own, "w", WEIGHT.clone())


@dataclass(frozen=True)
class Returns:
    what: object

    def moments(self, name, weight):
        return weight if self.what == "weight" else self.what


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("weight", r"a tensor of shape \(2, 3\)"),  # of two rows, which are no mean and variance
        (0.5, "a float"),
        (None, "a NoneType"),
        ((torch.ones(()),), "a tuple of 1"),
        ((None, None, None), "a tuple of 3"),
        ([None, torch.ones(())], "a list of 2"),
    ],
)
def test_a_pair_is_asked_for(what: object, told: str, mlp) -> None:
    own, match = Returns(what), rf"Returns: the moments of '{{}}' are {told}, no pair; return \(mean, variance\)"
    with pytest.raises(tp.InputError, match=match.format("w")):
        moments_of(own, "w", torch.ones(2, 3))
    with pytest.raises(AssertionError, match=match.format("w")):
        check_perturbation(own, "w", torch.ones(2, 3))
    if what != "weight":
        with pytest.raises(tp.InputError, match=match.format("2.weight")):
            tp.score(mlp.model, [mlp.inputs], mlp.graph, tp.TPV(perturbation=own))


def test_a_number_scores_as_a_tensor_of_it_does(mlp) -> None:
    scores = [
        tp.score(mlp.model, [mlp.inputs], mlp.graph, tp.TPV(perturbation=Given(*moments)))
        for moments in ((0.5, 2), (torch.tensor(0.5), torch.full((1,), 2.0)))
    ]
    for name, value in scores[0].values.items():
        assert torch.equal(value, scores[1].values[name])
