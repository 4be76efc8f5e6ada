"""What the closed form can be asked for beside its defaults: each against a solution of its own."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import randomise
from tests.helpers import NAMES, built, gap, outputs, plan_without, random_gone
from tests.recovery.test_reconstruct import Convs, close, cut, data, refit_conv
from tests.reference import ridge_refit
from tpvprune.recovery.fits import RIDGES


def chain(width: int = 8) -> nn.Sequential:
    return randomise(nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, 4)))


def by_halves(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
    """The ridge that does best on the samples, even or odd, that were not fitted."""
    left = {}
    for ridge in RIDGES:
        left[ridge] = 0.0
        for fitted, held in ((0, 1), (1, 0)):
            w, b = ridge_refit(x[fitted::2], y[fitted::2], weight, bias, ridge, True)
            left[ridge] += float(((y[held::2] - x[held::2] @ w.T - b) ** 2).sum(1).mean())
    return min(left, key=lambda r: left[r])


@pytest.mark.parametrize(("rows", "noise"), [(10, 1.0), (24, 1.0), (400, 0.0)])
def test_the_ridge_is_the_one_that_does_best_on_the_other_half(rows: int, noise: float) -> None:
    model = chain(24)
    generator = torch.Generator().manual_seed(4)
    batches = list(torch.randn(rows, 5, generator=generator, dtype=torch.float64).split(7))
    small = cut(model, batches[0], {"0": list(range(6)), "2": [1]})
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge="auto"))
    x, y = outputs(small[:2], torch.cat(batches)), outputs(model[:3], torch.cat(batches))
    y = y[:, [0, *range(2, 9)]]
    weight, bias = small[2].weight.detach().numpy(), small[2].bias.detach().numpy()
    ridge = by_halves(x.numpy(), y.numpy(), weight, bias)
    wanted = ridge_refit(x.numpy(), y.numpy(), weight, bias, ridge, True)
    close(found[2].weight, wanted[0])
    close(found[2].bias, wanted[1])
    others = [ridge_refit(x.numpy(), y.numpy(), weight, bias, r, True)[0] for r in RIDGES if r != ridge]
    assert min(float(np.abs(other - wanted[0]).max()) for other in others) > 1e-4


def test_different_data_choose_different_ridges() -> None:
    # Otherwise the test above could not tell a choice from a constant.
    found = set()
    for rows in (10, 400):
        model, generator = chain(24), torch.Generator().manual_seed(4)
        x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        small = cut(model, x, {"0": list(range(6))})
        a, b = outputs(small[:2], x).numpy(), outputs(model[:3], x).numpy()
        found.add(by_halves(a, b, small[2].weight.detach().numpy(), small[2].bias.detach().numpy()))
    assert len(found) == 2


def test_the_choice_does_not_depend_on_the_batches(residual) -> None:
    small = tp.apply(residual.model, plan_without(residual.graph, random_gone(residual.graph, 1)))
    whole, split = (
        tp.reconstruct(small, list(residual.inputs.split(size)), residual.model, tp.Reconstruct(ridge="auto"))
        for size in (len(residual.inputs), 1)
    )
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerances.SOLVE)


def test_a_single_sample_is_enough_to_choose_by() -> None:
    model = chain()
    small = cut(model, data(2, 5)[0], {"0": [0, 1]})
    found = tp.reconstruct(small, data(1, 5, batches=1), model, tp.Reconstruct(ridge="auto"))
    assert all(bool(torch.isfinite(p).all()) for p in found.parameters())


def test_on_dense_inputs_every_layer_is_fitted_to_what_the_dense_model_reads() -> None:
    model, batches, ridge = chain(), data(40, 5), 0.1
    gone = {"0": [1, 4, 6], "2": [0, 3, 8]}
    small = cut(model, batches[0], gone)
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=ridge, inputs="dense"))
    x = torch.cat(batches)
    for layer, before in ((2, "0"), (4, "2")):
        kept = [i for i in range(model[layer].in_features) if i not in gone[before]]
        rows = [i for i in range(model[layer].out_features) if i not in gone.get(str(layer), [])]
        old = small[layer].weight.detach().numpy(), small[layer].bias.detach().numpy()
        read, wanted = outputs(model[:layer], x)[:, kept], outputs(model[: layer + 1], x)[:, rows]
        weight, bias = ridge_refit(read.numpy(), wanted.numpy(), *old, ridge, True)
        close(found[layer].weight, weight)
        close(found[layer].bias, bias)


@pytest.mark.parametrize("kind", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "padding": 1, "groups": 2}])
def test_on_dense_inputs_a_convolution_reads_the_channels_that_are_left(kind: dict[str, Any]) -> None:
    model = randomise(Convs(True, **kind))
    batches = data(6, 3, 8, 7)
    gone = [0, 2] if "groups" not in kind else [1]
    plan = plan_without(tp.trace(model, batches[0]), {"first": gone})
    small = tp.apply(model, plan)
    lost = sorted(set(range(8)) - {int(i) for i in plan.kept_entries("first.weight", 0)})
    kept = [i for i in range(8) if i not in lost]
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=0.1, inputs="dense"))
    with torch.no_grad():
        read = [model.read(b) for b in batches]
        wanted = [model.conv(r) for r in read]
    weight, shift = refit_conv(small.conv, [r[:, kept] for r in read], wanted, 0.1, free_bias=True)
    close(found.conv.weight, weight)
    close(small.norm.running_mean - found.norm.running_mean, shift)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "shared"])
@pytest.mark.parametrize(
    "settings", [{"inputs": "dense"}, {"sums": False}, {"every": True}, {"ridge": "auto"}], ids=str
)
def test_outputs_come_closer_on_every_case(name: str, settings: dict[str, Any]) -> None:
    b = built(name)
    x = torch.randn(48, *b.inputs.shape[1:], generator=torch.Generator().manual_seed(1)).double()
    small = tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 1, 0.4)))
    found = tp.reconstruct(small, [x[:20], x[20:]], b.model, tp.Reconstruct(**settings))
    before, after = (float((outputs(m, x) - outputs(b.model, x)).square().mean()) for m in (small, found))
    assert after < 0.9 * before


class Stream(nn.Module):
    """A residual block whose sum is written in one of the ways that people write it."""

    def __init__(self, way: str, norm: bool) -> None:
        super().__init__()
        self.way = way
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv1, self.conv2 = nn.Conv2d(8, 6, 3, 1, 1), nn.Conv2d(6, 8, 3, 1, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 4)

    def stream(self, x: Tensor) -> Tensor:
        return torch.tanh(self.stem(x))

    def inner(self, s: Tensor) -> Tensor:
        return torch.relu(self.conv1(s))

    def forward(self, x: Tensor) -> Tensor:
        s = self.stream(x)
        y = self.drop(self.norm(self.conv2(self.inner(s))))
        if self.way == "other first":
            y = s + y
        elif self.way == "in place":
            y += s
        else:
            y = torch.add(y, s)
        return self.fc(torch.relu(y).mean((2, 3)))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("way", ["other first", "in place", "function"])
def test_a_sum_is_what_a_layer_in_front_of_it_aims_at(way: str, norm: bool) -> None:
    model = randomise(Stream(way, norm))
    batches, ridge = data(7, 3, 6, 5), 0.05
    # The stem's weights are masked, so that the stream itself is off by something that is not refitted away.
    small = cut(model, batches[0], {"conv1": [1, 4]})
    with torch.no_grad():
        small.stem.weight += 0.1 * torch.randn(8, 3, 1, 1, generator=torch.Generator().manual_seed(3)).double()
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=ridge, sums=True))
    plain = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=ridge, sums=False))
    with torch.no_grad():
        gain = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt() if norm else torch.ones(8)
        seen = [small.inner(small.stream(b)) for b in batches]
        wanted = [
            model.conv2(model.inner(model.stream(b))) + (model.stream(b) - small.stream(b)) / gain.reshape(-1, 1, 1)
            for b in batches
        ]
    weight, bias = refit_conv(small.conv2, seen, wanted, ridge, free_bias=True)
    close(found.conv2.weight, weight)
    if norm:
        close(small.norm.running_mean - found.norm.running_mean, bias)
    else:
        close(found.conv2.bias, bias)
    assert gap(found.conv2.weight, plain.conv2.weight) > 1e-3


def test_a_shortcut_that_is_made_later_aims_at_the_sum_and_the_branch_before_it_does_not() -> None:
    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.branch, self.shortcut = nn.Conv2d(8, 6, 3, 2, 1), nn.Conv2d(8, 6, 1, 2)
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            s = torch.tanh(self.stem(x))
            return self.fc((self.branch(s) + self.shortcut(s)).relu().mean((2, 3)))

    model = randomise(Down())
    batches = data(7, 3, 6, 5)
    small = cut(model, batches[0], {"stem": [0, 1, 5]})
    summed, plain = (tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=0.05, sums=s)) for s in (True, False))
    assert torch.equal(summed.branch.weight, plain.branch.weight)
    with torch.no_grad():
        read = [torch.tanh(small.stem(b)) for b in batches]
        dense = [torch.tanh(model.stem(b)) for b in batches]
        wanted = [model.shortcut(d) + model.branch(d) - plain.branch(r) for d, r in zip(dense, read, strict=True)]
    weight, bias = refit_conv(small.shortcut, read, wanted, 0.05, free_bias=True)
    close(summed.shortcut.weight, weight)
    close(summed.shortcut.bias, bias)


def test_a_channel_that_its_norm_scales_to_nothing_is_not_asked_for_anything() -> None:
    model = randomise(Stream("function", norm=True))
    with torch.no_grad():
        model.norm.weight[3] = 1e-12
    batches = data(7, 3, 6, 5)
    small = cut(model, batches[0], {"conv1": [1, 4]})
    with torch.no_grad():
        small.stem.weight += 0.1
    summed, plain = (tp.reconstruct(small, batches, model, tp.Reconstruct(sums=s)) for s in (True, False))
    assert torch.equal(summed.conv2.weight[3], plain.conv2.weight[3])
    assert gap(summed.conv2.weight[2], plain.conv2.weight[2]) > 1e-4


def test_every_layer_behind_the_first_that_lacks_inputs_is_refitted_if_asked() -> None:
    model, batches = chain(), data(40, 5)
    small = cut(model, batches[0], {"0": [1, 4, 6]})
    plain = tp.reconstruct(small, batches, model)
    every = tp.reconstruct(small, batches, model, tp.Reconstruct(every=True))
    assert torch.equal(every[0].weight, small[0].weight)
    assert torch.equal(every[2].weight, plain[2].weight)
    assert torch.equal(plain[4].weight, small[4].weight)
    x = torch.cat(batches)
    old = small[4].weight.detach().numpy(), small[4].bias.detach().numpy()
    weight, _ = ridge_refit(outputs(every[:4], x).numpy(), outputs(model, x).numpy(), *old, 1e-2, True)
    close(every[4].weight, weight)


class Counted(nn.Conv2d):
    """Counts the samples that pass through, over all copies."""

    samples = 0

    def forward(self, x: Tensor) -> Tensor:
        """As a convolution does."""
        Counted.samples += len(x)
        return super().forward(x)


@pytest.mark.parametrize(
    ("settings", "most"),
    [({}, 3), ({"ridge": "auto", "sums": True, "every": True}, 3), ({"inputs": "dense"}, 2)],
    ids=str,
)
def test_the_cost_in_forward_passes_does_not_grow_with_depth(settings: dict[str, Any], most: int) -> None:
    for depth in (3, 12):
        layers = [layer for _ in range(depth) for layer in (Counted(6, 6, 3, 1, 1), nn.ReLU())]
        model = randomise(nn.Sequential(nn.Conv2d(3, 6, 1), *layers, nn.Flatten(), nn.Linear(6 * 25, 4)))
        batches = data(20, 3, 5, 5, batches=5)
        plan = tp.trace(model, batches[0])
        small = tp.apply(model, plan_without(plan, random_gone(plan, 1, 0.3)))
        Counted.samples = 0
        tp.reconstruct(small, batches, model, tp.Reconstruct(**settings))
        ends = 3 * 2 * depth  # a look at the way that two samples take, and a mean
        assert 0 < Counted.samples <= most * depth * 100 + ends
        assert Counted.samples >= depth * 100


@pytest.mark.parametrize("name", ["residual", "vit", "concat", "split"])
@pytest.mark.parametrize("settings", [{}, {"sums": True, "ridge": "auto", "every": True}], ids=["plain", "all"])
def test_what_lies_in_files_between_layers_comes_back_the_same(name: str, settings: dict[str, Any]) -> None:
    b = built(name)
    batches = [torch.randn(8, *b.inputs.shape[1:], generator=torch.Generator().manual_seed(s)).double() for s in (1, 2)]
    small = tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 1)))
    told: list[dict[str, float]] = []
    kept, spilled = (
        tp.reconstruct(small, batches, b.model, tp.Reconstruct(**settings, memory=memory), log=told.append)
        for memory in (1024, 0)
    )
    for one, other in zip(kept.state_dict().values(), spilled.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert told[0]["file_mib"] == 0 < told[0]["memory_mib"]
    assert told[1]["file_mib"] > 0
    assert told[1]["memory_mib"] < told[0]["memory_mib"]


def test_memory_stays_within_its_bound_and_one_batch() -> None:
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    batches = [torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in range(8)]
    small = cut(model, batches[0], {"0": [1], "1": [0, 2]})
    one = 4 * 8 * 64 * 64 * 4 / 2**20  # a layer's activations of one batch, in MiB
    told: list[dict[str, float]] = []
    for memory in (1024.0, 3.0):
        tp.reconstruct(small, batches, model, tp.Reconstruct(memory=memory), log=told.append)
    assert told[0]["memory_mib"] > 8 * one
    assert told[1]["memory_mib"] <= 3.0 + 4 * one
    assert told[1]["file_mib"] > 8 * one - 3.0
    assert told[0]["samples"] == 32
    assert told[0]["layers"] == 2


def test_no_file_stays_open_when_a_model_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Any] = []
    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *a, **k: files.append(real(*a, **k)) or files[-1])
    model, batches = chain(), data(40, 5)
    small = cut(model, batches[0], {"0": [1, 4, 6], "2": [1]})
    passes = []

    def fail(*_: object) -> None:
        passes.append(None)
        if len(passes) > 2:
            raise ZeroDivisionError

    small[3].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        tp.reconstruct(small, batches, model, tp.Reconstruct(memory=0))
    assert files
    assert all(file.closed for file in files)


def test_inputs_that_repeat_each_other_are_safe_in_float32_without_a_ridge() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 60), nn.Identity(), nn.Linear(60, 4))).float()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[:1].repeat(60, 1) * 1e3)
        model[0].bias.copy_(model[0].bias[:1].expand(60))
    batches = [b.float() for b in data(3000, 5)]
    small = cut(model, batches[0], {"0": [3]})
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=0))
    x = torch.cat(batches)
    assert all(bool(torch.isfinite(p).all()) for p in found.parameters())
    assert gap(outputs(found, x), outputs(model, x)) < 1e-2 * gap(outputs(small, x), outputs(model, x))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [({"inputs": "both"}, "inputs='both'"), ({"memory": -1}, "memory=-1"), ({"ridge": "best"}, "ridge=best")],
)
def test_settings_that_mean_nothing_are_refused(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(tp.InputError, match=match):
        tp.Reconstruct(**kwargs)


def test_models_given_stay_as_they_were() -> None:
    model, batches = chain(), data(40, 5)
    small = cut(model, batches[0], {"0": [1, 4, 6]})
    states = [copy.deepcopy(m.state_dict()) for m in (model, small)]
    for inputs in ("pruned", "dense"):
        tp.reconstruct(small, batches, model, tp.Reconstruct(inputs=inputs, sums=True, memory=0))
    for m, state in zip((model, small), states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(m.state_dict().values(), state.values(), strict=True))
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in m.modules())


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_some_positions_of_each_sample_are_fitted_to(inputs: Any) -> None:
    model = randomise(Convs(norm=False, kernel_size=3, padding=1))
    batches = data(6, 3, 8, 7)
    small = cut(model, batches[0], {"first": [0, 2]})
    few = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=0.1, positions=11, inputs=inputs))
    some = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:11].sort().values
    with torch.no_grad():
        seen = [small.read(b) for b in batches]
        # A layer that keeps single positions of its own output: what is read is laid out as one 3x3 image a position.
        columns = [nn.functional.unfold(s, 3, padding=1)[..., some].unflatten(1, (-1, 3, 3)) for s in seen]
        single = [c.movedim(-1, 1).flatten(0, 1) for c in columns]
        wanted = [model.conv(model.read(b)).flatten(2)[..., some].transpose(1, 2).flatten(0, 1) for b in batches]
    bare = copy.deepcopy(small.conv)
    bare.padding = (0, 0)
    weight, bias = refit_conv(bare, single, [w[..., None, None] for w in wanted], 0.1, free_bias=True)
    close(few.conv.weight, weight)
    close(few.conv.bias, bias)
    all_of_them = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=0.1, positions=30, inputs=inputs))
    assert gap(all_of_them.conv.weight, few.conv.weight) > 1e-3
    plain = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=0.1, inputs=inputs))
    assert torch.equal(plain.conv.weight, all_of_them.conv.weight)
