"""Both forms of TPV against closed forms of linear models and dense Jacobians of small nets."""

from __future__ import annotations

import copy
import itertools
import logging
import math

import pytest
import timm
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import example, randomise
from tests.helpers import built, plan_without, random_gone
from tpvprune import analysis
from tpvprune.analysis.distance import squared
from tpvprune.analysis.persample import sample_energies
from tpvprune.analysis.perturbations import Moments, bind, parameters_of
from tpvprune.scoring.heads import head_named


def linear(outputs: int = 1, inputs: int = 5, samples: int = 12) -> tuple[nn.Module, Tensor]:
    """`f(x) = W x`: its Jacobian is the input, whatever the weights."""
    return randomise(nn.Linear(inputs, outputs, bias=False)), example(samples, inputs)


def dense_energies(model: nn.Module, x: Tensor, head: str, names: list[str]) -> Tensor:
    """The matrix `H` of all named parameters together, by sample, `(batch, P, P)`."""
    found = reference.jacobians(model, x, names)
    j = torch.cat([found[name].flatten(2) for name in names], 2)
    with torch.no_grad():
        m = reference.metric(model(x), head)
    return torch.einsum("bkp,bkl,blq->bpq", j, m, j)


@pytest.mark.parametrize("engine", ["batched", "per_sample"])
def test_trace_of_a_linear_model_with_one_output_is_the_mean_square_of_its_inputs(engine: str) -> None:
    model, x = linear()
    found = analysis.trace_heff(model, [x[:8], x[8:]], "logits", rtol=None, engine=engine, rows=1)
    assert found.value == pytest.approx(float(x.square().sum(1).mean()), rel=tolerances.EXACT)
    assert found.stderr == pytest.approx(float(x.square().sum(1).std()) / len(x) ** 0.5, rel=tolerances.EXACT)
    assert found.samples == len(x)


def test_every_perturbation_of_a_linear_model_has_its_closed_form() -> None:
    model, x = linear()
    second = x.T @ x / len(x)
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(1, 5, generator=generator, dtype=torch.float64)
    directions = torch.randn(3, 1, 5, generator=generator, dtype=torch.float64)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    covariance = root @ root.T
    weight = model.weight.detach()[0]
    step = (weight.max() - weight.min()) / 15
    removed = float(weight @ second @ weight)
    wanted = {
        "isotropic": (tp.Isotropic(0.3), 0.09 * second.trace()),
        "diagonal": (analysis.Diagonal({"weight": spread}), (spread[0] * second.diagonal()).sum()),
        "low rank": (
            analysis.LowRank({"weight": directions}),
            torch.einsum("rp,pq,rq->", directions[:, 0], second, directions[:, 0]),
        ),
        "operator": (analysis.Operator(lambda g: {"weight": g["weight"] @ covariance}), (second @ covariance).trace()),
        "rounding": (tp.Rounding(4), step**2 / 12 * second.trace()),
        "removal": (tp.Removal(), removed),
        "sampler": (analysis.Sampler(lambda w, g: {"weight": -w["weight"]}), removed),
    }
    for name, (change, value) in wanted.items():
        found = analysis.trace_form(model, [x], change, "logits", rtol=None, engine="batched", rows=1)
        assert found.value == pytest.approx(float(value), rel=tolerances.EXACT), name
        moments = bind(change, model)
        moments = getattr(moments, "moments", moments)
        if isinstance(moments, Moments):
            again = analysis.trace_form(model, [x], change, "logits", rtol=None, engine="per_sample")
            assert again.value == pytest.approx(float(value), rel=tolerances.EXACT), name


