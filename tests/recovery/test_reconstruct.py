"""The closed form against an independent least-squares solution, layer by layer."""

from __future__ import annotations

import copy
import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import randomise
from tests.helpers import NAMES, assert_same_state, built, gap, outputs, plan_without, random_gone
from tests.reference import ridge_refit

RIDGES = (0.0, 1e-2, 0.5)


def data(*shape: int, batches: int = 3, seed: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Not centred: a refit that forgets the mean is found out.
    return [torch.randn(shape, generator=generator, dtype=torch.float64) + 0.7 for _ in range(batches)]


def cut(model: nn.Module, inputs: Tensor, gone: dict[str, list[int]]) -> nn.Module:
    return tp.apply(model, plan_without(tp.trace(model, inputs), gone))


def patches(layer: nn.Conv2d | nn.Conv1d, x: Tensor) -> np.ndarray:
    """`(groups, rows, inputs)`: what each output position reads, gathered one position at a time."""
    flat = x.unsqueeze(2) if x.ndim == 3 else x
    pair = (lambda v: v if len(v) == 2 else (1, *v)) if x.ndim == 3 else (lambda v: v)
    (kh, kw), (sh, sw), (dh, dw) = pair(layer.kernel_size), pair(layer.stride), pair(layer.dilation)
    ph, pw = (0, *layer.padding) if x.ndim == 3 else layer.padding
    array = np.pad(flat.numpy(), ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    rows = []
    for image in array:
        for top in range(0, image.shape[1] - dh * (kh - 1), sh):
            for left in range(0, image.shape[2] - dw * (kw - 1), sw):
                rows.append(image[:, top : top + dh * kh : dh, left : left + dw * kw : dw])
    stacked = np.stack(rows).reshape(len(rows), layer.groups, -1)
    return stacked.transpose(1, 0, 2)


def refit_conv(
    layer: nn.Module, batches: list[Tensor], wanted: list[Tensor], ridge: float, free_bias: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Group by group, the weights `(out, in, *kernel)` and the bias (or the shift, where there is no bias)."""
    x = np.concatenate([patches(layer, b) for b in batches], 1)
    y = np.concatenate([w.flatten(2).transpose(1, 2).reshape(-1, w.shape[1]).numpy() for w in wanted])
    weight = layer.weight.detach().flatten(1).numpy()
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    per = len(weight) // layer.groups
    found = []
    for g in range(layer.groups):
        rows = slice(g * per, (g + 1) * per)
        found.append(
            ridge_refit(x[g], y[:, rows], weight[rows], None if bias is None else bias[rows], ridge, free_bias)
        )
    return np.concatenate([f[0] for f in found]).reshape(layer.weight.shape), np.concatenate([f[1] for f in found])


def close(got: Tensor, wanted: np.ndarray) -> None:
    wanted = torch.from_numpy(np.asarray(wanted))
    torch.testing.assert_close(got.detach(), wanted, rtol=0, atol=tolerances.SOLVE * float(wanted.abs().max()))


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_solves_its_ridge_problem(ridge: float, bias: bool) -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4, bias=bias)))
    batches = data(30, 5)
    small = cut(model, batches[0], {"0": [1, 4, 6]})
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=ridge))
    x = np.concatenate([outputs(small[:2], b).numpy() for b in batches])
    y = np.concatenate([outputs(model, b).numpy() for b in batches])
    old = None if not bias else small[2].bias.detach().numpy()
    weight, shift = ridge_refit(x, y, small[2].weight.detach().numpy(), old, ridge, bias)
    close(found[2].weight, weight)
    if bias:
        close(found[2].bias, shift)
    assert gap(found[2].weight, small[2].weight) > 1e-3
    assert_same_state(found[0].state_dict(), small[0].state_dict())


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": (1, 0)},
    "dilated": {"kernel_size": (3, 2), "dilation": (1, 2), "padding": 2, "stride": (2, 1)},
    "pointwise": {"kernel_size": 1},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
}


class Convs(nn.Module):
    def __init__(self, norm: bool, **kwargs: object) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 6, bias=not norm, **kwargs)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.fc = nn.Linear(6, 4)

    def read(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.norm(self.conv(self.read(x)))).mean((2, 3)))


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("norm", [False, True], ids=["bias", "batchnorm"])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_solves_its_ridge_problem(kind: str, norm: bool, ridge: float) -> None:
    model = randomise(Convs(norm, **CONVOLUTIONS[kind]))
    batches = data(6, 3, 8, 7)
    small = cut(model, batches[0], {"first": [0, 2]})
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=ridge))
    with torch.no_grad():
        seen = [small.read(b) for b in batches]
        wanted = [model.conv(model.read(b)) for b in batches]
    weight, bias = refit_conv(small.conv, seen, wanted, ridge, free_bias=True)
    close(found.conv.weight, weight)
    if norm:
        # A convolution without a bias hands its shift to the mean that is subtracted next.
        assert found.conv.bias is None
        close(small.norm.running_mean - found.norm.running_mean, bias)
        assert torch.equal(found.norm.running_var, small.norm.running_var)
    else:
        close(found.conv.bias, bias)
    assert_same_state(found.fc.state_dict(), small.fc.state_dict())


def test_a_one_dimensional_convolution_solves_its_ridge_problem() -> None:
    model = randomise(
        nn.Sequential(nn.Conv1d(3, 6, 2), nn.ReLU(), nn.Conv1d(6, 5, 3, 2, 1), nn.Flatten(), nn.Linear(20, 2))
    )
    batches = data(12, 3, 9)
    small = cut(model, batches[0], {"0": [1, 2]})
    found = tp.reconstruct(small, batches, model)
    seen, wanted = [outputs(small[:2], b) for b in batches], [outputs(model[:3], b) for b in batches]
    weight, bias = refit_conv(small[2], seen, wanted, tp.Reconstruct().ridge, free_bias=True)
    close(found[2].weight, weight)
    close(found[2].bias, bias)


def test_layers_are_refitted_in_turn_on_refitted_inputs() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 4)))
    batches = data(40, 5)
    gone = {"0": [1, 4, 6], "2": [0, 3, 8]}
    small = cut(model, batches[0], gone)
    ridge = 0.1
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=ridge))
    x = torch.cat(batches)
    kept = [i for i in range(9) if i not in gone["2"]]
    first = ridge_refit(
        outputs(small[:2], x).numpy(), outputs(model[:3], x)[:, kept].numpy(),
        small[2].weight.detach().numpy(), small[2].bias.detach().numpy(), ridge, True,
    )  # fmt: skip
    close(found[2].weight, first[0])
    close(found[2].bias, first[1])
    inner = np.tanh(outputs(small[:2], x).numpy() @ first[0].T + first[1])
    second = ridge_refit(
        inner, outputs(model, x).numpy(), small[4].weight.detach().numpy(), small[4].bias.detach().numpy(), ridge, True
    )
    close(found[4].weight, second[0])
    close(found[4].bias, second[1])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_channel_that_the_kept_ones_span_is_recovered_exactly(kind: str) -> None:
    if kind == "linear":
        model = randomise(nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 4)))
        batches = data(50, 6)
    else:
        model = randomise(
            nn.Sequential(nn.Conv2d(3, 5, 3), nn.Identity(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(36, 2))
        )
        batches = data(20, 3, 7, 7)
    with torch.no_grad():
        model[0].weight[4] = 2 * model[0].weight[0] - model[0].weight[1]
        model[0].bias[4] = 2 * model[0].bias[0] - model[0].bias[1] + 3
    small = cut(model, batches[0], {"0": [4]})
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=0))
    fresh = data(*batches[0].shape, batches=1, seed=99)[0]
    assert gap(outputs(small, fresh), outputs(model, fresh)) > tolerances.OTHER_FUNCTION
    assert gap(outputs(found, fresh), outputs(model, fresh)) < tolerances.UNDAMPED


@pytest.mark.parametrize("name", [n for n in NAMES if n != "shared"])
def test_outputs_come_closer_on_every_case(name: str) -> None:
    b = built(name)
    batches = [
        torch.randn(24, *b.inputs.shape[1:], generator=torch.Generator().manual_seed(s)).double() for s in (1, 2)
    ]
    small = tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 1, 0.4)))
    found = tp.reconstruct(small, batches, b.model)
    x = torch.cat(batches)
    before, after = (float((outputs(m, x) - outputs(b.model, x)).square().mean()) for m in (small, found))
    assert after < 0.8 * before


@pytest.mark.parametrize("name", ["residual", "vit", "shared"])
def test_models_given_are_untouched_and_no_thread_stays(name: str) -> None:
    b = built(name)
    teacher = copy.deepcopy(b.model).train()
    small = tp.apply(teacher, plan_without(b.graph, random_gone(b.graph, 1)))
    states = [copy.deepcopy(m.state_dict()) for m in (teacher, small)]
    threads, rng = threading.enumerate(), torch.get_rng_state()
    found = tp.reconstruct(small, [b.inputs], teacher)
    assert threading.enumerate() == threads
    assert torch.equal(torch.get_rng_state(), rng)
    for model, state in zip((teacher, small), states, strict=True):
        assert_same_state(model.state_dict(), state)
        assert all(m.training for m in model.modules())
    for model in (teacher, small, found):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in found.modules())


class Fails(Exception):
    pass


@pytest.mark.parametrize("who", ["teacher", "model"])
def test_no_thread_or_hook_stays_when_a_model_raises_in_the_middle(who: str) -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 4)))
    batches = data(10, 5)
    small = cut(model, batches[0], {"0": [1], "2": [0]})
    states = [copy.deepcopy(m.state_dict()) for m in (model, small)]
    passes = []

    def fail(*_: object) -> None:
        # Each network may be run once before, to see the way that a pass takes.
        passes.append(None)
        if len(passes) > 1:
            raise Fails

    handle = (model if who == "teacher" else small)[3].register_forward_hook(fail)
    threads = threading.enumerate()
    with pytest.raises(Fails):
        tp.reconstruct(small, batches, model)
    handle.remove()
    assert threading.enumerate() == threads
    for m, state in zip((model, small), states, strict=True):
        assert_same_state(m.state_dict(), state)
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in m.modules())
        assert not m.training


class Twins(nn.Module):
    """One encoder for both halves of the input, as siamese networks have it; its layers write into what they read."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 6, 3, padding=1, bias=not norm)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.fc = nn.Linear(12, 4)

    def encode(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.first(x).relu_())).relu_().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.cat([self.encode(half) for half in x.chunk(2, -1)], 1))


@pytest.mark.parametrize("norm", [False, True], ids=["bias", "batchnorm"])
def test_a_layer_that_runs_twice_solves_the_ridge_problem_of_both_times(norm: bool) -> None:
    model = randomise(Twins(norm))
    batches = data(6, 3, 7, 12)
    small = cut(model, batches[0], {"first": [0, 2], "conv": [1]})
    found = tp.reconstruct(small, batches, model)
    halves = [half for batch in batches for half in batch.chunk(2, -1)]
    with torch.no_grad():
        seen = [small.first(half).relu_() for half in halves]
        wanted = [model.conv(model.first(half).relu_())[:, [0, 2, 3, 4, 5]] for half in halves]
    weight, bias = refit_conv(small.conv, seen, wanted, tp.Reconstruct().ridge, free_bias=True)
    close(found.conv.weight, weight)
    close(small.norm.running_mean - found.norm.running_mean if norm else found.conv.bias, bias)
    # What runs once is refitted behind it, on what it gives then.
    with torch.no_grad():
        seen = [torch.cat([found.encode(half) for half in batch.chunk(2, -1)], 1) for batch in batches]
    weight, bias = refit_linear(small.fc, seen, [outputs(model, batch) for batch in batches])
    close(found.fc.weight, weight)
    close(found.fc.bias, bias)


def refit_linear(layer: nn.Linear, seen: list[Tensor], wanted: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.concatenate([part.numpy() for part in parts]) for parts in (seen, wanted))
    old = layer.bias.detach().numpy()
    return ridge_refit(x, y, layer.weight.detach().numpy(), old, tp.Reconstruct().ridge, True)


def test_a_layer_that_reads_what_it_gave_is_refitted_to_both() -> None:
    b = built("shared")
    small = tp.apply(b.model, plan_without(b.graph, {"back": [0, 2]}))
    found = tp.reconstruct(small, [b.inputs], b.model)
    with torch.no_grad():
        x = small.tied2(small.tied1(small.embed(b.inputs)).tanh()).tanh()
        x = found.back(small.middle(x).tanh()).tanh()
        seen = [x, small.twice(x).tanh()]
        dense = b.model
        y = dense.tied2(dense.tied1(dense.embed(b.inputs)).tanh()).tanh()
        first = dense.twice(dense.back(dense.middle(y).tanh()).tanh())
        wanted = [first, dense.twice(first.tanh())]
    kept = [1, 3, 4, 5, 6]
    weight, bias = refit_linear(small.twice, seen, [w[:, kept] for w in wanted])
    close(found.twice.weight, weight)
    close(found.twice.bias, bias)


@pytest.mark.parametrize("settings", [{}, {"inputs": "dense"}], ids=str)
def test_layers_that_are_called_by_keyword_are_refitted(settings: dict[str, str]) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

        def read(self, x: Tensor) -> Tensor:
            return self.first(input=x).tanh()

        def forward(self, x: Tensor) -> Tensor:
            x = self.read(x)
            return self.last(input=(self.again(input=x) + self.again(input=x * x)).tanh())

    model = randomise(Keywords())
    batches = data(30, 5)
    small = cut(model, batches[0], {"first": [1, 4, 6]})
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(**settings))
    with torch.no_grad():
        reads = [(small if not settings else model).read(b) for b in batches]
        if settings:
            reads = [r[:, [0, 2, 3, 5, 7]] for r in reads]
        dense = [model.read(b) for b in batches]
        wanted = [model.again(y) for x in dense for y in (x, x * x)]
    seen = [y for x in reads for y in (x, x * x)]
    close(found.again.weight, refit_linear(small.again, seen, wanted)[0])
    tp.refine(found, batches, model, tp.GaussNewton(steps=1, iterations=1))
    tp.fold_means(small, batches, model)


