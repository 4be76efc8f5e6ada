"""Attention of PyTorch's own with any number of heads: with all of them what it was, with fewer what masks give."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import example, randomise
from tests.helpers import assert_scores_close, gap, plan_without
from tests.planning.test_trace import macs_of
from tpvprune.multihead import attended, free, freed
from tpvprune.reads import ThroughLayers

WIDTH, HEADS, BATCH, TARGETS, SOURCES = 8, 4, 3, 5, 6


def attention(**settings: Any) -> nn.MultiheadAttention:
    found = randomise(nn.MultiheadAttention(WIDTH, HEADS, **settings))
    assert isinstance(found, nn.MultiheadAttention)
    return found


def inputs(kind: str, batch_first: bool, single: bool) -> tuple[Tensor, Tensor, Tensor]:
    def made(length: int, seed: int) -> Tensor:
        if single:
            return example(length, WIDTH, seed=seed)
        return example(*((BATCH, length) if batch_first else (length, BATCH)), WIDTH, seed=seed)

    query, key = made(TARGETS, 1), made(SOURCES, 2)
    return {"itself": (query,) * 3, "memory": (query, key, key), "all": (query, key, made(SOURCES, 3))}[kind]


def masks(kind: str, sources: int, single: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    batch = 1 if single else BATCH
    seen = torch.rand(batch * HEADS, TARGETS, sources, generator=generator) < 0.7
    seen[..., 0] = True
    padding = torch.arange(sources).expand(batch, -1) >= sources - torch.arange(1, batch + 1).unsqueeze(1)
    bias = torch.randn(TARGETS, sources, generator=generator, dtype=torch.float64)
    return {
        "none": {},
        "bool": {"attn_mask": ~seen[0]},
        "float": {"attn_mask": bias},
        "each head": {"attn_mask": ~seen},
        "padding": {"key_padding_mask": padding[0] if single else padding},
        "both": {"attn_mask": bias, "key_padding_mask": padding[0] if single else padding},
    }[kind]


@pytest.mark.parametrize("kind", ["itself", "memory", "all"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "each head", "padding", "both"])
@pytest.mark.parametrize(("batch_first", "single"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_with_all_heads_it_is_what_it_was(kind: str, mask: str, batch_first: bool, single: bool, bias: bool) -> None:
    module = attention(bias=bias, batch_first=batch_first)
    given = inputs(kind, batch_first, single)
    asked = masks(mask, TARGETS if kind == "itself" else SOURCES, single)
    free = copy.deepcopy(module)
    assert freed(free)
    for need_weights, average in ((True, True), (True, False), (False, True)):
        how: dict[str, Any] = {**asked, "need_weights": need_weights, "average_attn_weights": average}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # masks of two sorts
            wanted, got = module(*given, **how), free(*given, **how)
            with ThroughLayers(module) as through:
                seen = module(*given, **how)
        assert through.led
        for out, weights in (got, seen):
            torch.testing.assert_close(out, wanted[0], rtol=0, atol=1e-12)
            assert (weights is None) == (wanted[1] is None)
            if weights is not None:
                torch.testing.assert_close(weights, wanted[1], rtol=0, atol=1e-12)


def test_what_reads_all_heads_is_called_as_a_layer() -> None:
    module, called = attention(), []
    module.out_proj.register_forward_pre_hook(lambda layer, args: called.append(args[0]))
    x = inputs("itself", False, False)
    module(*x)
    assert not called
    with ThroughLayers(module):
        module(*x)
    assert [tuple(value.shape) for value in called] == [(BATCH, TARGETS, WIDTH)]


@pytest.mark.parametrize("settings", [{"kdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_what_it_does_not_do_stays_as_it_is(settings: dict[str, Any]) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, **settings)
    assert not freed(module)
    assert type(module) is nn.MultiheadAttention
    query, key, value = inputs("memory", False, False)
    key = key[..., : module.kdim]
    given = query.float(), key.float(), value.float()
    wanted = module(*given)[0]
    with ThroughLayers(module):
        assert torch.equal(module(*given)[0], wanted)


def test_subclasses_and_other_modules_stay_as_they_are() -> None:
    class Mine(nn.MultiheadAttention):
        pass

    assert not freed(Mine(WIDTH, HEADS))
    assert not freed(nn.Linear(2, 2))
    assert (
        attended(*inputs("itself", False, False), WIDTH, HEADS, None, None, None, None, False, 0.0, None, None) is None
    )


def test_attention_is_dropped_in_training_alone() -> None:
    module = attention(dropout=1.0)
    freed(module)
    x = inputs("itself", False, False)
    whole = module(*x)[0]
    module.train()
    for need_weights in (True, False):
        out = module(*x, need_weights=need_weights)[0]
        torch.testing.assert_close(out, module.out_proj.bias.expand_as(out))
    module.eval()
    assert torch.equal(module(*x)[0], whole)


class Encoder(nn.Module):
    """PyTorch's encoder, and a layer of attention that hands out its weights too."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, activation="gelu", batch_first=True)
        self.encoder, self.last = nn.TransformerEncoder(layer, 2), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.fc = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]).expand(len(x), -1) >= x.shape[1] - 1
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.fc(self.last(query=x, key=x, value=x)[0].mean(1))


