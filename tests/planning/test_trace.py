from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tpvprune as tp
from tests.cases import example, randomise
from tests.helpers import NAMES, assert_same_state, built, plan_without, random_gone
from tpvprune.planning import seen


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_those_written_by_hand(name: str) -> None:
    b = built(name)
    assert sum(p.numel() for p in b.model.parameters()) < 10_000
    assert [g.id for g in b.graph.groups] == [e.id for e in b.case.groups]
    for group, expected in zip(b.graph.groups, b.case.groups, strict=True):
        assert (group.kind, group.units, group.exact_mask) == (expected.kind, expected.units, expected.exact_mask)
        members = [(m.param, m.dim, m.role) for m in group.members]
        assert len(members) == len(set(members))
        assert set(members) == expected.members
        for member in group.members:
            index = b.case.index.get((group.id, member.param, member.role))
            wanted = index if index is not None else [[unit] for unit in range(group.units)]
            assert member.entries(group.units).tolist() == wanted, (group.id, member.param)


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_pruned_is_listed_with_its_reason(name: str) -> None:
    b = built(name)
    assert set(b.graph.skipped) == set(b.case.skipped)
    for layer, reason in b.case.skipped.items():
        assert reason in b.graph.skipped[layer]


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_with_outputs_is_in_a_group_or_skipped(name: str) -> None:
    b = built(name)
    writes = {m.layer for g in b.graph.groups for m in g.of_role("produce", "affine")}
    layers = {n for n, m in b.model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    assert layers <= writes | set(b.graph.skipped)


def macs_of(model: nn.Module, inputs: Tensor) -> float:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one kernel, of which the counter knows nothing
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.requires_grad_(False)(inputs)
    torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2 / len(inputs)


def params_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_counted_cost_is_that_of_the_model_that_comes_out(name: str) -> None:
    b = built(name)
    assert b.graph.params() == params_of(b.model)
    assert b.graph.macs() == macs_of(copy.deepcopy(b.model), b.inputs)
    for seed, share in ((0, 0.5), (1, 0.2), (2, 0.9)):
        plan = plan_without(b.graph, random_gone(b.graph, seed, share))
        small = tp.apply(b.model, plan)
        assert plan.params == params_of(small) < b.graph.params()
        assert plan.macs == macs_of(small, b.inputs) < b.graph.macs()


def test_macs_are_per_example(conv_bn) -> None:
    one = tp.trace(conv_bn.model, conv_bn.inputs[:1])
    assert one.macs() == conv_bn.graph.macs()
    assert one.model_id == conv_bn.graph.model_id


@pytest.mark.parametrize("name", ["conv_bn", "vit"])
def test_tracing_leaves_the_model_as_it_was(name: str) -> None:
    model = copy.deepcopy(built(name).model).train()
    next(model.parameters()).requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    rng = torch.get_rng_state()
    tp.trace(model, built(name).inputs)
    assert_same_state(model.state_dict(), state)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_progress_is_told(residual) -> None:
    told = []
    tp.trace(residual.model, residual.inputs, progress=lambda *what: told.append(what))
    assert told
    assert told[-1][0] == "trace"
    assert told[-1][1] == told[-1][2] == len(told)


def test_products_outside_layers_count_and_stay() -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.fc = nn.Linear(9, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.up((x.mT @ x).flatten(1)).relu())

    model, x = Gram(), torch.randn(2, 5, 3)
    graph = tp.trace(model, x)
    assert graph.macs() == macs_of(model, x) == 3 * 5 * 3 + 9 * 8 + 8 * 2
    plan = plan_without(graph, {"up": [0, 1]})
    assert plan.macs == macs_of(tp.apply(model, plan), x)
    assert plan.params == graph.params() - 2 * (9 + 1 + 2)


def test_a_parameter_may_be_handed_to_a_module() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return x + shift

    class Handed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.shift, self.adds, self.fc = (
                nn.Linear(3, 6),
                nn.Parameter(torch.ones(1, 6)),
                Adds(),
                nn.Linear(6, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.adds(self.up(x), self.shift.expand(len(x), -1)).relu())

    assert tp.trace(Handed(), torch.randn(2, 3)).macs() == 3 * 6 + 6 * 2


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(4, 6), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(torch.relu(self.a(x) + self.b(y)))


@pytest.mark.parametrize("as_dict", [False, True])
def test_examples_may_be_several_arguments(as_dict: bool) -> None:
    x, y = torch.randn(2, 4), torch.randn(2, 5)
    graph = tp.trace(TwoInputs(), {"x": x, "y": y} if as_dict else (x, y))
    assert [g.id for g in graph.groups] == ["a"]
    assert {m.param for m in graph["a"].of_role("produce")} == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert tp.Graph.from_json(graph.to_json()).inputs == graph.inputs == ((4,), (5,))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare, self.fc = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.first(x).relu())


def test_unused_layers_are_skipped_with_the_reason() -> None:
    graph = tp.trace(Unused(), torch.randn(2, 4))
    assert graph.skipped["spare"] == "it is not used in the forward pass"
    assert graph.params() == params_of(Unused())


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x)
        return self.fc(hidden.relu()), hidden