@pytest.mark.parametrize("name", ["isotropic", "diagonal", "low rank", "rounding", "operator"])
def test_the_empirical_form_of_a_linear_model_is_its_trace_form_on_average(name: str) -> None:
    model, x = linear(outputs=3)
    root = torch.randn(5, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    spread, directions = torch.rand(3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    second = x.T @ x / len(x)
    weight = model.weight.detach()
    steps = (weight.amax(1) - weight.amin(1)) / 7
    change, wanted = {
        "isotropic": (tp.Isotropic(0.3), 3 * 0.09 * second.trace()),
        "diagonal": (analysis.Diagonal({"weight": spread}), (spread @ second.diagonal()).sum()),
        "low rank": (
            analysis.LowRank({"weight": directions}),
            torch.einsum("rkp,pq,rkq->", directions, second, directions),
        ),
        "rounding": (tp.Rounding(3, "channel"), (steps**2 / 12).sum() * second.trace()),
        "operator": (
            analysis.Operator(
                lambda g: {"weight": g["weight"] @ (root @ root.T)},
                lambda w, g: {"weight": torch.randn(3, 5, generator=g, dtype=torch.float64) @ root.T},
            ),
            3 * (second @ root @ root.T).trace(),
        ),
    }[name]
    moved = analysis.movements(model, [x], change, "logits", draws=2000).mean(1)
    assert abs(float(moved.mean() - wanted)) < tolerances.STDERRS * float(moved.std()) / len(moved) ** 0.5


@pytest.mark.parametrize("head", ["softmax", "logits"])
@pytest.mark.parametrize("case", ["mlp", "conv_bn", "residual", "grouped", "depthwise", "layernorm_stream", "shared"])
def test_both_engines_agree_with_dense_jacobians(case: str, head: str) -> None:
    """Sample by sample, each with its own random cotangent: the gradients are exact, whatever layer they are of."""
    model, x = built(case).model, built(case).inputs
    names = [name for name, _ in model.named_parameters()]
    found = reference.jacobians(model, x, names)
    generator = torch.Generator().manual_seed(7)
    weights = dict(model.named_parameters())
    variances = {n: torch.rand(p.shape, generator=generator, dtype=torch.float64) for n, p in weights.items()}
    means = {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in weights.items()}
    even = {n: torch.full((), 0.5, dtype=torch.float64).expand(p.shape) for n, p in weights.items()}
    with torch.no_grad():
        u = head_named(head).cotangent(model(x), torch.Generator().manual_seed(1))
    g = {n: torch.einsum("bk,bkp->bp", u, j.flatten(2)) for n, j in found.items()}
    for moments in (Moments(means, variances), Moments({}, even), Moments({}, variances)):
        wanted = sum(g[n].square() @ v.flatten() for n, v in moments.variances.items())
        wanted = wanted + sum((g[n] @ m.flatten() for n, m in moments.means.items()), torch.zeros(len(x)).double()) ** 2
        got = sample_energies(model, x, moments, head_named(head), torch.Generator().manual_seed(1))
        torch.testing.assert_close(got, wanted, rtol=tolerances.EXACT, atol=0)
        whole = {n: value.sum(0).view_as(weights[n]) for n, value in g.items()}
        batched = moments.energy(whole, generator)
        by_hand = sum(float(whole[n].square().flatten() @ v.flatten()) for n, v in moments.variances.items())
        by_hand += sum(float(whole[n].flatten() @ m.flatten()) for n, m in moments.means.items()) ** 2
        assert batched == pytest.approx(by_hand, rel=tolerances.EXACT)


class Loose(nn.Module):
    """Parameters that no layer holds: a scale, and a token added to every position."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.ones(4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh((x + self.token) * self.scale).sum(1))


def test_parameters_outside_of_layers_count_too() -> None:
    model, x = randomise(Loose()), example(6, 3, 4)
    names = [name for name, _ in model.named_parameters()]
    h = dense_energies(model, x, "softmax", names)
    wanted = torch.einsum("bpp->b", h)
    draws = [
        analysis.trace_heff(model, [x] * 50, rtol=None, engine=engine, rows=2, seed=seed)
        for seed in range(2)
        for engine in ("batched", "per_sample")
    ]
    for found in draws:
        assert abs(found.value - float(wanted.mean())) < tolerances.STDERRS * found.stderr
        assert found.relative < 0.15


class Transposed(nn.Module):
    """A layer that sees positions outermost: as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x.transpose(0, 1))).sum(0)