def vision() -> nn.Module:
    size = {"num_layers": 2, "num_heads": 4, "hidden_dim": 16, "mlp_dim": 24, "num_classes": 5}
    return randomise(VisionTransformer(image_size=16, patch_size=8, **size))


NETS = {"encoder": (lambda: randomise(Encoder()), (4, 6, WIDTH)), "vision": (vision, (4, 3, 16, 16))}


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("name", NETS)
def test_a_network_with_fewer_heads_gives_what_masks_give(name: str, tmp_path: Any) -> None:
    make, shape = NETS[name]
    model, x = make(), example(*shape)
    graph = tp.trace(model, x[:1])
    heads = [group for group in graph.groups if group.kind == "head"]
    assert len(heads) == (3 if name == "encoder" else 2)
    assert all(group.units == HEADS for group in heads)
    gone = {group.id: list(range(number + 1)) for number, group in enumerate(heads)}
    gone |= {group.id: [1] for group in graph.groups if group.kind == "channel"}
    plan = plan_without(graph, gone)
    small, masked = tp.apply(model, plan), tp.mask(model, plan)
    for number, group in enumerate(heads):
        assert small.get_submodule(group.id).num_heads == HEADS - number - 1
        assert type(model.get_submodule(group.id)) is nn.MultiheadAttention
    with torch.no_grad():
        wanted = masked(x)
        assert gap(small(x), wanted) < tolerances.SAME_FUNCTION
        assert gap(model(x), wanted) > tolerances.OTHER_FUNCTION
        again = pickle.loads(pickle.dumps(small))
        assert torch.equal(again(x), small(x))
    refitted = tp.reconstruct(small, [x], model, tp.Reconstruct(ridge=1e-6))
    with torch.no_grad():
        assert gap(refitted(x), model(x)) < 0.5 * gap(small(x), model(x))
    tp.save(refitted, tmp_path / "out")
    loaded = tp.load(tmp_path / "out", skeleton=make())
    with torch.no_grad():
        assert torch.equal(loaded(x), refitted(x))