def test_a_norm_that_serves_others_too_is_not_moved() -> None:
    class OneNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1, bias=False)
            self.b, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            return (self.norm(self.a(self.first(x).relu())) + self.norm(self.b(x))).relu().mean((2, 3))

    model = randomise(OneNorm())
    batches = data(6, 3, 4, 4)
    small = cut(model, batches[0], {"first": [0, 2]})
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(sums=False))
    assert_same_state(found.norm.state_dict(), small.norm.state_dict())
    with torch.no_grad():
        seen = [small.first(b).relu() for b in batches]
        wanted = [model.a(model.first(b).relu()) for b in batches]
    close(found.a.weight, refit_conv(small.a, seen, wanted, tp.Reconstruct().ridge, free_bias=False)[0])


def test_a_weight_that_several_layers_hold_stays() -> None:
    layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    model = randomise(nn.Sequential(*layers))
    model[5].weight = model[4].weight
    small = cut(model, data(30, 5)[0], {"0": [1, 4]})
    found = tp.reconstruct(small, data(30, 5), model, tp.Reconstruct(every=True))
    assert torch.equal(found[4].weight, small[4].weight)
    assert found[4].weight is found[5].weight
    assert gap(found[6].weight, small[6].weight) > 1e-6


def test_without_pruned_units_nothing_is_refitted(conv_bn) -> None:
    whole = tp.apply(conv_bn.model, tp.Plan({}, conv_bn.graph))
    found = tp.reconstruct(whole, [conv_bn.inputs], conv_bn.model)
    assert_same_state(found.state_dict(), conv_bn.model.state_dict())


