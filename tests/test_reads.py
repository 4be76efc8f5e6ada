"""Weights used without their layers: hooks see them all the same, and nothing else changes."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import built, gap, plan_without
from tpvprune.reads import ThroughLayers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.own = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.fc, self.free = nn.Linear(4, 5), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight, torch.ones(4, dtype=x.dtype), stride=2, padding=(1, 1))
        x = F.conv2d(self.own(x), self.own.weight, None)  # without the bias of the layer: not what it would do
        return F.linear(x.mean((2, 3)), weight=self.fc.weight, bias=self.fc.bias) * self.free


def calls_of(model: nn.Module, inputs: Tensor) -> tuple[list[str], Tensor]:
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, module in model.named_modules()
        if name
    ]
    with ThroughLayers(model):
        out = model(inputs)
    for handle in handles:
        handle.remove()
    return seen, out


def test_layers_are_called_once_where_their_weight_is_used() -> None:
    model, inputs = randomise(Net()), example(2, 3, 6, 6)
    seen, out = calls_of(model, inputs)
    assert seen == ["conv", "own", "fc"]
    assert gap(out, model(inputs)) < tolerances.SAME_FUNCTION


def test_a_convolution_done_otherwise_than_its_layer_would_is_left_alone() -> None:
    model, inputs = randomise(Net()), example(2, 3, 6, 6)
    model.conv.stride = (1, 1)
    assert calls_of(model, inputs)[0] == ["own", "fc"]


def test_the_mode_is_that_of_one_thread_and_ends() -> None:
    model, inputs = randomise(Net()), example(2, 3, 6, 6)
    seen: list[str] = []
    model.fc.register_forward_hook(lambda *_: seen.append("fc"))
    with ThroughLayers(model):
        thread = threading.Thread(target=model, args=(inputs,))
        thread.start()
        thread.join()
    model(inputs)
    assert seen == []


@pytest.mark.parametrize("how", [tp.Reconstruct(ridge=0.0, sums=False), tp.Reconstruct(ridge=0.0, inputs="dense")])
def test_what_is_used_by_hand_is_refitted(how: tp.Reconstruct) -> None:
    b = built("by_hand")
    plan = plan_without(b.graph, {"stem": [1, 4]})
    small, inputs = tp.apply(b.model, plan), example(40, 3, 5, 5, seed=3)
    fitted = tp.reconstruct(small, [inputs], b.model, how)
    for name in ("attn.qkv.weight", "mix.weight"):
        assert not torch.equal(fitted.get_parameter(name), small.get_parameter(name)), name
    wanted = b.model(inputs)
    assert (fitted(inputs) - wanted).norm() < 0.8 * (small(inputs) - wanted).norm()


class Inner(nn.Module):
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias)


class Outer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.weight, self.bias)


def test_a_layer_that_is_running_is_not_called_again() -> None:
    model = randomise(nn.Sequential(Outer(), nn.ReLU(), Outer()))
    seen, _ = calls_of(model, example(2, 4))
    assert [name for name in seen if name in ("0", "2")] == ["0", "2"]
    tied = randomise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    tied[1].weight, tied[1].bias = tied[0].weight, tied[0].bias
    assert calls_of(tied, example(2, 4))[0] == ["0", "1"]
