"""Criteria from gradients of a labelled loss, against plain backward passes."""

from __future__ import annotations

import copy
import logging
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.helpers import Built, assert_scores_close, built
from tests.scoring.loops import WEIGHTS, labelled, loss_gradients, squared_slices, unit_of, weight_members
from tpvprune.testing import check_criterion
from tpvprune.types import Graph

NAMES = ("mlp", "conv_bn", "residual", "grouped", "depthwise", "flatten", "shared", "transposed", "layernorm_stream")
EVERY = (tp.Taylor(), tp.Fisher(), tp.Jacobian())
every = pytest.mark.parametrize("criterion", EVERY, ids=["taylor", "fisher", "jacobian"])
Batches = list[tuple[Tensor, Tensor]]


def taylor(model: nn.Module, batches: Batches, graph: Graph) -> dict[str, Tensor]:
    samples = sum(len(x) for x, _ in batches)
    scores = {group.id: torch.zeros(group.units, dtype=torch.float64) for group in graph.groups}
    for x, y in batches:
        gradients = loss_gradients(model, x, y)
        for group in graph.groups:
            scores[group.id] += squared_slices(model, group, gradients) * len(x) / samples
    return scores


def fisher(model: nn.Module, batches: Batches, graph: Graph) -> dict[str, Tensor]:
    """`w^2 * mean over samples of g^2`, weight by weight, summed over a unit."""
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    squares: dict[str, Tensor] = {}
    for x, y in samples:
        for name, gradient in loss_gradients(model, x, y).items():
            squares[name] = squares.get(name, 0) + gradient**2 / len(samples)
    scores = {}
    for group in graph.groups:
        scores[group.id] = torch.zeros(group.units, dtype=torch.float64)
        for member, weight in weight_members(model, group):
            for unit in range(group.units):
                scores[group.id][unit] += unit_of(weight**2 * squares[member.param], group, member, unit).sum()
    return scores


def jacobian(
    model: nn.Module, batches: Batches, graph: Graph, over: str = "all", left_out: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """`mean over samples of (sum over all weights and biases of a unit of w * g)^2`."""
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    parameters = {name: p.detach() for name, p in model.named_parameters() if name not in left_out}
    roles = ("consume",) if over == "consume" else WEIGHTS
    scores = {group.id: torch.zeros(group.units, dtype=torch.float64) for group in graph.groups}
    for x, y in samples:
        gradients = loss_gradients(model, x, y)
        for group in graph.groups:
            for unit in range(group.units):
                moved = 0.0
                for member in group.members:
                    if member.role in roles and member.param in parameters:
                        effect = parameters[member.param] * gradients[member.param]
                        moved += float(unit_of(effect, group, member, unit).sum())
                scores[group.id][unit] += moved**2 / len(samples)
    return scores


@pytest.mark.parametrize("name", [*NAMES, "vit", "layerscale"])
def test_taylor_is_the_squared_effect_on_the_mean_loss_of_a_batch(name: str) -> None:
    b = built(name)
    for sizes in ((4, 4), (5, 2, 1)):
        batches = labelled(b, *sizes)
        scores = tp.score(b.model, batches, b.graph, tp.Taylor())
        assert_scores_close(scores.values, taylor(b.model, batches, b.graph), tolerances.EXACT)
        assert (scores.criterion, scores.samples) == ("taylor", sum(sizes))


@pytest.mark.parametrize("name", [*NAMES, "vit", "layerscale"])
def test_fisher_of_single_samples_is_exact(name: str) -> None:
    # One sample a batch: its random sign is squared away.
    b = built(name)
    batches = labelled(b, 1, 1, 1)
    scores = tp.score(b.model, batches, b.graph, tp.Fisher())
    assert_scores_close(scores.values, fisher(b.model, batches, b.graph), tolerances.EXACT)
    assert scores.criterion == "fisher"


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "grouped"])
def test_fisher_of_batches_is_unbiased(name: str) -> None:
    b = built(name)
    batches = labelled(b, 4)
    exact = fisher(b.model, batches, b.graph)
    found = tp.score(b.model, batches * 400, b.graph, tp.Fisher(seed=1))
    for group, value in exact.items():
        error = found.stderr[group] + tolerances.EXACT * float(value.max())
        assert float(((found.values[group] - value).abs() / error).max()) < tolerances.STDERRS
        assert float((found.stderr[group] / value).max()) < 0.1


