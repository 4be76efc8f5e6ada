"""Criteria from activations, against plain loops over what hooks see."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import CASES, example, randomise
from tests.helpers import assert_scores_close, built
from tpvprune.testing import check_criterion
from tpvprune.types import Graph

EVERY = (tp.Variance(), tp.Wanda())
both = pytest.mark.parametrize("criterion", EVERY, ids=["variance", "wanda"])


def activations(model: nn.Module, batches: list[Tensor], param: str) -> list[list[float]]:
    """Per input channel, every number that layers with this weight read of it."""
    weight = model.get_parameter(param)
    users = [m for m in model.modules() if getattr(m, "weight", None) is weight]
    rows: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        axis = -1 if isinstance(module, nn.Linear) else 1
        rows.append(args[0].detach().movedim(axis, 0).flatten(1))

    handles = [module.register_forward_pre_hook(hook) for module in users]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return torch.cat(rows, 1).tolist()


def variance(model: nn.Module, batches: list[Tensor], graph: Graph) -> dict[str, Tensor]:
    """Two passes: the mean, then the squared distances from it."""
    scores = {}
    for group in graph.groups:
        of_readers = []
        for member in group.of_role("consume"):
            spread = []
            for channel in activations(model, batches, member.param):
                mean = math.fsum(channel) / len(channel)
                spread.append(math.fsum((a - mean) ** 2 for a in channel) / len(channel))
            wide = graph.shapes[member.param][member.dim]
            units = []
            for unit in range(group.units):
                entries = reference.entries_of(group, member, unit)
                # The in-channel of a grouped convolution's weight is one channel of each of its groups.
                channels = [c for c in range(len(spread)) if c % wide in entries]
                units.append(sum(spread[c] for c in channels) / len(channels))
            of_readers.append(units)
        means = [sum(column) / len(column) for column in zip(*of_readers, strict=True)]
        scores[group.id] = torch.tensor(means, dtype=torch.float64)
    return scores


def wanda(model: nn.Module, batches: list[Tensor], graph: Graph) -> dict[str, Tensor]:
    """`|w| * norm of what it reads`, weight by weight; norms are of a mean sample."""
    samples, scores = sum(len(batch) for batch in batches), {}
    for group in graph.groups:
        total = [0.0] * group.units
        for member in group.of_role("consume"):
            layer, weight = model.get_submodule(member.layer), model.get_parameter(member.param).detach()
            read = [math.fsum(a * a for a in row) for row in activations(model, batches, member.param)]
            norm = [math.sqrt(energy / samples) for energy in read]
            effect = torch.zeros_like(weight)
            for place in torch.cartesian_prod(*(torch.arange(size) for size in weight.shape)).tolist():
                if isinstance(layer, nn.ConvTranspose1d):
                    channel = place[0]
                else:
                    per_group = weight.shape[0] // getattr(layer, "groups", 1)
                    channel = place[0] // per_group * weight.shape[1] + place[1]
                effect[tuple(place)] = abs(float(weight[tuple(place)])) * norm[channel]
            for unit in range(group.units):
                for entry in reference.entries_of(group, member, unit):
                    one = effect.flatten()[entry] if member.dim is None else effect.select(member.dim, entry).sum()
                    total[unit] += float(one)
        scores[group.id] = torch.tensor(total, dtype=torch.float64)
    return scores


class LayersCalled(nn.Module):
    """What `cases.ByHand` computes, by calling its layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stem, self.attn, self.mix, self.fc = model.stem, model.attn, model.mix, model.fc

    def forward(self, x: Tensor) -> Tensor:
        x, attn = self.stem(x), self.attn
        q, k, v = (attn.qkv(x.flatten(2).mT) + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (3, 2)).transpose(1, 2) for part in (q, k, v))
        mixed = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.fc(self.mix((x + attn.proj(mixed).mT.reshape(x.shape)).relu()).mean((2, 3)))


