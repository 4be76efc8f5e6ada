"""SGD and label noise against the closed forms of linear models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import example, randomise
from tests.helpers import gap
from tpvprune import analysis
from tpvprune.analysis.labelnoise import largest_curvature


def linear(outputs: int, inputs: int = 4) -> nn.Module:
    return randomise(nn.Linear(inputs, outputs, bias=False))


def test_the_spread_of_sgd_on_a_linear_model_is_its_closed_form() -> None:
    """Steps on all inputs at once: nothing but the targets is random, and every direction is a process of its own."""
    model, x = linear(2), example(16, 4)
    lr, penalty = 0.2, 0.05
    settings = analysis.SGD(lr=lr, batch_size=16, penalty=penalty, burn_in=150, every=10, snapshots=10, chains=24)
    found = analysis.sgd_movements(model, [x], {"train": [x], "test": [example(8, 4, seed=5)]}, settings, "logits")
    h, v = torch.linalg.eigh(x.T @ x / 16)
    spread = lr**2 * h / 16 / (1 - (1 - lr * (h + penalty)) ** 2)
    for name, inputs in (("train", x), ("test", example(8, 4, seed=5))):
        wanted = 2 * float(((inputs @ v).square() @ spread).mean())
        by_chain = found[name].mean(1)
        assert found[name].shape == (24, len(inputs))
        assert abs(float(by_chain.mean()) - wanted) < tolerances.STDERRS * float(by_chain.std()) / 24**0.5
        assert float(by_chain.std()) / 24**0.5 < 0.1 * wanted


def test_small_steps_without_a_penalty_give_the_trace_form() -> None:
    model, x = linear(1), example(16, 4)
    lr, batch = 0.05, 16
    settings = analysis.SGD(lr=lr, batch_size=batch, burn_in=300, every=20, snapshots=15, chains=10)
    moved = analysis.sgd_movements(model, [x], {"train": [x]}, settings, "logits")["train"].mean(1)
    trace = analysis.tpv(model, x.split(1), analysis.sgd_noise(lr, batch), "logits", rtol=None)
    assert trace.value == pytest.approx(lr / 2 / batch * float(x.square().sum(1).mean()), rel=tolerances.EXACT)
    error = float(moved.std()) / 10**0.5
    slow = 1 / (1 - lr * float(torch.linalg.eigvalsh(x.T @ x / 16).max()) / 2) - 1  # what a finite lr adds at most
    assert abs(float(moved.mean()) - trace.value) < tolerances.STDERRS * error + slow * trace.value
    assert error < 0.15 * trace.value


def test_sgd_draws_targets_from_the_softmax() -> None:
    """Without steps that see each other the first one has covariance `lr^2 / batch * H`."""
    model, x = linear(3), example(6, 4)
    settings = analysis.SGD(lr=0.1, batch_size=6, burn_in=1, snapshots=1, chains=1500)
    moved = analysis.sgd_movements(model, [x], {"train": [x]}, settings, "softmax")["train"].mean(1)
    j = reference.jacobians(model, x, ["weight"])["weight"].flatten(2)
    m = reference.metric(model(x).detach(), "softmax")
    h = torch.einsum("bkp,bkl,blq->pq", j, m, j) / 6
    # To second order of a step of this size outputs move by their Jacobian: the model is linear.
    wanted = 0.01 / 6 * float((h @ h).trace())
    assert abs(float(moved.mean()) - wanted) < tolerances.STDERRS * float(moved.std()) / 1500**0.5


@pytest.mark.parametrize("ridge", [0.0, 3.0])
@pytest.mark.parametrize("samples", [3, 9])  # fewer and more than there are weights to an output
def test_label_noise_of_a_linear_model_is_its_closed_form(samples: int, ridge: float) -> None:
    model, x, new = linear(2), example(samples, 4), example(7, 4, seed=9)
    found = analysis.label_noise_closed(model, [x[:2], x[2:]], {"train": [x], "test": [new]}, 0.3, ridge=ridge)
    pseudo = torch.linalg.pinv(x) if not ridge else torch.linalg.solve(x.T @ x + ridge * torch.eye(4).double(), x.T)
    for name, inputs in (("train", x), ("test", new)):
        wanted = 2 * 0.09 * (inputs @ pseudo).square().sum(1)
        torch.testing.assert_close(found[name][0], wanted, rtol=tolerances.EXACT, atol=tolerances.EXACT)
    if not ridge:
        rank = min(samples, 4)
        assert float(found["train"].mean()) == pytest.approx(0.09 * 2 * rank / samples, rel=tolerances.EXACT)


def test_label_noise_in_another_metric_is_that_of_dense_jacobians(mlp) -> None:
    names = [name for name, _ in mlp.model.named_parameters()]
    new = example(3, 6, seed=4)

    def rows(x):
        found = reference.jacobians(mlp.model, x, names)
        return torch.cat([found[n].flatten(2) for n in names], 2)

    train, test = rows(mlp.inputs).flatten(0, 1), rows(new)
    through = test @ torch.linalg.pinv(train)
    m = reference.metric(mlp.model(new).detach(), "softmax")
    wanted = 0.04 * torch.einsum("bkn,bkl,bln->b", through, m, through)
    found = analysis.label_noise_closed(mlp.model, [mlp.inputs], {"test": [new]}, 0.2, "softmax")["test"][0]
    torch.testing.assert_close(found, wanted, rtol=tolerances.SOLVE, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 4000])
def test_label_noise_of_wide_models_counts_every_direction(width: int, dtype: torch.dtype) -> None:
    """Against singular values of dense Jacobians in float64; what is known of them is not less for more weights."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3)).to(dtype).eval()
    train, test = example(8, 20), example(5, 20, seed=7).to(dtype)
    train[1] = train[0] + 0.15 * train[1]
    train = train.to(dtype)
    exact = copy.deepcopy(model).double()
    names = [name for name, _ in exact.named_parameters()]

    def rows(x):
        found = reference.jacobians(exact, x.double(), names)
        return torch.cat([found[n].flatten(2) for n in names], 2)

    u, s, v = torch.linalg.svd(rows(train).flatten(0, 1), full_matrices=False)
    assert 0.01 < float(s.min() / s.max()) < 0.1
    for ridge in (0.0, float(s.square().mean())):
        through = rows(test) @ v.T * (s / (s.square() + ridge)) @ u.T
        some = {"train": [train], "test": [test]}
        found = analysis.label_noise_closed(model, [train[:3], train[3:]], some, 1.0, ridge=ridge)
        wanted = through.square().sum((1, 2))
        torch.testing.assert_close(found["test"][0], wanted, rtol=0, atol=tolerances.FLOAT32)
        if not ridge:
            assert float(found["train"].mean()) == pytest.approx(3.0, abs=tolerances.FLOAT32)
    assert all(p.dtype == dtype for p in model.parameters())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_that_are_zero_up_to_rounding_are_left_out(dtype: torch.dtype) -> None:
    """Probabilities sum to one and inputs come twice: of 36 rows 12 are independent, and noise of two is averaged."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 40), nn.LayerNorm(40), nn.GELU(), *(nn.Linear(40, 40), nn.LayerNorm(40), nn.GELU()) * 4]
    model = nn.Sequential(*layers, nn.Linear(40, 3), nn.Softmax(1)).to(dtype).eval()
    x = example(6, 8).to(dtype)
    found = analysis.label_noise_closed(model, [x, x.flip(0)], {"train": [x]}, 1.0)["train"]
    assert float(found.mean()) == pytest.approx(12 / 12, abs=tolerances.FLOAT32)


def test_fine_tuning_in_half_precision_takes_steps_in_float32() -> None:
    model, x = linear(2).bfloat16(), example(9, 4).bfloat16()
    settings = analysis.LabelNoise(sigma=1.0, steps=120, penalty=0.05, repeats=2)
    found, wanted = (
        analysis.label_noise_movements(copy.deepcopy(model).to(d), [x.to(d)], {"": [x.to(d)]}, settings)[""]
        for d in (torch.bfloat16, torch.float64)
    )
    assert float(found.mean()) == pytest.approx(float(wanted.mean()), abs=tolerances.FLOAT32)


def test_steps_of_sgd_are_not_lost_in_half_precision() -> None:
    model, x = linear(2).bfloat16(), example(9, 4).bfloat16()
    settings = analysis.SGD(lr=1e-4, batch_size=3, burn_in=20, snapshots=2, chains=2)  # a step is below one rounding
    found, wanted = (
        analysis.sgd_movements(copy.deepcopy(model).to(d), [x.to(d)], {"": [x.to(d)]}, settings, "logits")[""]
        for d in (torch.bfloat16, torch.float64)
    )
    assert gap(found, wanted) < 1e-3 * float(wanted.abs().max())  # differences of outputs in float32


class Casting(nn.Module):
    """A model that casts what it is given to half precision by itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.bfloat16() if next(self.parameters()).dtype != torch.float64 else x).float()