def test_fisher_is_one_of_the_signed_sums_of_a_batch(mlp: Built) -> None:
    # The batch's square over its size for some choice of signs, and over all choices on average.
    ((x, y),) = labelled(mlp, 3)
    gradients = [loss_gradients(mlp.model, x[i : i + 1], y[i : i + 1])["2.weight"] for i in range(3)]
    weight = mlp.model[2].weight.detach()
    possible = [
        (weight * sum(s * g for s, g in zip(signs, gradients, strict=True))).flatten() ** 2 / 3
        for signs in product((1, -1), repeat=3)
    ]
    graph = tp.weight_graph(mlp.model, layers=["2"])
    drawn = [tp.score(mlp.model, [(x, y)], graph, tp.Fisher(seed=seed)).values["2.weight"] for seed in range(20)]
    which = {
        min(i for i, p in enumerate(possible) if torch.allclose(d, p, rtol=tolerances.EXACT, atol=0)) for d in drawn
    }
    assert which == {0, 1, 2, 3}  # all four, up to the sign of all


@pytest.mark.parametrize("name", ["mlp", "grouped", "residual"])
def test_fisher_and_taylor_of_single_weights(name: str) -> None:
    b = built(name)
    graph, batches = tp.weight_graph(b.model), labelled(b, 1, 1)
    for criterion, of in ((tp.Fisher(), fisher), (tp.Taylor(), taylor)):
        wanted = of(b.model, batches, graph)
        assert_scores_close(tp.score(b.model, batches, graph, criterion).values, wanted, tolerances.EXACT)


@pytest.mark.parametrize("over", ["all", "consume"])
@pytest.mark.parametrize("name", NAMES)
def test_jacobian_is_the_coherent_effect_on_each_samples_loss(name: str, over: str) -> None:
    b = built(name)
    batches = labelled(b, 3, 2)
    scores = tp.score(b.model, batches, b.graph, tp.Jacobian(over=over))
    assert_scores_close(scores.values, jacobian(b.model, batches, b.graph, over), tolerances.EXACT)
    assert (scores.criterion, scores.samples) == ("jacobian", 5)


@pytest.mark.parametrize(
    ("name", "left_out"), [("vit", ("cls_token", "pos_embed")), ("layerscale", ("block.gamma",)), ("residual", ())]
)
def test_jacobian_names_what_it_leaves_out(
    name: str, left_out: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    b = built(name)
    batches = labelled(b, 3)
    with caplog.at_level(logging.WARNING, "tpvprune"):
        scores = tp.score(b.model, batches, b.graph, tp.Jacobian())
    assert_scores_close(scores.values, jacobian(b.model, batches, b.graph, "all", left_out), tolerances.EXACT)
    told = f"jacobian leaves out {', '.join(left_out)}: used outside layers"
    assert [record.getMessage() for record in caplog.records] == [told] * bool(left_out)


def test_jacobian_sees_each_sample_however_they_are_batched(conv_bn: Built) -> None:
    ((x, y),) = labelled(conv_bn, 6)
    whole = tp.score(conv_bn.model, [(x, y)], conv_bn.graph, tp.Jacobian())
    parts = tp.score(conv_bn.model, [(x[:1], y[:1]), (x[1:], y[1:])], conv_bn.graph, tp.Jacobian())
    assert_scores_close(parts.values, whole.values, tolerances.EXACT)
    assert_scores_close(parts.stderr, whole.stderr, tolerances.EXACT)


@pytest.mark.parametrize("power", [1, 2, 5])
def test_labels_that_the_model_is_sure_of_cost_less(mlp: Built, power: int) -> None:
    # All of them are gradients of the loss: where it is smaller than elsewhere, so are they.
    model = copy.deepcopy(mlp.model)
    with torch.no_grad():
        model[4].weight *= 4 * power
        x = labelled(mlp, 8)[0][0]
        right, wrong = model(x).argmax(1), model(x).argmin(1)
    for criterion in EVERY:
        low, high = (tp.score(model, [(x, y)], mlp.graph, criterion).values for y in (right, wrong))
        assert all(float(low[name].sum()) < float(high[name].sum()) for name in low)


@every
def test_the_labels_count(mlp: Built, criterion: Any) -> None:
    ((x, y),) = labelled(mlp, 5)
    one, other = (tp.score(mlp.model, [(x, t)], mlp.graph, criterion).values for t in (y, (y + 1) % 4))
    assert all(not torch.allclose(one[name], other[name], rtol=0.01) for name in one)


@every
def test_batches_may_be_dicts_and_labels_of_any_whole_type(mlp: Built, criterion: Any) -> None:
    ((x, y),) = labelled(mlp, 5)
    plain = tp.score(mlp.model, [(x, y)], mlp.graph, criterion).values
    for batch in ([x, y], {"image": x, "label": y}, (x, y.to(torch.int8)), (x, y, "more")):
        assert_scores_close(tp.score(mlp.model, [batch], mlp.graph, criterion).values, plain, 0)


@every
def test_batches_without_labels_are_refused(mlp: Built, criterion: Any) -> None:
    ((x, y),) = labelled(mlp, 5)
    name = type(criterion).__name__.lower()
    lacking = [(batch, "none") for batch in (x, (x,), [x], {"image": x}, (x, None), (x, "label"))]
    lacking += [((x, y.double()), r"float64 of shape \(5,\)"), ((x, y[:, None]), r"int64 of shape \(5, 1\)")]
    lacking += [((x, -y - 1), f"-{int(y.max()) + 1} among them")]
    for batch, had in lacking:
        with pytest.raises(tp.DataError, match=f"criterion {name} needs labels, and the batches hold {had}; give"):
            tp.score(mlp.model, [batch], mlp.graph, criterion)
    for labels in (y[:4], torch.cat([y, y]), y + 4):
        with pytest.raises(tp.DataError, match=rf"criterion {name}: the labels do not fit outputs of shape \(5, 4\)"):
            tp.score(mlp.model, [(x, labels)], mlp.graph, criterion)
    # A later batch is looked at as well.
    with pytest.raises(tp.DataError, match="needs labels"):
        tp.score(mlp.model, [(x, y), x], mlp.graph, criterion)


class Wrapped(nn.Module):
    """A model whose output is made into something else."""

    def __init__(self, inner: nn.Module, after: Any) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.inner(x))