def projections_called(model: nn.Module) -> nn.Module:
    """A copy whose attention calls the layer that reads all heads, on what it gives where that layer does nothing."""
    model = copy.deepcopy(model)
    for module in [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]:
        bare = copy.deepcopy(module)
        with torch.no_grad():
            bare.out_proj.weight.copy_(torch.eye(len(bare.out_proj.weight)))
            bare.out_proj.bias.zero_()

        def again(module: Any, args: Any, kwargs: Any, out: Any, bare: nn.Module = bare) -> Any:
            return module.out_proj(bare(*args, **kwargs)[0]), None

        module.register_forward_hook(again, with_kwargs=True)
    return model


SEEN = {"by_hand": LayersCalled, "multihead": projections_called}
REFERENCES: dict[str, tuple[Any, Any]] = {"variance": (tp.Variance(), variance), "wanda": (tp.Wanda(), wanda)}


def data(name: str, *sizes: int) -> list[Tensor]:
    whole = example(sum(sizes), *built(name).inputs.shape[1:], seed=7)
    return list(whole.split(sizes))


@pytest.mark.parametrize("which", REFERENCES)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_plain_loops(name: str, which: str) -> None:
    b, (criterion, of) = built(name), REFERENCES[which]
    batches = data(name, 3, 2)
    scores = tp.score(b.model, batches, b.graph, criterion)
    seen = SEEN.get(name, copy.copy)(b.model)
    assert_scores_close(scores.values, of(seen, batches, b.graph), tolerances.EXACT)
    assert all(float(value.min()) > 0 for value in scores.values.values())
    assert (scores.criterion, scores.samples, scores.stderr) == (which, 5, None)


@pytest.mark.parametrize(("name", "block"), [("mlp", (1, 1)), ("grouped", (1, 1)), ("shared", (1, 1)), ("mlp", (1, 2))])
def test_wanda_of_single_weights_is_that_of_the_paper(name: str, block: tuple[int, int]) -> None:
    b = built(name)
    graph = tp.weight_graph(b.model, block, ["*"] if block == (1, 1) else ["0"])
    batches = data(name, 3, 2)
    found = tp.score(b.model, batches, graph, tp.Wanda()).values
    assert_scores_close(found, wanda(b.model, batches, graph), tolerances.EXACT)


@pytest.mark.parametrize("name", ["conv_bn", "grouped", "vit", "shared"])
@both
def test_how_samples_are_split_into_batches_does_not_matter(name: str, criterion: Any) -> None:
    b = built(name)
    whole = tp.score(b.model, data(name, 6), b.graph, criterion)
    for sizes in ((3, 3), (1, 5), (1, 1, 1, 1, 1, 1)):
        parts = tp.score(b.model, data(name, *sizes), b.graph, criterion)
        assert_scores_close(parts.values, whole.values, tolerances.EXACT)
        assert parts.samples == whole.samples == 6
    backwards = tp.score(b.model, data(name, 2, 4)[::-1], b.graph, criterion)
    assert_scores_close(backwards.values, whole.values, tolerances.EXACT)


@both
def test_samples_seen_twice_change_nothing(conv_bn, criterion: Any) -> None:
    once = tp.score(conv_bn.model, data("conv_bn", 4), conv_bn.graph, criterion)
    twice = tp.score(conv_bn.model, data("conv_bn", 4) * 2, conv_bn.graph, criterion)
    assert_scores_close(twice.values, once.values, tolerances.EXACT)


def chain(shift: float = 0.0, scale: float = 1.0) -> nn.Sequential:
    """Without a nonlinearity in front of the reader, so that what a weight does to an activation is known."""
    model = randomise(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3)))
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias += shift
        model[0].weight *= scale
        model[0].bias *= scale
    return model


