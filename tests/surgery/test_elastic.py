"""Modules whose code writes widths out, cut to other widths all the same."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import gap, plan_without, random_gone
from tpvprune.elastic import base_of
from tpvprune.members import Opening
from tpvprune.types import Graph


class Attend(nn.Module):
    """Tells the width of what it gives, and of a head, from what it is given; a base class helps."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, gain: float = 1.0, *, shift: float = 0.0) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        x = (
            self.mixed(*qkv.unbind(0))
            .transpose(1, 2)
            .reshape(B, N, C)
        )  # fmt: skip
        return self.proj(x) * gain + shift

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v


class Own(Attend):
    """Writes its widths out where it calls the method it overrides."""

    def forward(self, x: Tensor, gain: float = 0.5, *, shift: float = 0.25) -> Tensor:
        B, N, C = x.shape
        parts = [part.view(B, N, self.num_heads, C // self.num_heads) for part in self.qkv(x).chunk(3, -1)]
        mixed = super().mixed(*(part.transpose(1, 2) for part in parts))
        return self.proj(mixed.transpose(1, 2).reshape((B, N, C))) * gain + shift

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError


class Shrunk(Attend):
    """Sizes that stand beside a -1: the keys come from fewer tokens, of a layer of another width than the input."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.qkv, self.few, self.k = nn.Linear(dim, dim), nn.Conv1d(dim, dim, 2, stride=2), nn.Linear(dim, dim)

    def forward(self, x: Tensor, gain: float = 1.0, *, shift: float = 0.0) -> Tensor:
        B, N, C = x.shape
        q = self.qkv(x).reshape(B, N, self.num_heads, C // self.num_heads)
        few = self.few(x.permute(0, 2, 1)).reshape(B, C, -1).permute(0, 2, 1)
        k = self.k(few).reshape(B, -1, self.num_heads, C // self.num_heads)
        mixed = self.mixed(*(part.transpose(1, 2) for part in (q, k, k)))
        return self.proj(mixed.transpose(1, 2).reshape(B, N, C))


class Scale(nn.Module):
    """Keeps the shape that its parameter is brought to."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shape = (1, dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


class Net(nn.Module):
    def __init__(self, kind: type[Attend] = Attend) -> None:
        super().__init__()
        self.embed, self.attn, self.scale = nn.Linear(5, 12), kind(12, 3), Scale(12)
        self.more, self.fc = kind(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.scale(self.attn(x))
        return self.fc((x + self.more(x)).mean(1))


@pytest.fixture(params=[Attend, Own])
def net(request: pytest.FixtureRequest) -> nn.Module:
    return randomise(Net(request.param))


@pytest.fixture
def inputs() -> Tensor:
    return example(2, 7, 5)


GONE = {"embed": [0, 3, 4, 7, 9], "attn": [1], "more": [0, 2]}


def test_stream_and_heads_leave_apart(net: nn.Module, inputs: Tensor) -> None:
    graph = tp.trace(net, inputs)
    assert {g.id: (g.kind, g.units) for g in graph.groups} == {
        "embed": ("channel", 12),
        "attn": ("head", 3),
        "more": ("head", 3),
    }
    assert set(graph.skipped) == {"fc"}
    plan = plan_without(graph, GONE)
    small = tp.apply(net, plan)
    assert (small.attn.qkv.weight.shape, small.more.qkv.weight.shape) == ((24, 7), (12, 7))
    assert (small.attn.num_heads, small.more.num_heads, small.scale.shape) == (2, 1, (1, 7))
    assert gap(small(inputs), tp.mask(net, plan)(inputs)) < tolerances.SAME_FUNCTION
    assert sum(p.numel() for p in small.parameters()) == graph.params(plan.keep)


class Windows(nn.Module):
    """Puts windows together again in one chain of calls, of which two write the width out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fc = (
            nn.Linear(n, m) for n, m in ((5, 12), (12, 12), (12, 12), (12, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        B, H, W, C = x.shape
        y = self.third(self.second(x).relu())
        y = y.view(B, H // 2, W // 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)
        return self.fc(y.relu().mean((1, 2)))


def test_all_calls_of_a_chain_are_opened() -> None:
    net, inputs = randomise(Windows()), example(2, 4, 6, 5)
    graph = tp.trace(net, inputs[:1])
    assert {group.id: group.units for group in graph.groups} == {"first": 12, "second": 12, "third": 12}
    plan = plan_without(graph, {"first": [0, 3], "second": [1], "third": [2, 4, 7]})
    assert gap(tp.apply(net, plan)(inputs), tp.mask(net, plan)(inputs)) < tolerances.SAME_FUNCTION


def test_sizes_beside_one_that_is_open_already_are_told_by_the_tensor(inputs: Tensor) -> None:
    net = randomise(Net(Shrunk))
    graph = tp.trace(net, inputs)
    wanted = {"embed": 12, "attn": 3, "attn.few": 12, "more": 3, "more.few": 12}
    assert {g.id: g.units for g in graph.groups} == wanted
    assert {(o.size, o.given) for o in graph.openings["attn"]} == {(2, None), (3, None), (2, (1, 1)), (3, (1, 1))}
    for seed in range(3):
        plan = plan_without(graph, random_gone(graph, seed))
        assert gap(tp.apply(net, plan)(inputs), tp.mask(net, plan)(inputs)) < tolerances.SAME_FUNCTION
        again = Graph.from_json(graph.to_json())
        assert again.openings == graph.openings


def test_the_dense_model_is_left_as_it_was(net: nn.Module, inputs: Tensor) -> None:
    kind, before = type(net.attn), net(inputs)
    plan = plan_without(tp.trace(net, inputs), GONE)
    small = tp.apply(net, plan)
    assert type(net.attn) is kind
    assert type(small.attn) is not kind
    assert isinstance(small.attn, kind)
    assert (type(small.attn).__name__, type(small.attn).__module__) == (kind.__name__, kind.__module__)
    assert base_of(type(small.attn)) is kind
    assert torch.equal(net(inputs), before)


def test_a_cut_model_is_copied_pickled_exported_and_cut_again(net: nn.Module, inputs: Tensor) -> None:
    plan = plan_without(tp.trace(net, inputs), GONE)
    small = tp.apply(net, plan)
    wanted = small(inputs)
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert type(other.attn) is type(small.attn)
        assert torch.equal(other(inputs), wanted)
    program = torch.export.export(small, (inputs,)).module()
    assert gap(program(inputs), wanted) < tolerances.SAME_FUNCTION

    graph = tp.trace(small, inputs)
    assert {g.id: g.units for g in graph.groups} == {"embed": 7, "attn": 2}
    assert "has no such units" in graph.skipped["more.qkv"]  # the channels of a last head
    again = plan_without(graph, random_gone(graph, 0))
    smaller = tp.apply(small, again)
    assert gap(smaller(inputs), tp.mask(small, again)(inputs)) < tolerances.SAME_FUNCTION
    assert base_of(type(smaller.attn)) is type(net.attn)


def test_a_plan_file_holds_what_to_look_for(net: nn.Module, inputs: Tensor, tmp_path) -> None:
    plan = plan_without(tp.trace(net, inputs), GONE)
    plan.save(tmp_path / "plan.json")
    read = tp.Plan.load(tmp_path / "plan.json")
    assert set(read.graph.openings) == {"attn", "more"}
    text = "self.mixed(*qkv.unbind(0)).transpose(1, 2).reshape(B, N, C)"
    assert (Opening("forward", text, 2) in read.graph.openings["attn"]) == (type(net.attn) is Attend)
    assert torch.equal(tp.apply(net, read)(inputs), tp.apply(net, plan)(inputs))


def test_code_that_is_not_there_any_more_is_named(inputs: Tensor) -> None:
    net = randomise(Net())
    plan = plan_without(tp.trace(net, inputs), GONE)
    data = plan.graph.to_json()
    data["openings"]["attn"][0]["call"] = "x.reshape(A, B)"
    other = tp.Plan(plan.keep, Graph.from_json(data))
    with pytest.raises(tp.errors.ModelError, match=r"Attend\.forward has no call 'x\.reshape\(A, B\)' any more; trace"):
        tp.apply(net, other)


def test_code_whose_source_is_not_at_hand_keeps_its_widths(inputs: Tensor) -> None:
    import inspect

    names: dict[str, type[Attend]] = {}
    exec(inspect.getsource(Attend), globals(), names)
    net = randomise(Net(names["Attend"]))
    graph = tp.trace(net, inputs)
    assert graph.openings == {}
    assert "cannot do without them" in graph.skipped["attn.qkv"]


def test_defaults_of_arguments_stay(inputs: Tensor) -> None:
    net = randomise(Net())
    small = tp.apply(net, plan_without(tp.trace(net, inputs), GONE))
    x = example(1, 4, 7)
    assert torch.equal(small.attn(x), small.attn(x, 1.0, shift=0.0))
    assert not torch.equal(small.attn(x), small.attn(x, 2.0, shift=1.0))


class Private(Attend):
    """Names that are private to its class, something that cannot be copied, and subclasses that must say a word."""

    def __init_subclass__(cls, word: str) -> None:
        raise AssertionError(word)

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.__gain, self.lock = 0.5, threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "lock": None}

    def forward(self, x: Tensor, gain: float = 1.0, *, shift: float = 0.0) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(self.mixed(*qkv.unbind(0)).transpose(1, 2).reshape(B, N, C)) * self.__gain


def test_classes_keep_their_ways(inputs: Tensor) -> None:
    net = randomise(Net(Private))
    graph = tp.trace(net, inputs)
    assert {g.id: g.units for g in graph.groups} == {"embed": 12, "attn": 3, "more": 3}
    plan = plan_without(graph, GONE)
    small = tp.apply(net, plan)
    assert gap(small(inputs), tp.mask(net, plan)(inputs)) < tolerances.SAME_FUNCTION
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(inputs), small(inputs))


def test_what_only_a_later_cut_needs_goes_into_the_plan_of_both(inputs: Tensor, tmp_path) -> None:
    net = randomise(Net())
    graph = tp.trace(net, inputs)
    bare = dataclasses.replace(graph, openings={})
    small = tp.apply(net, plan_without(bare, {}))
    smaller = tp.apply(small, plan_without(tp.trace(small, inputs), GONE))
    tp.save(smaller, tmp_path / "out")
    assert torch.equal(tp.load(tmp_path / "out", skeleton=net)(inputs), smaller(inputs))
