"""Attention and products as libraries of transformers write them: what counts heads there, and what does not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import gap, plan_without, random_gone
from tests.planning.test_trace import macs_of

WIDE = 24  # channels of the stream


class Attention(nn.Module):
    """Attention over `(batch, tokens, WIDE)`; how heads are told is what forms below differ in."""

    def __init__(self, heads: int = 4, wide: int = WIDE) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(wide, wide) for _ in range(3))
        self.out = nn.Linear(wide, wide)

    @staticmethod
    def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Heads `(batch, tokens, heads, channels)` with a scale that is that of the dense model."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2)


class Inferred(Attention):
    """Holds the channels of a head alone, of which there are more than heads."""

    def __init__(self, heads: int = 4, shared: int | None = None) -> None:
        super().__init__()
        self.head_dim, self.shared = WIDE // heads, heads // (shared or heads)
        self.key, self.value = (nn.Linear(WIDE, self.head_dim * (shared or heads)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.query(x).view(shape), self.key(x).view(shape), self.value(x).view(shape)
        if self.shared > 1:
            B, N, H, D = k.shape
            k, v = (t[:, :, :, None].expand(B, N, H, self.shared, D).reshape(B, N, H * self.shared, D) for t in (k, v))
        return self.out(self.mixed(q, k, v).reshape(*x.shape[:-1], -1))


class AllHeads(Attention):
    """Counts heads, the channels of one, and those of all."""

    def __init__(self, heads: int = 4, wide: int = WIDE) -> None:
        super().__init__(heads, wide)
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, wide // heads, wide

    def split(self, x: Tensor) -> Tensor:
        new_shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(new_shape)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixed(*(self.split(layer(x)) for layer in (self.query, self.key, self.value))).contiguous()
        return self.out(mixed.view(*mixed.size()[:-2], self.all_head_size))


class Windows(AllHeads):
    """Has windows that are as many tokens a side as there are heads."""

    def __init__(self) -> None:
        super().__init__()
        self.window_size, self.resolution = (4, 4), [4, 4]
        self.table = nn.Parameter(torch.zeros(16 * 16, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        side = self.window_size[0] * self.window_size[1]
        bias = self.table.view(side, side, -1).permute(2, 0, 1)
        mixed = ((q @ k.mT * 0.4 + bias).softmax(-1) @ v).transpose(1, 2).contiguous()
        return self.out(mixed.view(*mixed.shape[:-2], self.all_head_size))


class Buckets(Attention):
    """Has as many buckets of distances as channels, which a method reads that its pass calls."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.each, self.inner, self.buckets = 4, 6, WIDE, WIDE
        self.bias = nn.Embedding(self.buckets, self.n_heads)

    def distances(self, count: int) -> Tensor:
        far = (torch.arange(count)[:, None] * 3 - torch.arange(count)[None] * 5).abs() * 3
        return self.bias(far.clamp(max=self.buckets - 1)).permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.each)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = (q @ k.mT * 0.4 + self.distances(x.shape[1])).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1))


class Transposed(nn.Module):
    """A linear layer with its weight the other way round and its widths by its side."""

    def __init__(self, made: int, given: int) -> None:
        super().__init__()
        self.nf, self.nx = made, given
        self.weight, self.bias = nn.Parameter(torch.zeros(given, made)), nn.Parameter(torch.zeros(made))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class Joined(nn.Module):
    """Queries, keys and values by one such layer; the last one is as wide as the stream, which stays."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.split_size = 4, WIDE // 4, WIDE
        self.first, self.out = Transposed(3 * WIDE, WIDE), Transposed(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.first(x).split(self.split_size, dim=2)
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_dim) for part in parts)
        return self.out(Attention.mixed(q, k, v).reshape(*x.shape[:-1], -1))


class Beside(Attention):
    """One layer gives queries, keys and values, those of a head beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.head_size, self.query = WIDE // 4, nn.Linear(WIDE, 3 * WIDE)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x).view(*x.shape[:-1], -1, 3 * self.head_size).chunk(3, dim=-1)
        return self.out(self.mixed(q, k, v).reshape(*x.shape[:-1], -1))