class Cross(nn.Module):
    """Attention from a few tokens to the rest, between which its one weight is shared out unequally."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(6, WIDTH)
        self.attention, self.fc = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.read(x).split((TARGETS, SOURCES), 1)
        return self.fc(self.attention(query, key, key, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("gone", [[], [2], [0, 1, 3]])
def test_what_a_weight_costs_falls_with_its_heads_where_queries_and_keys_are_unequally_many(gone: list[int]) -> None:
    model, x = randomise(Cross()), example(1, TARGETS + SOURCES, 6)
    graph = tp.trace(model, x)
    plan = plan_without(graph, {"attention": gone})
    small = tp.apply(model, plan)
    free(small)  # in functions that the counter sees
    assert plan.macs == macs_of(small, x)


@pytest.mark.parametrize("name", NETS)
def test_heads_are_scored_as_dense_jacobians_say(name: str) -> None:
    make, shape = NETS[name]
    model, x = make(), example(*shape)
    graph = tp.trace(model, x[:1])
    scores = tp.score(model, [x], graph, tp.TPV(head="logits", probes="exact"))
    assert_scores_close(scores.values, reference.tpv(model, x, graph, "logits", "consume"), tolerances.EXACT)


class Looking(nn.Module):
    """Does something with what attention gives."""

    def __init__(self, what: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.attend, self.fc = nn.Linear(3, WIDTH), nn.MultiheadAttention(WIDTH, HEADS), nn.Linear(WIDTH, 4)
        self.what = what

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        return self.what(self, *self.attend(x, x, x))


LOOKS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str | None]] = {
    "not at weights": (lambda net, out, weights: net.fc(out), None),
    "weights are given too": (lambda net, out, weights: (net.fc(out), weights), "its outputs are the model's outputs"),
    "weights count": (lambda net, out, weights: net.fc(out) * weights.amax(), "looks at the mean attention"),
    "weights mix": (lambda net, out, weights: net.fc(weights @ out.transpose(0, 1)), "looks at the mean attention"),
    "heads count": (
        lambda net, out, weights: net.fc(out / net.attend.num_heads),
        "makes a number of their width, 4 with all of them",
    ),
}


@pytest.mark.parametrize("look", LOOKS)
def test_heads_leave_where_nobody_looks_at_their_attention(look: str) -> None:
    what, reason = LOOKS[look]
    model, x = randomise(Looking(what)), example(3, 2, 3)
    graph = tp.trace(model, x)
    heads = [group for group in graph.groups if group.kind == "head"]
    if reason is None:
        (group,) = heads
        assert group.exact_mask
        plan = plan_without(graph, {"attend": [0, 2]})
        with torch.no_grad():
            assert gap(tp.apply(model, plan)(x), tp.mask(model, plan)(x)) < tolerances.SAME_FUNCTION
    else:
        assert not heads
        assert any(reason in why for why in graph.skipped.values()), dict(graph.skipped)


@pytest.mark.parametrize("length", [4, 40])
def test_large_logits_in_half_precision_are_finite(length: int) -> None:
    module = nn.MultiheadAttention(64, 1, bias=False).half().eval()
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(64).repeat(3, 1))
    x = torch.full((length, 1, 64), 36.0, dtype=torch.float16)  # 36 * 36 * 64 is more than float16 holds
    freed(module)
    out, weights = module(x, x, x)
    assert bool(out.isfinite().all())
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(1, length), rtol=1e-2, atol=1e-2)


def test_what_means_nothing_is_refused() -> None:
    module = attention()
    freed(module)
    query, key, value = inputs("all", False, False)
    with pytest.raises(RuntimeError, match="is_causal is a hint"):
        module(query, key, value, is_causal=True)
    plain = attention()
    with ThroughLayers(plain), pytest.raises(RuntimeError, match="is_causal hint"):
        plain(query, key, value, is_causal=True)
    with pytest.raises(RuntimeError, match=r"torch\.int64; give booleans"):
        module(query, key, value, attn_mask=torch.ones(TARGETS, SOURCES, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="batch of the query holds 3, that of the key 1"):
        module(query, key[:, :1], value[:, :1])
    with pytest.raises(RuntimeError, match="have shapes"):
        module(query, key, value[:2])


def test_attention_can_start_anew() -> None:
    module = attention()
    freed(module)
    before = module.in_proj_weight.clone()
    module._reset_parameters()
    assert not torch.equal(module.in_proj_weight, before)
    assert not module._qkv_same_embed_dim


def encoder(norm: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=True)
    return randomise(nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH) if norm else None))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_what_stands_behind_a_sequence_is_as_it_was(norm: bool, aligned: bool, learns: bool) -> None:
    model, x = encoder(norm), example(3, 5, WIDTH)
    padding = torch.arange(5).expand(3, -1) >= torch.tensor([[5], [3], [1]])
    padding = padding if aligned else padding.roll(1, 1)
    other = copy.deepcopy(model)
    free(other)
    for mask in (padding, torch.zeros(3, 5, dtype=torch.float64).masked_fill(padding, float("-inf"))):
        with torch.set_grad_enabled(learns):
            wanted, got = (net(x, src_key_padding_mask=mask) for net in (model, other))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
        if not (norm or aligned or learns):  # what is written down runs on no nested tensor, in either
            program = torch.export.export(other, (x,), {"src_key_padding_mask": mask}).module()
            torch.testing.assert_close(program(x, src_key_padding_mask=mask), wanted, rtol=0, atol=1e-12)
        if aligned and not learns:
            assert bool((wanted[padding] == wanted[padding][0]).all())  # or else the test saw no nested tensor


def test_a_single_head_stays() -> None:
    model = randomise(nn.TransformerEncoderLayer(WIDTH, 1, 12, batch_first=True))
    graph = tp.trace(model, example(2, 3, WIDTH))
    assert [group.id for group in graph.groups] == ["linear1"]
