"""Scores from weight gradients, of single weights, blocks and channels, against dense Jacobians and plain loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import example, randomise
from tests.helpers import assert_scores_close, built
from tpvprune.scoring import gradients

# torch warns once that it pads one side more than the other, which is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


class Sequences(nn.Module):
    """1-D convolutions with groups, strides, dilation and padding of several kinds, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 6, 3, padding=2, dilation=2, padding_mode="circular")
        self.grouped = nn.Conv1d(6, 4, 2, stride=2, groups=2, bias=False)
        self.again = nn.Conv1d(4, 4, 3, padding="same", padding_mode="reflect")
        self.depthwise = nn.Conv1d(4, 8, 3, groups=4)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.grouped(torch.tanh(self.first(x))))
        x = self.again(torch.tanh(self.again(x)))
        return self.fc(F.gelu(self.depthwise(x)).mean(2))


class Images(nn.Module):
    """2-D convolutions that are not square, and a layer that sees each sample's windows as rows of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(2, 4, (1, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.same = nn.Conv2d(4, 6, (3, 2), padding="same", groups=2)
        self.windows, self.fc = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.same(torch.tanh(self.wide(x))), inplace=True)
        windows = x.permute(0, 3, 2, 1).flatten(0, 1)  # (batch * columns, rows, channels)
        return self.fc(torch.tanh(self.windows(windows)).mean(1)).unflatten(0, (len(x), -1)).amax(1)


@cache
def net(name: str) -> tuple[nn.Module, Tensor]:
    if name == "sequences":
        return randomise(Sequences()), example(4, 3, 9)
    if name == "images":
        return randomise(Images()), example(3, 2, 5, 7)
    return built(name).model, built(name).inputs


NETS = ("mlp", "conv_bn", "residual", "grouped", "depthwise", "layernorm_stream", "shared", "sequences", "images")


def uneven(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A mean and a variance that differ from weight to weight."""
    steps = torch.arange(weight.numel(), dtype=weight.dtype).view_as(weight)
    return 0.3 * weight - 0.1 * torch.cos(steps), 0.02 + 0.01 * torch.sin(steps) ** 2 + 0.1 * weight**2


class Uneven:
    moments = staticmethod(uneven)