@pytest.mark.parametrize("noise", ["sgd", "fine-tuning", "closed form"])
def test_models_that_cast_their_inputs_to_half_precision_are_followed_too(noise: str) -> None:
    model, x = linear(2).bfloat16(), example(9, 4).bfloat16()

    def moved(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        measured = {"": [x]}
        if noise == "sgd":
            settings = analysis.SGD(lr=0.01, batch_size=3, burn_in=20, snapshots=2, chains=2)
            return analysis.sgd_movements(model, [x], measured, settings, "logits")[""]
        if noise == "closed form":
            return analysis.label_noise_closed(model, [x], measured, 1.0, ridge=0.1)[""]
        settings = analysis.LabelNoise(sigma=1.0, steps=20, penalty=0.05, repeats=2)
        return analysis.label_noise_movements(model, [x], measured, settings)[""]

    found, wanted = moved(Casting(model).eval(), x.float()), moved(copy.deepcopy(model).double(), x.double())
    assert gap(found.double(), wanted.double()) < 1e-3 * float(wanted.abs().max())


@pytest.mark.parametrize("penalty", [0.0, 0.05])
def test_both_forms_of_label_noise_are_held_by_the_penalty(penalty: float) -> None:
    model, x, new = linear(2), example(9, 4), example(7, 4, seed=9)
    settings = analysis.LabelNoise(sigma=0.3, steps=120, penalty=penalty, repeats=60)
    closed, tuned = analysis.Setting(model, [x[:5], x[5:]], [new], "logits").labels(settings)
    held = torch.linalg.solve(x.T @ x / 9 + penalty * torch.eye(4).double(), x.T / 9)  # of the mean over inputs
    for name, inputs in (("train", x), ("test", new)):
        wanted = 2 * 0.09 * float((inputs @ held).square().sum(1).mean())
        assert getattr(closed, name).value == pytest.approx(wanted, rel=tolerances.EXACT)
        found = getattr(tuned, name)
        assert abs(found.value - wanted) < tolerances.STDERRS * found.stderr


def test_fine_tuning_on_noise_reaches_the_closed_form_of_a_linear_model() -> None:
    model, x, new = linear(2), example(9, 4), example(7, 4, seed=9)
    settings = analysis.LabelNoise(sigma=0.3, steps=120, penalty=0.05, repeats=80)
    found = analysis.label_noise_movements(model, [x], {"train": [x], "test": [new]}, settings)
    closed = analysis.label_noise_closed(model, [x], {"train": [x], "test": [new]}, 0.3, ridge=0.05 * 9)
    for name in ("train", "test"):
        by_repeat = found[name].mean(1)
        error = float(by_repeat.std()) / 80**0.5
        assert abs(float(by_repeat.mean() - closed[name].mean())) < tolerances.STDERRS * error


def test_fine_tuning_approaches_the_closed_form_as_the_noise_falls() -> None:
    """The same noise at two sizes: what is left of the difference to first order falls in proportion to it."""
    torch.manual_seed(0)
    model = randomise(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    x = example(6, 3)
    moved = []
    for sigma in (0.004, 0.002, 0.001):
        settings = analysis.LabelNoise(sigma=sigma, steps=400, penalty=0.2, repeats=1)
        moved.append(float(analysis.label_noise_movements(model, [x], {"": [x]}, settings)[""].mean()) / sigma**2)
    gap = abs(moved[0] - moved[1]) / abs(moved[1] - moved[2])
    assert abs(moved[0] - moved[2]) > 1e-6 * moved[2]
    assert gap == pytest.approx(2.0, rel=tolerances.RATE)


def test_snapshots_without_a_burn_in_are_taken_after_steps() -> None:
    model, x = linear(2), example(16, 4)
    given = {"lr": 0.1, "batch_size": 4, "every": 3, "chains": 2}

    def moved(**settings):
        return analysis.sgd_movements(model, [x], {"": [x]}, analysis.SGD(**given, **settings), "logits")[""]

    singles = [moved(burn_in=step, snapshots=1) for step in (3, 6, 9)]
    assert torch.equal(moved(burn_in=0, snapshots=1), singles[0])
    torch.testing.assert_close(moved(burn_in=0, snapshots=3), sum(singles) / 3, rtol=tolerances.EXACT, atol=0)


def test_what_cannot_move_the_outputs_moves_them_by_nothing() -> None:
    model, x = linear(3), example(6, 4)
    for penalty in (0.0, 1.0):
        settings = analysis.LabelNoise(steps=2, repeats=2, penalty=penalty)
        found = analysis.label_noise_movements(model, [0 * x], {"new": [x]}, settings)["new"]
        assert found.shape == (2, 6)
        assert not found.any()
    assert not analysis.label_noise_closed(model, [0 * x], {"new": [x]})["new"].any()


def test_parameters_that_reach_no_output_are_named() -> None:
    model, x = linear(3), example(6, 4)
    model.unused = nn.Linear(4, 3)
    model = model.double()
    for measure, settings in (
        (analysis.label_noise_movements, analysis.LabelNoise(steps=2, repeats=1)),
        (analysis.label_noise_movements, analysis.LabelNoise(steps=2, repeats=1, lr=0.1)),
        (analysis.sgd_movements, analysis.SGD(batch_size=2, burn_in=1, snapshots=1)),
    ):
        with pytest.raises(tp.ModelError, match=r"\(unused.weight, unused.bias\) none reaches the outputs"):
            measure(model, [x], {"": [x]}, settings, parameters=["unused.*"])
        assert measure(model, [x], {"": [x]}, settings)[""].any()


def test_the_largest_curvature_of_a_linear_model() -> None:
    model, x = linear(2), example(9, 4)
    found = largest_curvature(model, {"weight": model.weight.detach()}, x, model(x).detach())
    assert found == pytest.approx(float(torch.linalg.eigvalsh(x.T @ x / 9).max()), rel=0.05)


def test_the_model_is_left_as_it_was(conv_bn) -> None:
    model = copy.deepcopy(conv_bn.model).train()
    state = copy.deepcopy(model.state_dict())
    some = {"test": [conv_bn.inputs]}
    analysis.sgd_movements(model, [conv_bn.inputs], some, analysis.SGD(burn_in=2, snapshots=1, chains=1, batch_size=2))
    analysis.label_noise_movements(model, [conv_bn.inputs], some, analysis.LabelNoise(steps=2, repeats=1))
    analysis.label_noise_closed(model, [conv_bn.inputs], some)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_errors_name_what_is_wrong(mlp, monkeypatch) -> None:
    with pytest.raises(tp.InputError, match="lr=0"):
        analysis.SGD(lr=0)
    with pytest.raises(tp.InputError, match="chains=0"):
        analysis.SGD(chains=0)
    with pytest.raises(tp.InputError, match="burn_in=-1"):
        analysis.SGD(burn_in=-1)
    with pytest.raises(tp.InputError, match="sigma=0"):
        analysis.LabelNoise(sigma=0)
    with pytest.raises(tp.InputError, match="momentum=1"):
        analysis.LabelNoise(momentum=1.0)
    with pytest.raises(tp.InputError, match="steps=0"):
        analysis.LabelNoise(steps=0)
    some = {"test": [mlp.inputs]}
    with pytest.raises(tp.InputError, match="batch_size=32 is more than the 5 inputs"):
        analysis.sgd_movements(mlp.model, [mlp.inputs], some)
    runaway = analysis.SGD(lr=1e60, batch_size=4, burn_in=60, snapshots=1, chains=1)
    with pytest.raises(tp.NonFiniteError, match="make lr smaller"):
        analysis.sgd_movements(mlp.model, [mlp.inputs], some, runaway, "logits")
    with pytest.raises(tp.NonFiniteError, match="NaN or infinity"):
        analysis.label_noise_closed(mlp.model, [mlp.inputs * torch.nan], some)
    with pytest.raises(tp.InputError, match="move too little"):
        analysis.label_noise_closed(linear(2), [example(3, 4) * 1e-180], {"": [example(3, 4)]})
    monkeypatch.setattr("tpvprune.analysis.labelnoise.HELD", 100)
    with pytest.raises(tp.InputError, match="take the fine-tuning form"):
        analysis.label_noise_closed(mlp.model, [mlp.inputs], some)