@every
@pytest.mark.parametrize(
    ("after", "shape"),
    [(lambda y: y[:, None], r"\(5, 1, 4\)"), (lambda y: y[:, :1], r"\(5, 1\)"), (lambda y: y[:, 0], r"\(5,\)")],
)
def test_outputs_that_are_no_logits_are_refused(mlp: Built, criterion: Any, after: Any, shape: str) -> None:
    model = Wrapped(mlp.model, after)
    graph = tp.trace(Wrapped(mlp.model, lambda y: y), mlp.inputs)
    with pytest.raises(tp.ModelError, match=rf"needs logits \(batch, classes\), not {shape}"):
        tp.score(model, labelled(mlp, 5), graph, criterion)


@every
def test_the_logits_may_be_one_of_several_outputs(mlp: Built, criterion: Any) -> None:
    graph = tp.trace(Wrapped(mlp.model, lambda y: y), mlp.inputs)
    model = Wrapped(mlp.model, lambda y: {"features": 2 * y, "logits": y})
    plain = tp.score(Wrapped(mlp.model, lambda y: y), labelled(mlp, 5), graph, criterion)
    named = type(criterion)(output="logits")
    assert_scores_close(tp.score(model, labelled(mlp, 5), graph, named).values, plain.values, 0)
    with pytest.raises(tp.ModelError, match="output='key'"):
        tp.score(model, labelled(mlp, 5), graph, criterion)


def test_jacobian_refuses_single_weights(mlp: Built) -> None:
    with pytest.raises(tp.InputError, match=r"not single weights \('0.weight'\); use fisher"):
        tp.score(mlp.model, labelled(mlp, 5), tp.weight_graph(mlp.model), tp.Jacobian())
    with pytest.raises(tp.InputError, match="over='produce' must be"):
        tp.Jacobian(over="produce")  # type: ignore[arg-type]


@every
@pytest.mark.parametrize("name", ["conv_bn", "residual", "mlp", "depthwise"])
def test_the_criterion_promise_is_kept(name: str, criterion: Any) -> None:
    b = built(name)
    check_criterion(criterion, b.model, labelled(b, 3, 2), b.graph)


@every
def test_float32_scores_are_those_of_float64(conv_bn: Built, criterion: Any) -> None:
    batches = labelled(conv_bn, 4, 3)
    wide = tp.score(conv_bn.model, batches, conv_bn.graph, criterion)
    narrow = copy.deepcopy(conv_bn.model).float()
    found = tp.score(narrow, [(x.float(), y) for x, y in batches], conv_bn.graph, criterion).values
    assert_scores_close({n: v.double() for n, v in found.items()}, wide.values, tolerances.FLOAT32)
