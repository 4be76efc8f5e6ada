"""Attention of which several heads of queries share one head of keys and values (Ainslie 2023, arXiv 2305.13245)."""

from __future__ import annotations

from typing import Any

import pytest
from timm.layers import MultiQueryAttention2d
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import example, randomise
from tests.helpers import assert_scores_close, gap, plan_without
from tests.planning.test_trace import macs_of

EACH, WIDE = 4, 10  # channels of a head, and of what is read


class Grouped(nn.Module):
    """Grouped-query attention, with the shared heads repeated in one of several ways."""

    def __init__(self, way: str, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.way, self.num_heads, self.num_kv_heads, self.head_dim = way, num_heads, num_kv_heads, EACH
        self.num_key_value_groups = num_heads // num_kv_heads
        self.q_proj = nn.Linear(WIDE, num_heads * EACH)
        self.k_proj, self.v_proj = nn.Linear(WIDE, num_kv_heads * EACH), nn.Linear(WIDE, num_kv_heads * EACH)
        self.o_proj = nn.Linear(num_heads * EACH, WIDE)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N, _ = x.shape
        if self.way == "inferred":  # as transformers writes it
            q, k, v = (p(x).view(B, N, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        else:
            q = self.q_proj(x).view(B, N, self.num_heads, self.head_dim)
            k, v = (p(x).view(B, N, self.num_kv_heads, self.head_dim) for p in (self.k_proj, self.v_proj))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def repeated(self, x: Tensor) -> Tensor:
        if self.way in ("fused", "by hand, broadcast"):
            return x
        if self.way == "interleaved":
            return x.repeat_interleave(self.num_key_value_groups, dim=1)
        B, K, N, _ = x.shape
        return x[:, :, None].expand(B, K, self.num_key_value_groups, N, self.head_dim).reshape(B, -1, N, self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = self.repeated(k), self.repeated(v)
        if self.way.startswith("by hand"):
            mixed = (q @ k.mT * self.head_dim**-0.5).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.way == "fused")
        return self.o_proj(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Linear(5, WIDE), attention, nn.Linear(WIDE, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last((x + self.attention(x)).mean(1))


def rows(heads: list[int], each: int = EACH) -> list[int]:
    return [head * each + n for head in heads for n in range(each)]


def narrow(net: nn.Module, way: str, kept: list[int], shared: list[int]) -> nn.Module:
    """The same with some of the heads, cut by hand."""
    small = Net(Grouped(way, len(kept), len(shared))).double().eval()
    state: dict[str, Any] = dict(net.state_dict())
    for name, heads in (("q_proj", kept), ("k_proj", shared), ("v_proj", shared)):
        for key in ("weight", "bias"):
            state[f"attention.{name}.{key}"] = state[f"attention.{name}.{key}"][rows(heads)]
    state["attention.o_proj.weight"] = state["attention.o_proj.weight"][:, rows(kept)]
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("way", ["interleaved", "expanded", "by hand", "fused", "inferred"])
def test_a_unit_is_a_shared_head_with_all_that_read_it(way: str) -> None:
    model, x = randomise(Net(Grouped(way, 6, 3))), example(3, 7, 5)
    graph = tp.trace(model, x[:1])
    assert [(g.kind, g.units) for g in graph.groups if g.id == "attention"] == [("head", 3)]
    plan = plan_without(graph, {"attention": [1]})
    small, by_hand = tp.apply(model, plan), narrow(model, way, [0, 1, 4, 5], [0, 2])
    assert gap(small(x), by_hand(x)) < tolerances.SAME_FUNCTION
    assert gap(small(x), model(x)) > tolerances.OTHER_FUNCTION
    assert plan.macs == macs_of(by_hand, x[:1])
    assert small.attention.num_kv_heads == 2
    assert small.attention.num_heads == (6 if way == "inferred" else 4)  # which nothing reads there
    scores = tp.score(model, [x], graph, tp.TPV(head="logits", probes="exact"))
    assert_scores_close(scores.values, reference.tpv(model, x, graph, "logits", "consume"), tolerances.EXACT)


@pytest.mark.parametrize("way", ["fused", "by hand, broadcast"])
def test_heads_of_queries_leave_alone_where_all_share_one(way: str) -> None:
    model, x = randomise(Net(Grouped(way, 6, 1))), example(3, 7, 5)
    graph = tp.trace(model, x[:1])
    assert [(g.kind, g.units) for g in graph.groups if g.id == "attention"] == [("head", 6)]
    plan = plan_without(graph, {"attention": [1, 4]})
    small, by_hand = tp.apply(model, plan), narrow(model, way, [0, 2, 3, 5], [0])
    assert gap(small(x), by_hand(x)) < tolerances.SAME_FUNCTION
    assert gap(small(x), model(x)) > tolerances.OTHER_FUNCTION
    assert plan.macs == macs_of(by_hand, x[:1])
    assert graph.skipped["attention.k_proj"] == "its channels are summed over in 'attention' with others that stay"
    assert graph.skipped["attention.v_proj"] == "each head of 'attention' has all of them"


class Pictures(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.first, self.attention, self.last = nn.Conv2d(3, 8, 1), attention, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_timms_multi_query_attention_loses_heads(batch: int, fused: bool) -> None:
    def attention(heads: int) -> nn.Module:
        made = MultiQueryAttention2d(8, num_heads=heads, key_dim=3, value_dim=5, kv_stride=2)
        made.fused_attn = fused
        return made

    model, x = randomise(Pictures(attention(4))), example(3, 3, 6, 6)
    graph = tp.trace(model, x[:batch])
    plan = plan_without(graph, {"attention": [0, 2]})
    small, by_hand = tp.apply(model, plan), Pictures(attention(2)).double().eval()
    state = dict(model.state_dict())
    state["attention.query.proj.weight"] = state["attention.query.proj.weight"][rows([1, 3], 3)]
    state["attention.output.proj.weight"] = state["attention.output.proj.weight"][:, rows([1, 3], 5)]
    by_hand.load_state_dict(state)
    assert gap(small(x), by_hand(x)) < tolerances.SAME_FUNCTION
    assert gap(small(x), model(x)) > tolerances.OTHER_FUNCTION
    assert plan.macs == macs_of(by_hand, x[:1])
    scores = tp.score(model, [x], graph, tp.TPV(head="logits", probes="exact"))
    assert_scores_close(scores.values, reference.tpv(model, x, graph, "logits", "consume"), tolerances.EXACT)
