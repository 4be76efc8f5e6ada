"""Layers with code of their own, and weights and biases that several hold: what is refitted, and what stays."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests import tolerances
from tests.cases import randomise
from tests.helpers import gap, outputs
from tests.recovery.test_reconstruct import close, cut, data, refit_linear
from tests.reference import ridge_refit
from tpvprune.recovery.linear import is_affine, is_product


class Scaled(nn.Linear):
    """Weights at another scale, as in StyleGAN."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.1, self.bias)


class ScaledOutputs(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.1


class ScaledBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * 0.1)


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-1, 1))


class Timed(nn.Linear):
    def forward(self, x: Tensor, time: float) -> Tensor:
        return super().forward(x) + time


class LeftPadded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 0, 2, 0)), self.weight, self.bias, self.stride)


class Cropped(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-1, :-1]


class Halved(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size) / 2


class Adapted(nn.Linear):
    """What is added does not depend on the weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.zeros(2, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Renamed(nn.ConvTranspose2d):
    pass


OTHERS: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether a mean can be folded into the bias
    "scaled": (lambda: Scaled(6, 5), True),
    "scaled outputs": (lambda: ScaledOutputs(6, 5), False),
    "scaled bias": (lambda: ScaledBias(6, 5), False),
    "clipped": (lambda: Clipped(6, 5), False),
    "other arguments": (lambda: Timed(6, 5), False),
    "left padded": (lambda: LeftPadded(4, 6, 3, padding=1), True),
    "cropped": (lambda: Cropped(4, 6, 3, padding=1), True),
    "halved": (lambda: Halved(4, 6, 3, stride=2), False),
    "scaled standardised": (lambda: ScaledStdConv2d(4, 6, 3), True),
    "standardised": (lambda: StdConv2d(4, 6, 3, bias=True), True),
}
SAME: dict[str, Callable[[], nn.Module]] = {
    "torch's": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "adapted": lambda: Adapted(6, 5),
    "same": lambda: Conv2dSame(4, 6, 4, stride=2),
    "renamed": lambda: Renamed(4, 6, 3, stride=2, padding=1, groups=2),
    "words": lambda: type("Mine", (nn.Conv2d,), {})(4, 6, (3, 4), padding="same", padding_mode="circular"),
    "reflected": lambda: type("Mine", (nn.Conv1d,), {})(4, 6, 5, padding=4, stride=3, padding_mode="reflect"),
    "wide": lambda: type("Mine", (nn.Linear,), {})(3000, 40),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*OTHERS, *SAME])
def test_what_a_layer_makes_of_its_parameters_is_seen_by_running_it(name: str, dtype: torch.dtype) -> None:
    layer = randomise(OTHERS[name][0]() if name in OTHERS else SAME[name]()).to(dtype)
    before = [p.clone() for p in layer.parameters()]
    assert is_product(layer) == (name in SAME)
    assert is_affine(layer) == (name in SAME or OTHERS[name][1])
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_hooks_of_a_layer_do_not_see_it_run_and_a_forward_of_one_layer_alone_counts() -> None:
    layer, called = Adapted(6, 5), []
    layer.register_forward_hook(lambda *_: called.append(None))
    assert is_product(layer)
    assert not called
    plain = nn.Linear(6, 5)
    own = plain.forward
    plain.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    assert not is_product(plain)


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_a_layer_with_code_of_its_own_keeps_its_weights_and_is_named(
    inputs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Scaled(8, 9), nn.Tanh(), nn.Linear(9, 4)))
    batches = data(40, 5)
    small = cut(model, batches[0], {"0": [1, 4], "2": [3]})
    with caplog.at_level(logging.WARNING):
        found = tp.reconstruct(small, batches, model, tp.Reconstruct(inputs=inputs))
    (told,) = caplog.messages
    assert "'2' read less than before" in told
    assert torch.equal(found[2].weight, small[2].weight)
    assert torch.equal(found[2].bias, small[2].bias)
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    seen = [outputs(small[:4], b) if inputs == "pruned" else outputs(model[:4], b)[:, kept] for b in batches]
    close(found[4].weight, refit_linear(small[4], seen, [outputs(model, b) for b in batches])[0])


def test_what_a_layer_adds_of_its_own_is_left_out_of_what_is_fitted() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Adapted(8, 4)))
    batches = data(40, 5)
    small = cut(model, batches[0], {"0": [1, 4]})
    found = tp.reconstruct(small, batches, model)
    x = torch.cat(batches)
    read, layer = outputs(small[:2], x), small[2]
    wanted = outputs(model, x) - (read @ layer.down.T @ layer.up.T).detach()
    old = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    weight, bias = ridge_refit(read.numpy(), wanted.numpy(), *old, tp.Reconstruct().ridge, True)
    close(found[2].weight, weight)
    close(found[2].bias, bias)


def test_means_are_folded_into_the_bias_of_a_layer_that_uses_its_weight_in_its_own_way() -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.Tanh(), StdConv2d(8, 6, 3, bias=True), nn.Flatten(), nn.Linear(96, 2)]
    model = randomise(nn.Sequential(*layers))
    batches = data(6, 3, 4, 4)
    small = cut(model, batches[0], {"0": [1, 4]})
    found = tp.fold_means(small, batches, model)
    x = torch.cat(batches)
    kept = [0, 2, 3, 5, 6, 7]
    lost = outputs(model[:3], x) - outputs(small[2], outputs(model[:2], x)[:, kept])
    torch.testing.assert_close((found[2].bias - small[2].bias).detach(), lost.mean((0, 2, 3)))
    assert torch.equal(found[2].weight, small[2].weight)


class Shared(nn.Module):
    """Two layers that hold one weight or one bias, the second one before a norm."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 8)
        self.a, self.b, self.norm, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        setattr(self.b, what, getattr(self.a, what))

    def middle(self, x: Tensor) -> Tensor:
        return self.second(self.a(self.first(x).tanh()).tanh()).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.b(self.middle(x))).tanh())


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_a_bias_that_several_layers_add_stays_and_the_weights_make_up_for_it(inputs: Any) -> None:
    model = randomise(Shared("bias"))
    batches = data(40, 5)
    small = cut(model, batches[0], {"first": [0, 2], "second": [1, 4]})
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(inputs=inputs))
    assert torch.equal(found.a.bias, small.a.bias)
    assert found.a.bias is found.b.bias
    x = torch.cat(batches)
    with torch.no_grad():
        dense = model.first(x).tanh(), model.middle(x)
        read = small.first(x).tanh(), found.middle(x)
        if inputs == "dense":
            read = dense[0][:, [1, 3, 4, 5, 6, 7]], dense[1][:, [0, 2, 3, 5, 6, 7]]
        wanted = model.a(dense[0]), model.b(dense[1])
    old = [layer.weight.detach().numpy() for layer in (small.a, small.b)]
    bias, ridge = small.a.bias.detach().numpy(), tp.Reconstruct().ridge
    close(found.a.weight, ridge_refit(read[0].numpy(), wanted[0].numpy(), old[0], bias, ridge, False)[0])
    weight, moved = ridge_refit(read[1].numpy(), wanted[1].numpy(), old[1], bias, ridge, True)
    close(found.b.weight, weight)  # the norm behind it takes the shift
    close(small.norm.running_mean - found.norm.running_mean, moved - bias)