def test_a_layout_that_hides_the_samples_is_noticed() -> None:
    model, x = randomise(Transposed()), example(6, 6, 4)
    with pytest.raises(tp.ModelError, match="does not hold the samples outermost"):
        analysis.trace_heff(model, [x], "logits", rtol=None, engine="per_sample")
    found = analysis.trace_heff(model, [x] * 100, "logits", rtol=None)
    by_hand = analysis.trace_heff(model, [x] * 100, "logits", rtol=None, engine="batched")
    assert found.value == by_hand.value
    wanted = torch.einsum("bpp->b", dense_energies(model, x, "logits", ["fc.weight", "fc.bias"])).mean()
    assert abs(found.value - float(wanted)) < tolerances.STDERRS * found.stderr


@pytest.mark.parametrize("head", ["softmax", "logits", "cosine"])
@pytest.mark.parametrize(("engine", "rows"), [("batched", 1), ("batched", 3), ("per_sample", 1)])
def test_the_trace_is_that_of_dense_jacobians(head: str, engine: str, rows: int, mlp) -> None:
    names = [name for name, _ in mlp.model.named_parameters()]
    wanted = float(torch.einsum("bpp->b", dense_energies(mlp.model, mlp.inputs, head, names)).mean())
    batches = [mlp.inputs] * 400
    found = analysis.trace_heff(mlp.model, batches, head, rtol=None, engine=engine, rows=rows)
    # The same inputs again and again: the stated error covers the inputs as well, and is too large.
    assert abs(found.value - wanted) < tolerances.STDERRS * found.stderr
    assert found.relative < 0.05


def test_it_stops_at_the_stated_precision_and_says_so_where_batches_end(mlp, caplog) -> None:
    batches = [example(32, 6, seed=seed) for seed in range(60)]
    coarse, fine = (analysis.trace_heff(mlp.model, batches, rtol=rtol) for rtol in (0.2, 0.06))
    assert coarse.relative <= 0.2
    assert fine.relative <= 0.06
    assert coarse.samples < fine.samples < 60 * 32
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        short = analysis.trace_heff(mlp.model, batches[:1], rtol=0.001)
    assert short.samples == 32
    assert "give more batches" in caplog.text


def test_stated_errors_are_those_that_are_made(mlp) -> None:
    values, errors = [], []
    for seed in range(60):
        batches = [example(32, 6, seed=1000 + seed)]
        found = analysis.trace_heff(mlp.model, batches, "logits", rtol=None, rows=2, seed=seed, engine="batched")
        values.append(found.value)
        errors.append(found.stderr**2)
    spread = torch.tensor(values, dtype=torch.float64).std()
    stated = torch.tensor(errors, dtype=torch.float64).mean().sqrt()
    # One spread of 60 seeds is known to 9 %.
    assert float(spread / stated) == pytest.approx(1.0, abs=2 * tolerances.STATED_ERROR)