class Stream(nn.Module):
    """Blocks around a stream that is added to the input, and so stays as wide as it is."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList(blocks), nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.last(x.mean(1))


def checked(model: nn.Module, inputs: Tensor) -> tuple[tp.Graph, nn.Module]:
    """Cut and masked it gives the same, whatever leaves; the last one that was cut."""
    graph = tp.trace(model, inputs[:1])
    assert all(g.exact_mask for g in graph.groups)
    for seed in range(3):
        plan = plan_without(graph, random_gone(graph, seed))
        small = tp.apply(model, plan)
        assert gap(small(inputs), tp.mask(model, plan)(inputs)) < tolerances.SAME_FUNCTION
        assert plan.macs == macs_of(small, inputs[:1]) < graph.macs()
    return graph, tp.apply(model, plan_without(graph, {g.id: [1] for g in graph.groups}))


FORMS = [(form, tokens) for form in (Inferred, AllHeads, Buckets, Joined) for tokens in (16, 4)]


@pytest.mark.parametrize(("form", "tokens"), [*FORMS, (Windows, 16), (Beside, 5)])
def test_attention_loses_heads(form: Callable[[], nn.Module], tokens: int) -> None:
    model = randomise(Stream(form(), form()))
    graph, small = checked(model, example(2, tokens, WIDE))
    assert [(g.id, g.kind, g.units) for g in graph.groups] == [(f"blocks.{n}", "head", 4) for n in range(2)]
    block: Any = small.blocks[0]
    if form is Joined:
        assert (block.num_heads, block.split_size, block.head_dim) == (3, 18, 6)
        assert (block.first.nf, block.first.nx, block.out.nf, block.out.nx) == (54, WIDE, WIDE, 18)
    elif form is Beside:
        assert (block.head_size, block.query.out_features, block.out.in_features) == (6, 54, 18)
    else:
        assert [layer.out_features for layer in (block.query, block.key, block.value)] == [18] * 3
        assert (block.out.in_features, block.out.out_features) == (18, WIDE)
    if form in (AllHeads, Windows):
        assert (block.num_attention_heads, block.attention_head_size, block.all_head_size) == (3, 6, 18)
    if form is Windows:
        assert (block.window_size, block.resolution, tuple(block.table.shape)) == ((4, 4), [4, 4], (256, 3))
    if form is Buckets:
        assert (block.n_heads, block.each, block.buckets, tuple(block.bias.weight.shape)) == (3, 6, WIDE, (WIDE, 3))
    if form is Inferred:
        assert (block.head_dim, block.shared) == (6, 1)


def test_shared_heads_that_nothing_counts() -> None:
    model = randomise(Stream(Inferred(4, shared=2)))
    graph, small = checked(model, example(2, 7, WIDE))
    assert [(g.kind, g.units) for g in graph.groups] == [("head", 2)]  # each with the two that read it
    block: Any = small.blocks[0]
    assert (block.query.out_features, block.key.out_features, block.head_dim, block.shared) == (12, 6, 6, 2)


def test_a_single_head_does_not_keep_those_of_others() -> None:
    model = randomise(Stream(AllHeads(1), AllHeads(4)))
    graph, small = checked(model, example(2, 7, WIDE))
    assert [(g.id, g.kind, g.units) for g in graph.groups] == [("blocks.1", "head", 4)]
    assert "counts something else that stays" in graph.skipped["blocks.0.value"]
    block: Any = small.blocks[1]
    assert (block.num_attention_heads, block.attention_head_size, block.all_head_size) == (3, 6, 18)


def announced(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return run


class Wrapped(Transposed):
    forward = announced(Transposed.forward)


def test_decorated_passes_are_read() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Wrapped(6, 6), nn.Tanh(), nn.Linear(6, 3)))
    graph, small = checked(model, example(2, 4, 5))
    assert graph.counts == {"2.nx": ("0", 1), "2.nf": ("2", 1)}
    layer: Any = small[2]
    assert (layer.nf, layer.nx, tuple(layer.weight.shape)) == (5, 5, (5, 5))


def documented(method: Callable[..., Any]) -> Callable[..., Any]:
    """Marks what it was given, and gives it back."""
    method.told = True  # type: ignore[attr-defined]
    return method


class Pooled(nn.Module):
    """Writes out, in a decorated pass, how wide what it pools is."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = {"last": 6}
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    @documented
    def forward(self, x: Tensor) -> Tensor:
        wide = self.sizes["last"]
        x = self.first(x).reshape(len(x), -1, wide)
        return self.last(x.mean(1))