def test_a_mean_is_not_folded_into_a_bias_that_several_layers_add() -> None:
    model = randomise(Shared("bias"))
    batches = data(40, 5)
    small = cut(model, batches[0], {"first": [0, 2], "second": [1, 4]})
    found = tp.fold_means(small, batches, model)
    assert torch.equal(found.a.bias, small.a.bias)
    x = torch.cat(batches)
    with torch.no_grad():
        lost = model.middle(x)[:, [1, 4]].mean(0) @ model.b.weight[:, [1, 4]].T
    torch.testing.assert_close(small.norm.running_mean - found.norm.running_mean, lost)


def test_gauss_newton_moves_a_shared_bias_for_both_at_once() -> None:
    model = randomise(Shared("bias"))
    batches = data(40, 5)
    small = cut(model, batches[0], {"first": [0, 2], "second": [1, 4]})
    told: list[dict[str, float]] = []
    found = tp.refine(small, batches, model, tp.GaussNewton(steps=2), log=told.append)
    assert told[0]["after"] < 0.5 * told[0]["before"]
    assert found.a.bias is found.b.bias
    assert gap(found.a.bias, small.a.bias) > tolerances.OTHER_FUNCTION


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_a_weight_that_several_layers_hold_stays_though_some_of_it_is_masked(
    inputs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = randomise(Shared("weight"))
    batches = data(40, 5)
    graph = tp.weight_graph(model)
    small = tp.apply(model, tp.sparsify(tp.score(model, batches, graph, tp.L1()), graph, 0.5))
    with caplog.at_level(logging.WARNING):
        found = tp.reconstruct(small, batches, model, tp.Reconstruct(inputs=inputs))
    assert "'a' read less than before" in caplog.text
    assert found.a.weight is found.b.weight
    assert torch.equal(found.a.weight, small.a.weight)
    assert torch.equal(found.a.bias, small.a.bias)
    assert gap(found.second.weight, small.second.weight) > tolerances.OTHER_FUNCTION