def test_a_constant_is_no_variance_and_counts_nothing() -> None:
    x = example(40, 5)
    graph = tp.trace(chain(), x)
    plain, moved, scaled = (
        tp.score(model, [x], graph, tp.Variance()).values["0"]
        for model in (chain(), chain(shift=10.0), chain(scale=3.0))
    )
    others = [0, 1, 3, 4, 5]
    for value in (plain, moved, scaled):  # a constant channel, and sums of squares that cancel
        assert 0 <= float(value[2]) < tolerances.EXACT * float(value.min(dim=0).values + value.max())
    assert moved[others].tolist() == pytest.approx(plain[others].tolist(), rel=tolerances.EXACT)
    assert scaled[others].tolist() == pytest.approx((9 * plain[others]).tolist(), rel=tolerances.EXACT)


def test_variance_does_not_look_at_the_weights_that_read_it(mlp) -> None:
    model = copy.deepcopy(mlp.model)
    with torch.no_grad():
        model[4].weight *= 100
    plain, other = (tp.score(m, [mlp.inputs], mlp.graph, tp.Variance()).values for m in (mlp.model, model))
    assert_scores_close(other, plain, 0)
    # Wanda does, in proportion.
    plain, other = (tp.score(m, [mlp.inputs], mlp.graph, tp.Wanda()).values for m in (mlp.model, model))
    assert_scores_close(other, {"0": plain["0"], "2": 100 * plain["2"]}, tolerances.EXACT)


def test_variance_refuses_single_weights(mlp) -> None:
    with pytest.raises(tp.ModelError, match=r"variance scores channels, not single weights \('0.weight'\)"):
        tp.score(mlp.model, [mlp.inputs], tp.weight_graph(mlp.model), tp.Variance())


@both
def test_the_output_may_be_anything(mlp, criterion: Any) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.plain = mlp.model, True

        def forward(self, x: Tensor) -> Any:
            y = self.inner(x)
            return y if self.plain else {"boxes": [y, y[:1]], "count": len(y)}

    model = Wrapped()
    graph = tp.trace(model, mlp.inputs)
    plain = tp.score(model, [mlp.inputs], graph, criterion)
    model.plain = False
    assert_scores_close(tp.score(model, [mlp.inputs], graph, criterion).values, plain.values, 0)


@both
def test_layers_that_are_not_used_are_told(mlp, criterion: Any) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.use = mlp.model, True

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if self.use else x

    model = Idle()
    graph = tp.trace(model, mlp.inputs)
    model.use = False
    with pytest.raises(tp.ModelError, match="no layer of the graph is used in the forward pass"):
        tp.score(model, [mlp.inputs], graph, criterion)


class Divides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x - x)


@both
def test_nan_is_told_with_the_layer_that_reads_it(mlp, criterion: Any) -> None:
    layers = list(mlp.model)
    graph = tp.trace(nn.Sequential(*layers[:3], nn.Identity(), nn.GELU(), layers[4]), mlp.inputs)
    model = nn.Sequential(*layers[:3], Divides(), nn.GELU(), layers[4])
    with pytest.raises(tp.NonFiniteError, match="layer '5' is given NaN or infinity"):
        tp.score(model, [mlp.inputs], graph, criterion)
    bad = mlp.inputs.clone()
    bad[1, 0] = torch.nan
    with pytest.raises(tp.NonFiniteError, match="layer '2' is given NaN or infinity"):
        tp.score(mlp.model, [mlp.inputs, bad], mlp.graph, criterion)


@pytest.mark.parametrize("name", ["conv_bn", "residual", "vit", "mlp"])
@both
def test_the_criterion_promise_is_kept(name: str, criterion: Any) -> None:
    b = built(name)
    check_criterion(criterion, b.model, [b.inputs, b.inputs[:2]], b.graph)


@both
def test_float32_scores_are_those_of_float64(conv_bn, criterion: Any) -> None:
    wide = tp.score(conv_bn.model, [conv_bn.inputs], conv_bn.graph, criterion)
    narrow = tp.score(copy.deepcopy(conv_bn.model).float(), [conv_bn.inputs.float()], conv_bn.graph, criterion)
    assert_scores_close(narrow.values, wide.values, tolerances.FLOAT32)