def test_a_huge_ridge_keeps_the_weights(mlp) -> None:
    small = tp.apply(mlp.model, plan_without(mlp.graph, {"0": [1, 2]}))
    found = tp.reconstruct(small, [mlp.inputs], mlp.model, tp.Reconstruct(ridge=1e12))
    assert gap(found[2].weight, small[2].weight) < 1e-9


def test_fewer_rows_than_inputs_and_dead_inputs_are_safe() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4)))
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0, -1
    small = cut(model, data(2, 5)[0], {"0": [0, 1]})
    found = tp.reconstruct(small, data(3, 5, batches=1), model, tp.Reconstruct(ridge=0))
    assert all(bool(torch.isfinite(p).all()) for p in found.parameters())


def test_the_refitted_model_carries_its_plan_and_is_the_same_whatever_the_batches(residual) -> None:
    small = tp.apply(residual.model, plan_without(residual.graph, random_gone(residual.graph, 1)))
    whole = tp.reconstruct(small, [residual.inputs], residual.model)
    split = tp.reconstruct(small, [residual.inputs[:1], residual.inputs[1:]], residual.model)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerances.SOLVE)
    assert tp.reconstruct(whole, [residual.inputs], residual.model) is not whole


def test_progress_counts_layers(residual) -> None:
    small = tp.apply(residual.model, plan_without(residual.graph, random_gone(residual.graph, 1)))
    told: list[tuple[str, int, int | None]] = []
    tp.reconstruct(small, [residual.inputs], residual.model, progress=lambda *what: told.append(what))
    assert told == [("reconstruct", n, 6) for n in range(1, 7)]


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf")])
def test_a_ridge_out_of_range_is_refused(ridge: float) -> None:
    with pytest.raises(tp.InputError, match="ridge="):
        tp.Reconstruct(ridge=ridge)