@pytest.mark.parametrize("head", ["softmax", "logits"])
def test_the_empirical_form_approaches_the_trace_form_as_the_noise_squared(head: str, mlp) -> None:
    """With noise that comes in pairs of both signs, what is left of their difference falls as the variance does."""
    weights = {n: p.detach() for n, p in mlp.model.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    directions = [{n: torch.randn(p.shape, generator=generator).double() for n, p in weights.items()} for _ in range(4)]
    jacobian = reference.jacobians(mlp.model, mlp.inputs, weights)
    with torch.no_grad():
        m = reference.metric(mlp.model(mlp.inputs), head)
    first_order = 0.0
    for d in directions:
        change = sum(jacobian[n].flatten(2) @ d[n].flatten() for n in weights)
        first_order += float(torch.einsum("bk,bkl,bl->b", change, m, change).mean()) / len(directions)
    gaps = []
    for size in (0.02, 0.01, 0.005):
        moved = 0.0
        for d in directions:
            for sign in (size, -size):
                one = analysis.Sampler(lambda w, g, d=d, sign=sign: {n: sign * value for n, value in d.items()})
                moved += float(analysis.movements(mlp.model, [mlp.inputs], one, head, draws=1).mean()) / 2
        gaps.append(abs(moved / len(directions) / size**2 - first_order))
    assert gaps[0] > 1e-4 * first_order
    for larger, smaller in itertools.pairwise(gaps):
        assert larger / smaller == pytest.approx(4.0, rel=tolerances.RATE)


def test_rounding_for_real_approaches_the_trace_form() -> None:
    wide = randomise(nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 4)))
    x = example(24, 24)
    names = ["0.weight", "2.weight"]
    jacobian, m = reference.jacobians(wide, x, names), reference.metric(wide(x).detach(), "softmax")
    energy = {n: torch.einsum("bkp,bkl,blp->", j.flatten(2), m, j.flatten(2)) / len(x) for n, j in jacobian.items()}
    ratios = {}
    for bits in (2, 8):
        steps = {n: (p.max() - p.min()).detach() / (2**bits - 1) for n, p in wide.named_parameters() if n in names}
        wanted = float(sum(steps[n] ** 2 / 12 * energy[n] for n in names))
        for change in (tp.Rounding(bits), analysis.RandomGrid(bits)):
            found = analysis.movements(wide, [x], change, draws=100).mean(1) / wanted
            ratios[bits, type(change)] = (float(found.mean()), float(found.std()) / 10)
    ratio, error = ratios[8, tp.Rounding]
    assert abs(ratio - 1) < tolerances.STDERRS * error
    assert abs(ratios[2, tp.Rounding][0] - 1) > abs(ratio - 1)
    assert 0.75 < ratios[8, analysis.RandomGrid][0] < 1.25  # errors of one grid are not independent


def test_errors_of_a_random_grid_are_uniform_and_lie_on_a_grid() -> None:
    weights = {"weight": example(40, 50), "flat": torch.ones(3, 3, dtype=torch.float64)}
    for per in ("tensor", "channel"):
        errors = analysis.RandomGrid(4, per).draw(weights, torch.Generator().manual_seed(0))
        assert "flat" not in errors
        w, e = weights["weight"], errors["weight"]
        spread = (w.max() - w.min()) if per == "tensor" else (w.amax(1) - w.amin(1)).unsqueeze(1)
        step = spread / 15
        places = (w + e) / step
        off = places - places.floor()
        first = off[:1, :1] if per == "tensor" else off[:, :1]
        assert float(((off - first + 0.5) % 1 - 0.5).abs().max()) < tolerances.EXACT
        assert float((e / step).abs().max()) <= 0.5 + tolerances.EXACT
        assert float((e / step).square().mean()) == pytest.approx(1 / 12, rel=0.1)


def test_a_plan_is_a_perturbation(conv_bn) -> None:
    graph, model, x = conv_bn.graph, conv_bn.model, conv_bn.inputs
    gone = random_gone(graph, 1, 0.3)
    plan = plan_without(graph, gone)
    wanted = reference.plan_tpv(model, x, graph, gone, "softmax")
    found = analysis.tpv(model, [x] * 300, plan)
    assert abs(found.value - wanted) < tolerances.STDERRS * found.stderr
    assert found.samples == 300 * len(x)
    zeroed = reference.zeroed(model, graph, gone)
    with torch.no_grad():
        d, m = zeroed(x) - model(x), reference.metric(model(x), "softmax")
    by_hand = torch.einsum("bk,bkl,bl->b", d, m, d)
    measured = analysis.tpv(model, [x], plan, form="empirical")
    assert measured.value == pytest.approx(float(by_hand.mean()), rel=tolerances.EXACT)
    assert measured.stderr == pytest.approx(float(by_hand.std()) / len(x) ** 0.5, rel=tolerances.EXACT)


@pytest.mark.parametrize("head", ["softmax", "logits", "probabilities", "margin"])
def test_distances_are_those_of_the_metric(head: str) -> None:
    old, new = example(5, 4, seed=1), example(5, 4, seed=2)
    m = reference.metric(old, head)
    wanted = torch.einsum("bk,bkl,bl->b", new - old, m, new - old)
    torch.testing.assert_close(squared(head_named(head), old, new), wanted, rtol=tolerances.EXACT, atol=0)