def test_decorated_passes_are_written_anew_where_the_decorator_gives_them_back() -> None:
    model = randomise(Pooled())
    graph, small = checked(model, example(2, 4, 5))
    assert {g.id: g.units for g in graph.groups} == {"first": 6}
    assert [opening.method for opening in graph.openings[""]] == ["forward"]
    assert type(small).__name__ == "Pooled"
    assert type(small) is not Pooled
    assert type(small).forward.told  # type: ignore[attr-defined]


class Reduced(nn.Module):
    """Writes what it reads as wide as its input, which shows only where one of the two is cut and not the other."""

    def __init__(self) -> None:
        super().__init__()
        self.less, self.out = nn.Conv1d(6, 6, 2, 2), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        fewer = self.less(x.permute(0, 2, 1).reshape(B, C, N))
        return self.out(fewer.reshape(B, C, -1).permute(0, 2, 1))


class Fixed(nn.Module):
    """Ends in a width that is written out where no code can be written anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.middle, self.last = nn.Linear(5, 6), Reduced(), nn.Linear(6, 7), nn.Linear(7, 3)

    @announced
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.cat([x, self.block(x)], 1)
        return self.last(self.middle(x).reshape(len(x), -1, 7)).mean(1)


def test_what_fails_alone_and_not_together_is_opened_too() -> None:
    graph, _ = checked(randomise(Fixed()), example(2, 4, 5))
    assert {g.id: g.units for g in graph.groups} == {"first": 6, "block.less": 6}
    assert "cannot do without them" in graph.skipped["middle"]


class Shuffled(nn.Module):
    """Puts its tokens in an order of their own each time, and leaves some out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.rand(x.shape[:2]).argsort(1)[:, :3, None]
        x = self.first(x)
        return self.last(self.middle(x.gather(1, order.expand(-1, -1, x.shape[-1]))).relu())


def test_what_draws_random_numbers_is_compared_by_the_same_ones() -> None:
    model, inputs = randomise(Shuffled()), example(1, 6, 5)
    before = torch.get_rng_state()
    graph = tp.trace(model, inputs)
    assert {g.id: g.units for g in graph.groups} == {"first": 6, "middle": 8}
    plan = plan_without(graph, {"first": [2], "middle": [0, 5]})
    assert not torch.equal(model(inputs), model(inputs))
    outputs = []
    for net in (tp.apply(model, plan), tp.mask(model, plan)):
        torch.set_rng_state(before)
        outputs.append(net(inputs))
    assert gap(*outputs) < tolerances.SAME_FUNCTION


class Turned(nn.Module):
    """Turns the first channels, which are all of them, and joins what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.turned = nn.Linear(5, 6), nn.Linear(6, 3), 6

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        some, rest = x[..., : self.turned], x[..., self.turned :]
        return self.last(torch.cat([some.tanh(), rest], -1))


def test_parts_without_entries() -> None:
    graph, _ = checked(randomise(Turned()), example(2, 4, 5))
    assert {g.id: g.units for g in graph.groups} == {"first": 6}