def test_models_that_do_not_belong_together_are_refused(mlp, conv_bn) -> None:
    with pytest.raises(tp.PlanError, match="carries no plan"):
        tp.reconstruct(mlp.model, [mlp.inputs], mlp.model)
    small = tp.apply(mlp.model, plan_without(mlp.graph, {"0": [1]}))
    with pytest.raises(tp.PlanError, match=r"'0.weight' is None there"):
        tp.reconstruct(small, [mlp.inputs], conv_bn.model)
    with pytest.raises(tp.DataError, match="there is no batch"):
        tp.reconstruct(small, [], mlp.model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [4, 100])  # fewer than a layer has inputs, and more
@pytest.mark.parametrize("settings", [tp.Reconstruct(), tp.Reconstruct(ridge="auto"), tp.Reconstruct(inputs="dense")])
def test_what_is_not_finite_is_told_with_the_layer(settings: tp.Reconstruct, rows: int, bad: float) -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)))
    batches = data(rows, 5)
    small = cut(model, batches[0], {"0": [1, 4], "2": [3]})
    batches[-1][1, 2] = bad
    if math.isinf(bad):  # which tanh would take
        batches[-1][1, 2], model[2].weight.data[0, 0] = 1.0, bad
    with pytest.raises(tp.NonFiniteError, match="layer '2' is given NaN or infinity"):
        tp.reconstruct(small, batches, model, settings)
    with pytest.raises(tp.NonFiniteError, match="layer '2' is given"):
        tp.fold_means(small, batches, model)


def test_batches_of_another_type_are_told() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)))
    small = cut(model, data(9, 5)[0], {"0": [1, 4]})
    for recover in (tp.reconstruct, tp.fold_means):
        with pytest.raises(tp.ModelError, match=r"Sequential does not run on an example of shape .*; check .* dtype"):
            recover(small, [batch.float() for batch in data(9, 5)], model)