def test_rounded_copies_lie_on_as_many_levels_as_asked(conv_bn) -> None:
    before = copy.deepcopy(conv_bn.model.state_dict())
    rounded = analysis.quantise(conv_bn.model, 2, per="channel")
    for name, p in rounded.named_parameters():
        old = before[name]
        if p.ndim < 2:
            assert torch.equal(p, old)
            continue
        for row, was in zip(p.detach().flatten(1), old.flatten(1), strict=True):
            assert len(row.unique()) <= 4
            step = (was.max() - was.min()) / 3
            assert float((row - was).abs().max()) <= float(step) / 2 + tolerances.EXACT
            assert float(row.min()) == pytest.approx(float(was.min()))
    mixed = analysis.quantise(conv_bn.model, {"fc.weight": 3}, per="tensor")
    assert len(mixed.fc.weight.unique()) <= 8
    assert torch.equal(mixed.conv1.weight, before["conv1.weight"])
    assert all(torch.equal(value, before[name]) for name, value in conv_bn.model.state_dict().items())


def test_nothing_of_the_model_is_left_changed(conv_bn) -> None:
    model = copy.deepcopy(conv_bn.model).train()
    model.conv1.weight.requires_grad_(False)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for engine in ("batched", "per_sample"):
        analysis.trace_heff(model, [conv_bn.inputs], rtol=None, engine=engine)
    analysis.tpv(model, [conv_bn.inputs], tp.Rounding(4), form="empirical", draws=2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.conv1.weight.requires_grad
    assert model.conv2.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(random, torch.get_rng_state())


class Scales:
    """Moments that are made in the weight's own place."""

    def moments(self, name, weight):
        return weight.mul_(-0.5), None


def test_changes_made_in_place_do_not_reach_the_model(mlp) -> None:
    model = copy.deepcopy(mlp.model)
    state = copy.deepcopy(model.state_dict())
    given = {"head": "logits", "draws": 2, "seed": 3}

    def noise(w, g):
        return {n: v * torch.rand(v.shape, generator=g) for n, v in w.items()}

    def in_place(w, g):
        return {n: v.mul_(torch.rand(v.shape, generator=g)) for n, v in w.items()}

    wanted = analysis.movements(model, [mlp.inputs], analysis.Sampler(noise), **given)
    for change in (analysis.Sampler(in_place), analysis.Operator(lambda g: g, in_place)):
        assert torch.equal(analysis.movements(model, [mlp.inputs], change, **given), wanted)
    plain, own = (
        analysis.trace_form(model, [mlp.inputs], analysis.Operator(apply), rtol=None)
        for apply in (lambda g: {n: 2 * v for n, v in g.items()}, lambda g: {n: v.mul_(2) for n, v in g.items()})
    )
    assert own.value == plain.value
    means = {n: -0.5 * v for n, v in state.items()}
    halved = analysis.movements(model, [mlp.inputs], analysis.Sampler(lambda w, g: means), **given)
    assert torch.equal(analysis.movements(model, [mlp.inputs], Scales(), **given), halved)
    tp.score(model, [mlp.inputs], mlp.graph, tp.TPV(perturbation=Scales()))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_only_the_parameters_named_move(mlp) -> None:
    one = analysis.trace_heff(mlp.model, [mlp.inputs], rtol=None, parameters=["0.*"], rows=1, engine="batched")
    rest = analysis.trace_heff(mlp.model, [mlp.inputs], rtol=None, parameters=["2.*", "4.*"], rows=1, engine="batched")
    whole = analysis.trace_heff(mlp.model, [mlp.inputs], rtol=None, rows=1, engine="batched")
    assert one.value + rest.value == pytest.approx(whole.value, rel=tolerances.EXACT)
    assert set(parameters_of(mlp.model, None, tp.Rounding(4))) == {"0.weight", "2.weight", "4.weight"}


def test_errors_name_what_is_wrong(mlp) -> None:
    model, batches = mlp.model, [mlp.inputs]
    with pytest.raises(tp.ModelError, match="'nothing' matches none of the parameters"):
        analysis.tpv(model, batches, tp.Isotropic(1.0), parameters=["nothing"])
    with pytest.raises(tp.InputError, match="form='other'"):
        analysis.tpv(model, batches, tp.Isotropic(1.0), form="other")
    with pytest.raises(tp.InputError, match="rtol=0"):
        analysis.trace_heff(model, batches, rtol=0)
    with pytest.raises(tp.InputError, match="engine='fast'"):
        analysis.trace_heff(model, batches, engine="fast")
    with pytest.raises(tp.InputError, match="rows=0"):
        analysis.trace_heff(model, batches, rows=0)
    with pytest.raises(tp.InputError, match="draws=0"):
        analysis.tpv(model, batches, tp.Isotropic(1.0), form="empirical", draws=0)
    with pytest.raises(tp.InputError, match="the variances name 'x'"):
        analysis.tpv(model, batches, analysis.Diagonal({"x": torch.ones(1)}))
    with pytest.raises(tp.InputError, match=r"they must be \(rank, 8, 6\)"):
        analysis.tpv(model, batches, analysis.LowRank({"0.weight": torch.ones(2, 3)}))
    with pytest.raises(tp.InputError, match="the operator has no draw="):
        analysis.tpv(model, batches, analysis.Operator(lambda g: g), form="empirical")
    with pytest.raises(tp.InputError, match="engine='per_sample' is for perturbations with moments"):
        analysis.trace_form(model, batches, analysis.Operator(lambda g: g), engine="per_sample")
    with pytest.raises(tp.InputError, match="the sampler gives 'y'"):
        analysis.tpv(model, batches, analysis.Sampler(lambda w, g: {"y": torch.ones(1)}), form="empirical")
    for given, told in ((None, "a NoneType; it must return a dict"), ({"0.weight": 1.0}, r"a float for '0\.weight'")):
        with pytest.raises(tp.InputError, match=f"the sampler gives {told}"):
            analysis.tpv(model, batches, analysis.Sampler(lambda w, g, given=given: given), form="empirical")
    with pytest.raises(tp.InputError, match=r"parameters='0\.weight' is one string; give a list"):
        analysis.tpv(model, batches, tp.Isotropic(1.0), parameters="0.weight")
    with pytest.raises(tp.InputError, match="the perturbation is a int"):
        analysis.tpv(model, batches, 3)
    with pytest.raises(tp.InputError, match="no parameter 'x' to be rounded"):
        analysis.quantise(model, {"x": 3})
    with pytest.raises(tp.DataError, match="no batch"):
        analysis.trace_heff(model, [])
    with pytest.raises(tp.NonFiniteError, match="make the perturbation smaller"):
        analysis.tpv(model, batches, tp.Isotropic(1e154), form="empirical")
    with pytest.raises(tp.InputError, match="must be above zero"):
        analysis.sgd_noise(0.0, 8)
    assert analysis.sgd_noise(0.1, 5).sigma ** 2 == pytest.approx(0.01)
    assert math.isnan(analysis.tpv(model, [mlp.inputs[:1]], tp.Isotropic(0.1), form="empirical", draws=1).stderr)


def test_attention_and_tokens_have_gradients_of_single_samples() -> None:
    torch.manual_seed(0)
    model = randomise(timm.create_model("test_vit", num_classes=3, img_size=32))
    x = example(2, 3, 32, 32)
    names = [name for name, _ in model.named_parameters()]
    weights = {n: p.detach() for n, p in model.named_parameters()}
    even = {n: torch.ones((), dtype=torch.float64).expand(p.shape) for n, p in weights.items()}
    got = sample_energies(model, x, Moments({}, even), head_named("softmax"), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for place, one in enumerate(x.split(1)):
        output = model(one)
        u = head_named("softmax").cotangent(output.detach(), generator)
        gradients = torch.autograd.grad(output, [model.get_parameter(n) for n in names], u)
        wanted = sum(float(g.square().sum()) for g in gradients)
        assert float(got[place]) == pytest.approx(wanted, rel=tolerances.EXACT)
