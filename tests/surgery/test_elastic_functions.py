"""Widths that functions write out which modules call, and numbers that code makes of widths."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import gap, plan_without
from tpvprune.types import Graph


def joined(x: Tensor, width: int) -> Tensor:
    return x.transpose(1, 2).reshape(x.size(0), x.size(2), width)


def attend(x: Tensor, qkv_weight: Tensor, num_heads: int, qkv_bias: Tensor | None = None, gain: float = 1.0) -> Tensor:
    """Attention of which nothing is a method."""
    B, N, C = x.shape
    qkv = F.linear(x, qkv_weight, qkv_bias).reshape(B, N, 3, num_heads, C // num_heads).permute(2, 0, 3, 1, 4)
    q = qkv[0] * (C // num_heads) ** -0.5
    return joined((q @ qkv[1].mT).softmax(-1) @ qkv[2], C) * gain


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(x, self.qkv.weight, self.num_heads, qkv_bias=self.qkv.bias, gain=0.5))


class Steady(Attention):
    """The same, written so that any width will do: the reference."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        return self.proj((q @ k.mT * 4**-0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(2) * 0.5)


class Net(nn.Module):
    def __init__(self, kind: type[nn.Module] = Attention, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.embed, self.norm, self.attn, self.fc = nn.Linear(5, 12), norm(12), kind(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.fc((x + self.attn(self.norm(x))).mean(1))


GONE = {"embed": [0, 3, 4, 7, 9], "attn": [1]}


@pytest.fixture
def inputs() -> Tensor:
    return example(2, 7, 5)


def test_functions_that_modules_call_leave_widths_open_and_keep_numbers(inputs: Tensor) -> None:
    net = randomise(Net())
    graph = tp.trace(net, inputs)
    assert {g.id: (g.kind, g.units) for g in graph.groups} == {"embed": ("channel", 12), "attn": ("head", 3)}
    assert set(graph.skipped) == {"fc"}
    assert {o.method for o in graph.openings["attn"]} == {"attend", "joined"}
    assert [o.number for o in graph.openings["attn"] if o.number is not None] == [0.5]
    plan = plan_without(graph, GONE)
    small = tp.apply(net, plan)
    assert gap(small(inputs), tp.mask(net, plan)(inputs)) < tolerances.SAME_FUNCTION
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(inputs), small(inputs))
    program = torch.export.export(small, (inputs,)).module()
    assert gap(program(inputs), small(inputs)) < tolerances.SAME_FUNCTION
    before = net(inputs)
    assert torch.equal(net(inputs), before)  # other modules call the functions as they are written
    again = plan_without(tp.trace(small, inputs), {"embed": [1], "attn": [0]})
    assert gap(tp.apply(small, again)(inputs), tp.mask(small, again)(inputs)) < tolerances.SAME_FUNCTION


def test_a_scale_behind_a_norm_does_not_follow_the_width(inputs: Tensor) -> None:
    """Nothing can be compared with masks there; code that never reads the width is the reference."""
    net = randomise(Net(norm=nn.LayerNorm))
    steady = Net(Steady, nn.LayerNorm).double().eval()
    steady.load_state_dict(net.state_dict())
    assert gap(steady(inputs), net(inputs)) < tolerances.SAME_FUNCTION
    graph = tp.trace(net, inputs)
    assert [(g.id, g.kind, g.units, g.exact_mask) for g in graph.groups] == [
        ("embed", "channel", 12, False),
        ("attn", "head", 3, True),
    ]
    ours, theirs = tp.apply(net, plan_without(graph, GONE)), Net(Steady, nn.LayerNorm).eval()
    for name, _ in theirs.named_children():
        if name != "attn":
            setattr(theirs, name, getattr(ours, name))
    theirs.attn.qkv, theirs.attn.proj = ours.attn.qkv, ours.attn.proj
    assert gap(ours(inputs), theirs(inputs)) < tolerances.SAME_FUNCTION


class Scaled(nn.Module):
    """Multiplies by a number that follows the width of what it is given."""

    def __init__(self, dim: int, _: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 8), nn.Linear(8, dim)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Named(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        scale = 1 / x.shape[-1]
        return self.down(self.up(x).relu() * scale)


class Divided(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu() / math.sqrt(x.shape[-1]))


class InPlace(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        y *= -(x.shape[-1] ** -0.5)
        return self.down(y)


class Method(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.mul(self.up(x).relu().mul(3 / x.shape[-1]), 2))


class Hidden(Scaled):
    """Comes to its number by a call that nobody but itself may make."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu() * pow(x.shape[-1], -0.5))


class Sometimes(Scaled):
    """One statement, and a number of its own each time."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x).relu()
        for power in (1, 2):
            y = y * x.shape[-1] ** (-0.5 * power)
        return self.down(y)


@pytest.mark.parametrize("norm", [nn.Identity, nn.LayerNorm])
@pytest.mark.parametrize("kind", [Named, Divided, InPlace, Method])
def test_numbers_stay_however_they_are_written(kind: type[nn.Module], norm: type[nn.Module], inputs: Tensor) -> None:
    net = randomise(Net(kind, norm))
    graph = tp.trace(net, inputs)
    assert {g.id: g.units for g in graph.groups} == {"embed": 12, "attn.up": 8}
    small = tp.apply(net, plan_without(graph, {"embed": [2, 5, 6]}))
    wide = example(4, 7, 12)
    wide[..., [2, 5, 6]] = 0
    left = [n for n in range(12) if n not in (2, 5, 6)]
    # The module alone, on what is zero where channels have left, is the masked module.
    assert gap(small.attn(wide[..., left]), net.attn(wide)[..., left]) < tolerances.SAME_FUNCTION


@pytest.mark.parametrize("kind", [Hidden, Sometimes])
def test_widths_whose_numbers_cannot_be_kept_stay(kind: type[nn.Module], inputs: Tensor) -> None:
    graph = tp.trace(randomise(Net(kind, nn.LayerNorm)), inputs)
    assert {g.id: g.units for g in graph.groups} == {"attn.up": 8}
    assert graph.skipped["embed"].startswith("the code of 'attn' makes a number of their width")


class Remembered(Scaled):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.scale = dim**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu() * self.scale)


def test_numbers_of_classes_that_are_registered_follow(inputs: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpvprune.layers._REGISTERED", {})

    def anew(module: Remembered) -> None:
        module.scale = module.up.weight.shape[1] ** -0.5

    tp.register_layer(Remembered, anew)
    net = randomise(Net(Remembered, nn.LayerNorm))
    small = tp.apply(net, plan_without(tp.trace(net, inputs), {"embed": [1, 4, 8]}))
    assert (small.attn.scale, type(small.attn)) == (9**-0.5, Remembered)


def test_numbers_are_written_to_plan_files(inputs: Tensor) -> None:
    graph = tp.trace(randomise(Net()), inputs)
    data = graph.to_json()
    assert Graph.from_json(data).openings == graph.openings
    written = data["openings"]["attn"]
    assert sum("number" in opening for opening in written) == 1
    next(opening for opening in written if "number" in opening)["number"] = "1"
    with pytest.raises(tp.errors.PlanError, match="'1' is no number"):
        Graph.from_json(data)


@pytest.mark.parametrize("number", [False, True])
def test_functions_that_are_not_as_they_were_are_named(number: bool, inputs: Tensor) -> None:
    net = randomise(Net())
    graph = tp.trace(net, inputs)
    changed = tuple(
        dataclasses.replace(o, call="q * other") if (o.number is not None) == number and o.method == "attend" else o
        for o in graph.openings["attn"]
    )
    other = dataclasses.replace(graph, openings={"attn": changed})
    with pytest.raises(tp.errors.ModelError, match=r"attend has no call 'q \* other' any more; trace the model again"):
        tp.apply(net, plan_without(other, GONE))


def turned(x: Tensor, width: int, more: int = 1) -> Tensor:
    return turned(x, width, more - 1) if more else x.reshape(len(x), -1, width).tanh()


def scaled(x: Tensor, more: int = 1) -> Tensor:
    return scaled(x, more - 1) if more else x * (1 / x.shape[-1])


class Recursive(nn.Module):
    """Calls functions that call themselves, and so cannot be written anew."""

    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.scale = scale
        self.up, self.middle, self.down = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 6)
        self.norm = nn.LayerNorm(10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.middle(self.up(x).relu()))
        return self.down(scaled(y) if self.scale else turned(y, 10))


@pytest.mark.parametrize(
    ("scale", "gone", "reason"),
    [
        (True, {"0": [1], "1.up": [0, 5], "1.down": [2, 3]}, "makes a number of their width"),
        (False, {"1.up": [0, 5]}, "cannot do without them: shape"),  # what comes in and goes out stays with it
    ],
)
def test_what_cannot_be_written_anew_stays_and_the_rest_goes(
    scale: bool, gone: dict[str, list[int]], reason: str
) -> None:
    model, inputs = randomise(nn.Sequential(nn.Linear(5, 6), Recursive(scale), nn.Linear(6, 3))), example(2, 4, 5)
    graph = tp.trace(model, inputs)
    assert {group.id for group in graph.groups} == set(gone)
    assert reason in graph.skipped["1.middle"]
    plan = plan_without(graph, gone)
    assert gap(tp.apply(model, plan)(inputs), tp.mask(model, plan)(inputs)) < tolerances.SAME_FUNCTION