def rounding(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    variance = torch.zeros_like(weight)
    for row in range(len(weight)):
        variance[row] = ((weight[row].max() - weight[row].min()) / 7) ** 2 / 12
    return torch.zeros_like(weight), variance


PERTURBATIONS = {
    "removal": ("removal", reference.removal),
    "rounding": (tp.Rounding(3, "channel"), rounding),
    "isotropic": (tp.Isotropic(0.2), lambda n, w: (torch.zeros_like(w), torch.full_like(w, 0.04))),
    "uneven": (Uneven(), uneven),
}


@pytest.mark.parametrize("head", ["softmax", "logits", "cosine"])
@pytest.mark.parametrize("name", NETS)
def test_exact_scores_of_single_weights_are_those_of_dense_jacobians(name: str, head: str) -> None:
    model, x = net(name)
    graph = tp.weight_graph(model)
    scores = tp.score(model, [x], graph, tp.TPV(head=head, probes="exact", engine="per_sample"))
    jacobian = reference.jacobians(model, x, [group.id for group in graph.groups])
    with torch.no_grad():
        metric, weights = reference.metric(model(x), head), dict(model.named_parameters())
    wanted = {}
    for param, j in jacobian.items():
        j = j.flatten(2)
        diagonal = torch.einsum("bkp,bkl,blp->bp", j, metric, j).mean(0)
        wanted[param] = weights[param].detach().flatten() ** 2 * diagonal
    assert_scores_close(scores.values, wanted, tolerances.EXACT)
    assert all(float(value.max()) > 0 for value in wanted.values())
    assert (scores.samples, scores.probes) == (len(x), "exact")


@pytest.mark.parametrize("which", PERTURBATIONS)
@pytest.mark.parametrize(("name", "block"), [("mlp", (1, 1)), ("sequences", (2, 1)), ("grouped", (1, 1))])
def test_per_sample_scores_of_any_perturbation_are_exact(name: str, block: tuple[int, int], which: str) -> None:
    (model, x), (perturbation, moments) = net(name), PERTURBATIONS[which]
    graph = tp.weight_graph(model, block)
    criterion = tp.TPV(probes="exact", engine="per_sample", perturbation=perturbation)
    wanted = reference.perturbed_tpv(model, x, graph, "softmax", moments)
    assert_scores_close(tp.score(model, [x], graph, criterion).values, wanted, tolerances.EXACT)


@pytest.mark.parametrize(
    ("name", "block", "layers"),
    [
        ("mlp", (1, 2), ["0", "2"]),
        ("mlp", (4, 3), ["0"]),
        ("conv_bn", (1, 9), ["conv*"]),
        ("conv_bn", (5, 54), ["conv2"]),
        ("grouped", (3, 9), ["grouped"]),
    ],
)
def test_a_block_moves_as_one(name: str, block: tuple[int, int], layers: list[str]) -> None:
    model, x = net(name)
    graph = tp.weight_graph(model, block, layers)
    scores = tp.score(model, [x], graph, tp.TPV(probes="exact", engine="per_sample"))
    assert_scores_close(scores.values, reference.perturbed_tpv(model, x, graph, "softmax"), tolerances.EXACT)
    single = tp.score(model, [x], tp.weight_graph(model, (1, 1), layers), tp.TPV(probes="exact", engine="per_sample"))
    apart = {g.id: single.values[g.id][g.members[0].index].sum(1) for g in graph.groups}
    assert all(float((apart[n] - v).abs().max()) > 1e-3 * float(v.max()) for n, v in scores.values.items())


@pytest.mark.parametrize("which", PERTURBATIONS)
@pytest.mark.parametrize("name", ["mlp", "residual", "grouped", "vit", "flatten", "layernorm_stream"])
def test_per_sample_scores_of_channels_are_exact(name: str, which: str) -> None:
    b, (perturbation, moments) = built(name), PERTURBATIONS[which]
    criterion = tp.TPV(probes="exact", engine="per_sample", perturbation=perturbation)
    scores = tp.score(b.model, [b.inputs], b.graph, criterion)
    wanted = reference.perturbed_tpv(b.model, b.inputs, b.graph, "softmax", moments)
    assert_scores_close(scores.values, wanted, tolerances.EXACT)
    if which == "removal":
        taps = tp.score(b.model, [b.inputs], b.graph, tp.TPV(probes="exact", engine="activations"))
        assert_scores_close(scores.values, taps.values, tolerances.EXACT)
        assert_scores_close(scores.stderr, taps.stderr, tolerances.EXACT)


@pytest.mark.parametrize("probes", [1, 3])
def test_engines_draw_the_same_cotangents(probes: int) -> None:
    b = built("residual")
    taps, samples = (
        tp.score(b.model, [b.inputs, b.inputs[:2]], b.graph, tp.TPV(probes=probes, seed=2, engine=engine))
        for engine in ("activations", "per_sample")
    )
    assert_scores_close(samples.values, taps.values, tolerances.EXACT)
    # One sample a batch: there is no product of different samples, and a row of either tally is a sample.
    ones = [x.unsqueeze(0) for x in b.inputs]
    graph = tp.weight_graph(b.model)
    whole, samples = (
        tp.score(b.model, ones, graph, tp.TPV(probes=probes, seed=2, engine=engine, perturbation=Uneven()))
        for engine in ("batched", "per_sample")
    )
    assert_scores_close(samples.values, whole.values, tolerances.EXACT)
    assert_scores_close(samples.stderr, whole.stderr, tolerances.EXACT)


@pytest.mark.parametrize("name", ["conv_bn", "residual", "groupnorm", "transposed", "layernorm_stream"])
def test_all_members_are_squared_layer_by_layer_by_every_engine(name: str) -> None:
    b = built(name)
    ones = [x.unsqueeze(0) for x in b.inputs]
    whole = tp.score(b.model, ones, b.graph, tp.TPV(probes="exact", over="all", engine="batched"))
    wanted = reference.tpv(b.model, b.inputs, b.graph, "softmax", "all")
    assert_scores_close(whole.values, wanted, tolerances.EXACT)


@pytest.mark.parametrize("size", [1, 50, 10**9])
def test_chunks_of_samples_make_no_difference(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net("sequences")
    graph, criterion = tp.weight_graph(model), tp.TPV(engine="per_sample", probes=2)
    whole = tp.score(model, [x], graph, criterion)
    monkeypatch.setattr(gradients, "CHUNK", size)
    chunks = tp.score(model, [x], graph, criterion)
    assert_scores_close(chunks.values, whole.values, tolerances.EXACT)
    assert_scores_close(chunks.stderr, whole.stderr, tolerances.EXACT)
    assert chunks.samples == len(x)


def worst(found: tp.Scores, exact: Mapping[str, Tensor]) -> float:
    """Largest distance from the truth, in standard errors; where one sample alone counts there is none."""
    errors = {n: found.stderr[n] + tolerances.EXACT * float(v.max()) for n, v in exact.items()}
    return max(float(((found.values[n] - v).abs() / errors[n]).max()) for n, v in exact.items())


UNBIASED = {
    "mlp, weights": ("mlp", lambda b: tp.weight_graph(b.model), "removal"),
    "mlp, blocks": ("mlp", lambda b: tp.weight_graph(b.model, (2, 2), ["0"]), "uneven"),
    "conv_bn, weights": ("conv_bn", lambda b: tp.weight_graph(b.model, (1, 1), ["conv2", "fc"]), "rounding"),
    "conv_bn, channels": ("conv_bn", lambda b: b.graph, "removal"),
    "grouped, channels": ("grouped", lambda b: b.graph, "uneven"),
    "vit, channels": ("vit", lambda b: b.graph, "isotropic"),
}


@pytest.mark.parametrize("probes", [1, "exact"])
@pytest.mark.parametrize("which", UNBIASED)
def test_the_square_of_a_batch_gradient_is_unbiased(which: str, probes: int | str) -> None:
    name, make, kind = UNBIASED[which]
    b, (perturbation, moments) = built(name), PERTURBATIONS[kind]
    graph = make(b)
    exact = reference.perturbed_tpv(b.model, b.inputs, graph, "softmax", moments)
    count = 100 if name == "vit" else 300
    criterion = tp.TPV(engine="batched", probes=probes, perturbation=perturbation, seed=1)
    found = tp.score(b.model, [b.inputs] * count, graph, criterion)
    assert found.samples == count * len(b.inputs)
    assert worst(found, exact) < tolerances.STDERRS
    assert all(float(found.stderr[n].max() / v.max()) < 0.5 for n, v in exact.items())
    # A row is a batch: one says nothing of its error.
    assert tp.score(b.model, [b.inputs], graph, criterion).stderr is None


@pytest.mark.parametrize("engine", ["batched", "per_sample"])
def test_estimates_spread_as_much_as_they_say(engine: str) -> None:
    b = built("mlp")
    graph = tp.weight_graph(b.model, (1, 1), ["2"])
    one = b.inputs[:1].expand(4, -1)  # one input many times over: the spread is that of the cotangents alone
    runs = [
        tp.score(b.model, [one] * 12, graph, tp.TPV(head="logits", probes=1, seed=seed, engine=engine))
        for seed in range(60)
    ]
    spread = torch.stack([run.values["2.weight"] for run in runs]).std(0)
    said = torch.stack([run.stderr["2.weight"] for run in runs]).square().mean(0).sqrt()
    assert float((spread / said).mean()) == pytest.approx(1, rel=tolerances.STATED_ERROR)


def factored_by_loops(model: nn.Module, x: Tensor, layer: str, head: str) -> Tensor:
    """`E[mean over positions of input^2] * E[sum over positions of output gradient^2]`, loop by loop."""
    module = model.get_submodule(layer)
    read = torch.zeros_like(module.weight)
    written = torch.zeros_like(module.weight)
    positions, inputs, outputs = 0, [], []

    def hook(m: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        inputs.append(args[0].detach())
        outputs.append(out)

    users = [m for m in model.modules() if getattr(m, "weight", None) is module.weight]
    handles = [m.register_forward_hook(hook) for m in users]
    output = model(x)
    for handle in handles:
        handle.remove()
    metric = reference.metric(output.detach(), head)
    values, vectors = torch.linalg.eigh(metric)
    for k in range(output.shape[1]):
        cotangent = vectors[:, :, k] * values[:, k : k + 1].clamp(min=0).sqrt()
        for grad in torch.autograd.grad(output, outputs, cotangent, retain_graph=True):
            axes = [0, *range(2, grad.ndim)] if isinstance(module, nn.Conv2d) else list(range(grad.ndim - 1))
            energy = grad.square().sum(axes)
            written += energy.reshape(-1, *(1,) * (module.weight.ndim - 1))
    for value in inputs:
        if isinstance(module, nn.Linear):
            rows = value.flatten(0, -2)
            positions += len(rows)
            read += rows.square().sum(0)
            continue
        (sh, sw), (ph, pw) = module.stride, module.padding
        padded = F.pad(value, (pw, pw, ph, ph))
        height, width = (
            (size - k) // s + 1 for size, k, s in zip(padded.shape[2:], module.kernel_size, module.stride, strict=True)
        )
        per_group = module.out_channels // module.groups
        for i in range(height):
            for j in range(width):
                window = padded[:, :, i * sh : i * sh + module.kernel_size[0], j * sw : j * sw + module.kernel_size[1]]
                for o in range(module.out_channels):
                    start = (o // per_group) * module.weight.shape[1]
                    read[o] += window[:, start : start + module.weight.shape[1]].square().sum(0)
        positions += height * width * len(x)
    return (read / positions * written / len(x)).detach().flatten()


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "grouped", "depthwise", "layernorm_stream", "shared"])
@pytest.mark.parametrize("which", ["removal", "uneven"])
def test_factored_scores_are_products_of_two_moments(name: str, which: str) -> None:
    (model, x), (perturbation, moments) = net(name), PERTURBATIONS[which]
    graph = tp.weight_graph(model)
    criterion = tp.TPV(engine="factored", probes="exact", perturbation=perturbation)
    scores = tp.score(model, [x], graph, criterion)
    weights = {n: p.detach() for n, p in model.named_parameters()}
    wanted = {}
    for group in graph.groups:
        mean, variance = (m.flatten() for m in moments(group.id, weights[group.id]))
        wanted[group.id] = factored_by_loops(model, x, group.members[0].layer, "softmax") * (mean**2 + variance)
    assert_scores_close(scores.values, wanted, tolerances.EXACT)
    assert scores.stderr is None
    parts = tp.score(model, [x[:1], x[1:]], graph, criterion)
    assert_scores_close(parts.values, scores.values, tolerances.EXACT)


class Affine(nn.Module):
    """Linear throughout, so that output gradients are the same for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_factored_scores_are_exact_where_inputs_and_gradients_are_independent() -> None:
    model, x = randomise(Affine()), example(40, 5)
    graph = tp.weight_graph(model)
    factored, exact = (
        tp.score(model, [x], graph, tp.TPV(head="logits", probes="exact", engine=engine))
        for engine in ("factored", "per_sample")
    )
    assert_scores_close(factored.values, exact.values, tolerances.EXACT)
    # Softmax gradients depend on the input, and the approximation shows.
    factored, exact = (
        tp.score(model, [x], graph, tp.TPV(probes="exact", engine=engine)) for engine in ("factored", "per_sample")
    )
    assert any(float((factored.values[n] / v - 1).abs().max()) > 0.01 for n, v in exact.values.items())


def test_factored_probes_estimate_the_exact_factors(mlp) -> None:
    graph = tp.weight_graph(mlp.model)
    exact = tp.score(mlp.model, [mlp.inputs], graph, tp.TPV(engine="factored", probes="exact"))
    found = tp.score(mlp.model, [mlp.inputs], graph, tp.TPV(engine="factored", probes=4000))
    for name, value in exact.values.items():
        torch.testing.assert_close(found.values[name], value, rtol=0.15, atol=0)


def test_factored_is_refused_where_it_has_no_meaning(mlp) -> None:
    criterion = tp.TPV(engine="factored")
    grouped = built("grouped")
    for b, graph, match in (
        (mlp, mlp.graph, "give a graph from weight_graph"),
        (grouped, grouped.graph, "scores single weights"),
        (mlp, tp.weight_graph(mlp.model, (1, 2), ["0"]), r"take blocks of \(1, 1\), or engine='batched'"),
    ):
        with pytest.raises(tp.InputError, match=match):
            tp.score(b.model, [b.inputs], graph, criterion)


@pytest.mark.parametrize("engine", ["per_sample", "factored"])
def test_layers_that_are_not_known_are_refused(engine: str) -> None:
    b = built("transposed")
    with pytest.raises(tp.ModelError, match=r"'widen' is a ConvTranspose1d.*engine='batched'"):
        tp.score(b.model, [b.inputs], tp.weight_graph(b.model), tp.TPV(engine=engine))
    found = tp.score(b.model, [b.inputs[:1]], tp.weight_graph(b.model), tp.TPV(probes="exact"))
    wanted = reference.perturbed_tpv(b.model, b.inputs[:1], tp.weight_graph(b.model), "softmax")
    assert_scores_close(found.values, wanted, tolerances.EXACT)


def test_members_that_are_no_layer_weights_are_refused_per_sample() -> None:
    b = built("vit")
    with pytest.raises(tp.ModelError, match="is no layer's weight; use engine='batched'"):
        tp.score(b.model, [b.inputs], b.graph, tp.TPV(engine="per_sample", over="all"))


class Bypassed(nn.Module):
    """Multiplies with a layer's weight without calling the layer, in a way that only a trace sees."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).tanh() @ self.last.weight.t() + self.last.bias


@pytest.mark.parametrize("engine", ["per_sample", "factored"])
def test_a_layer_that_is_not_called_is_told_not_guessed(engine: str) -> None:
    model, x = randomise(Bypassed()), example(1, 4)
    graph = tp.weight_graph(model)
    with pytest.raises(tp.ModelError, match="does not call 'last'; leave it out, or use engine='batched'"):
        tp.score(model, [x], graph, tp.TPV(engine=engine))
    found = tp.score(model, [x], graph, tp.TPV(engine="batched", probes="exact"))
    assert_scores_close(found.values, reference.perturbed_tpv(model, x, graph, "softmax"), tolerances.EXACT)


def test_tied_embeddings_are_refused_per_sample() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.embed = nn.Linear(5, 7, bias=False), nn.Embedding(7, 5)
            self.embed.weight = self.fc.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.fc(self.embed(tokens).mean(1))

    model, x = randomise(Tied()), torch.tensor([[1, 3, 3]])
    graph = tp.weight_graph(model)
    with pytest.raises(tp.ModelError, match="shares its weight with one"):
        tp.score(model, [x], graph, tp.TPV(engine="per_sample"))
    found = tp.score(model, [x], graph, tp.TPV(probes="exact"))
    assert_scores_close(found.values, reference.perturbed_tpv(model, x, graph, "softmax"), tolerances.EXACT)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"engine": "activations"}, "scores the removal of channels and heads; use engine='batched'"),
        ({"engine": "fast"}, "engine='fast' must be one of"),
        ({"engine": "batched", "sensitivities": 5}, "sensitivities are kept for"),
        ({"sensitivities": 5}, "for the removal of channels and heads"),
    ],
)
def test_engines_that_do_not_fit_are_refused(mlp, kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(tp.InputError, match=match):
        tp.score(mlp.model, [mlp.inputs], tp.weight_graph(mlp.model), tp.TPV(**kwargs))
    with pytest.raises(tp.InputError, match="use engine='batched'"):
        tp.score(mlp.model, [mlp.inputs], mlp.graph, tp.TPV(engine="activations", perturbation="rounding"))


def test_weights_out_of_reach_are_told(mlp) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp.model

        def forward(self, x: Tensor) -> Tensor:
            return torch.ones_like(self.inner(x)).detach()

    model = Constant()
    for engine in ("batched", "per_sample", "factored"):
        with pytest.raises(tp.ModelError, match="no weight of the graph is on the way"):
            tp.score(model, [mlp.inputs], tp.weight_graph(model), tp.TPV(engine=engine))


def test_auto_takes_the_engine_that_fits(mlp) -> None:
    graph = tp.weight_graph(mlp.model)
    for given, auto, named in ((graph, "removal", "batched"), (mlp.graph, "rounding", "batched")):
        one, other = (
            tp.score(mlp.model, [mlp.inputs], given, tp.TPV(perturbation=auto, engine=engine, sensitivities=0))
            for engine in ("auto", named)
        )
        assert_scores_close(one.values, other.values, 0)
    assert tp.TPV(perturbation="rounding", engine="batched").label == (
        "tpv(head=softmax, over=consume, perturbation=rounding, engine=batched)"
    )


def test_float32_scores_are_those_of_float64(mlp) -> None:
    model, graph = copy.deepcopy(mlp.model).float(), tp.weight_graph(mlp.model)
    for engine in ("batched", "per_sample", "factored"):
        criterion = tp.TPV(probes="exact", engine=engine, perturbation=Uneven())
        wide = tp.score(mlp.model, [mlp.inputs], graph, criterion)
        narrow = tp.score(model, [mlp.inputs.float()], graph, criterion)
        assert all(v.dtype == torch.float32 for v in narrow.values.values())
        assert_scores_close({n: v.double() for n, v in narrow.values.items()}, wide.values, 1e-4)


def test_rounding_scores_predict_what_rounding_does(mlp) -> None:
    # All weights rounded at once: first-order effects of independent errors add up.
    model, bits, draws = mlp.model, 10, 300
    graph = tp.weight_graph(model)
    criterion = tp.TPV(head="logits", probes="exact", engine="per_sample", perturbation=tp.Rounding(bits))
    predicted = sum(float(v.sum()) for v in tp.score(model, [mlp.inputs], graph, criterion).values.values())
    generator, moved = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        fixed = model(mlp.inputs)
        for _ in range(draws):
            noisy = copy.deepcopy(model)
            for group in graph.groups:
                weight = noisy.get_parameter(group.id)
                step = (weight.max() - weight.min()) / (2**bits - 1)
                weight += step * (torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 0.5)
            moved.append((noisy(mlp.inputs) - fixed).square().sum(1).mean())
    measured = torch.stack(moved)
    assert abs(float(measured.mean()) - predicted) < tolerances.STDERRS * float(measured.std()) / math.sqrt(draws)