def test_hidden_features_that_are_returned_too_stay_whole() -> None:
    graph = tp.trace(TwoOutputs(), torch.randn(2, 4))
    assert not graph.groups
    assert graph.skipped["first"] == "its outputs are the model's outputs"


@pytest.mark.parametrize(
    ("model", "example", "match"),
    [
        (nn.Linear(4, 3), torch.randn(2, 5), "does not run on an example of shape \\(2, 5\\)"),
        (nn.Linear(4, 3), "picture", "the example input is a str"),
        (nn.Linear(4, 3), torch.randn(0, 4), "no tensor with a batch dimension"),
    ],
)
def test_what_cannot_be_traced_is_refused(model: nn.Module, example: object, match: str) -> None:
    with pytest.raises(tp.ModelError, match=match):
        tp.trace(model, example)


def test_a_frozen_model_can_be_traced(conv_bn) -> None:
    model = copy.deepcopy(conv_bn.model).requires_grad_(False)
    assert [g.id for g in tp.trace(model, conv_bn.inputs).groups] == ["conv1", "conv2"]


class ManyHeads(nn.Module):
    """timm's attention with and without the parts it may have."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 12)
        self.attn = timm.layers.Attention(12, num_heads=3, **kwargs)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attn(self.embed(x)).mean(1))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"qkv_bias": True},
        {"qk_norm": True, "norm_layer": nn.LayerNorm},
        {"scale_norm": True, "norm_layer": nn.LayerNorm},
    ],
    ids=str,
)
def test_heads_leave_together(kwargs: dict[str, object]) -> None:
    model = ManyHeads(**kwargs).double().eval()
    inputs = torch.randn(2, 7, 5, dtype=torch.float64)
    graph = tp.trace(model, inputs)
    group = graph["attn"]
    assert (group.kind, group.units) == ("head", 3)
    assert group.exact_mask == ("scale_norm" not in kwargs)
    plan = plan_without(graph, {"attn": [1]})
    small = tp.apply(model, plan)
    assert (small.attn.num_heads, small.attn.attn_dim) == (2, 8)
    assert plan.macs == macs_of(small, inputs)
    same = torch.allclose(small(inputs), tp.mask(model, plan)(inputs), rtol=0, atol=1e-10)
    assert same == group.exact_mask


@pytest.mark.parametrize("fused", [True, False])
def test_attention_with_one_head_keeps_it_and_is_cut_within_only_if_its_scale_stays(fused: bool) -> None:
    class OneHead(ManyHeads):
        def __init__(self) -> None:
            super().__init__()
            self.attn = timm.layers.Attention(12, num_heads=1)
            self.attn.fused_attn = fused

    model, x = randomise(OneHead()), example(2, 7, 5)
    graph = tp.trace(model, x)
    assert "attn" not in graph
    if fused:  # the kernel's own scale follows the width
        assert "attn.qkv" not in graph
        assert "sets the scale of the attention" in graph.skipped["attn.qkv"]
        return
    group = graph["attn.qkv"]
    assert (group.kind, group.units, group.exact_mask) == ("channel", 12, False)
    small = tp.apply(model, plan_without(graph, {"attn.qkv": [0, 5, 11]}))
    tokens, kept = example(2, 7, 12), [c for c in range(12) if c not in (0, 5, 11)]
    q, k, v = (part[..., kept] for part in model.attn.qkv(tokens).chunk(3, -1))
    mixed = (q @ k.mT * 12**-0.5).softmax(-1) @ v
    wanted = mixed @ model.attn.proj.weight[:, kept].mT + model.attn.proj.bias
    assert torch.allclose(small.attn(tokens), wanted, rtol=0, atol=1e-12)


def test_attention_whose_code_fixes_its_width_keeps_it_and_what_is_around_it_is_cut() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.qkv, self.proj, self.fc = (nn.Linear(*s) for s in ((5, 8), (8, 24), (8, 8), (8, 3)))
            self.num_heads = 2

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = x + self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).reshape(x.shape[0], -1, 8))
            return self.fc(x.mean(1))

    model, inputs = randomise(nn.Sequential(nn.Identity(), Own())), example(2, 7, 5)
    graph = tp.trace(model, inputs)
    assert [g.id for g in graph.groups] == ["1.embed"]
    assert "the code of '1' (Own) cannot do without them" in graph.skipped["1.qkv"]
    plan = plan_without(graph, {"1.embed": [2, 5]})
    assert torch.allclose(tp.apply(model, plan)(inputs), tp.mask(model, plan)(inputs), rtol=0, atol=1e-12)


class Flattened(nn.Module):
    """Channels that are flattened where they lie first or last, with a norm that pools or none."""

    def __init__(self, last: bool, norm: bool) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 2, 2), last
        self.norm = nn.GroupNorm(2, 6) if norm else nn.Identity()
        self.hidden, self.fc = nn.Linear(24, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.fc(self.hidden((x.movedim(1, -1) if self.last else x).flatten(1)).relu())


class FlattenedTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.fc = nn.Linear(12, 6), nn.Linear(24, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 4, 12)
        return self.fc(self.hidden(self.embed(x).relu().flatten(1)).relu())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_flattened_channels_are_followed_wherever_they_lie(last: bool, norm: bool) -> None:
    model = randomise(Flattened(last, norm))
    graph = tp.trace(model, example(2, 3, 4, 4))
    assert [g.id for g in graph.groups] == ["conv", "hidden"]
    (reader,) = graph["conv"].of_role("consume")
    channels, pixels = torch.arange(6), torch.arange(4)
    places = channels.unsqueeze(1) + 6 * pixels if last else 4 * channels.unsqueeze(1) + pixels
    if norm:  # a unit is a channel of both groups
        places = places.reshape(2, 3, 4).transpose(0, 1).flatten(1).sort(1).values
    assert torch.equal(reader.entries(graph["conv"].units), places)


def test_channels_of_flattened_tokens_are_followed() -> None:
    model, inputs = randomise(FlattenedTokens()), example(2, 3, 4, 4)
    state = copy.deepcopy(model.state_dict())
    graph = tp.trace(model, inputs)
    assert [g.id for g in graph.groups] == ["embed", "hidden"]
    assert_same_state(model.state_dict(), state)
    plan = plan_without(graph, {"embed": [1, 4]})
    assert torch.equal(
        tp.apply(model, plan).hidden.weight, model.hidden.weight[:, [i for i in range(24) if i % 6 not in (1, 4)]]
    )


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_tracing_warns_of_nothing(quiet: None, residual) -> None:
    tp.trace(residual.model, residual.inputs)


def test_a_time_limit_names_the_last_operation(residual) -> None:
    with pytest.raises(
        tp.ModelError, match=r"takes more than 1e-09 s; the last it did was the operation '\w+' in '\w+"
    ):
        tp.trace(residual.model, residual.inputs, seconds=1e-9)
    assert tp.trace(residual.model, residual.inputs, seconds=600).to_json() == residual.graph.to_json()
    with pytest.raises(tp.errors.InputError, match="seconds=0 must be above zero"):
        tp.trace(residual.model, residual.inputs, seconds=0)


def test_the_limit_holds_while_cuts_are_rehearsed(monkeypatch: pytest.MonkeyPatch, residual) -> None:
    now = iter([0.0, *[1.0] * 10_000])
    real = seen.Limit.check

    def check(self: seen.Limit, at: str) -> None:
        if "rehearse" in at:
            real(self, at)

    monkeypatch.setattr(seen.Limit, "check", check)
    monkeypatch.setattr(seen.time, "monotonic", lambda: next(now))
    with pytest.raises(tp.ModelError, match=r"the last it did was to rehearse a cut of \d+ groups, "):
        tp.trace(residual.model, residual.inputs, seconds=0.5)
