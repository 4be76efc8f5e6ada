"""TPV against dense Jacobians, and the laws of an estimate."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests import reference, tolerances
from tests.helpers import NAMES, assert_scores_close, built, plan_without, random_gone

HEADS = ("logits", "softmax")
# Parameters that no layer holds whose output would be linear in them; `over="all"` says that it leaves them out.
OUTSIDE = {"vit": {"cls_token", "pos_embed"}, "positions": {"pos"}, "layerscale": {"block.gamma"}}
OUTSIDE["by_hand"] = {"attn.q_bias", "attn.v_bias"}
OUTSIDE["multihead"] = {
    f"{name}.in_proj_{kind}" for name in ("layer.self_attn", "cross") for kind in ("weight", "bias")
}


def without(graph: tp.Graph, params: set[str]) -> tp.Graph:
    groups = tuple(
        tp.Group(g.id, g.kind, g.units, tuple(m for m in g.members if m.param not in params), g.exact_mask, g.signature)
        for g in graph.groups
    )
    return tp.Graph(groups, graph.shapes, graph.reuse, graph.model_id, graph.skipped)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("over", ["consume", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_exact_scores_are_those_of_dense_jacobians(name: str, over: str, head: str) -> None:
    b = built(name)
    scores = tp.score(b.model, [b.inputs], b.graph, tp.TPV(head=head, probes="exact", over=over))
    wanted = reference.tpv(b.model, b.inputs, without(b.graph, OUTSIDE.get(name, set())), head, over)
    assert_scores_close(scores.values, wanted, tolerances.EXACT)
    assert all(float(v.min()) > 0 for v in wanted.values())
    assert (scores.samples, scores.probes) == (len(b.inputs), "exact")


@pytest.mark.parametrize("name", NAMES)
def test_what_all_leaves_out_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    b = built(name)
    with caplog.at_level(logging.WARNING, "tpvprune"):
        tp.score(b.model, [b.inputs], b.graph, tp.TPV(over="all"))
    told = {word.strip(",:") for record in caplog.records for word in record.getMessage().split()}
    assert told & set(b.graph.shapes) == OUTSIDE.get(name, set())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["mlp", "residual", "vit", "grouped"])
def test_drift_of_a_plan_counts_covariances(name: str, head: str) -> None:
    b = built(name)
    gone = random_gone(b.graph, 3, 0.4)
    value, stderr = tp.TPV(head=head, probes="exact").drift(b.model, [b.inputs], plan_without(b.graph, gone))
    assert value == pytest.approx(reference.plan_tpv(b.model, b.inputs, b.graph, gone, head), rel=tolerances.EXACT)
    assert stderr > 0
    scores = tp.score(b.model, [b.inputs], b.graph, tp.TPV(head=head, probes="exact"))
    apart = sum(float(scores.values[n][units].sum()) for n, units in gone.items())
    assert abs(value - apart) > 1e-3 * value


def test_drift_of_one_unit_is_its_score(mlp) -> None:
    criterion = tp.TPV(probes="exact")
    scores = tp.score(mlp.model, [mlp.inputs], mlp.graph, criterion)
    value, stderr = criterion.drift(mlp.model, [mlp.inputs], plan_without(mlp.graph, {"2": [3]}))
    assert value == pytest.approx(float(scores.values["2"][3]), rel=tolerances.EXACT)
    assert stderr == pytest.approx(float(scores.stderr["2"][3]), rel=tolerances.EXACT)


def test_drift_of_nothing_is_nothing(mlp) -> None:
    assert tp.TPV().drift(mlp.model, [mlp.inputs], tp.Plan({}, mlp.graph)) == (0.0, 0.0)


def test_half_the_drift_is_kl_to_second_order() -> None:
    # Scaling down what reads a unit makes its removal a small change, for which the first order is all there is.
    b = built("mlp")
    model = copy.deepcopy(b.model)
    gone, small = {"2": [1]}, 1e-3
    plan = plan_without(b.graph, gone)
    with torch.no_grad():
        model[4].weight[:, 1] *= small
        p, q = model(b.inputs).log_softmax(1), tp.apply(model, plan)(b.inputs).log_softmax(1)
    kl = float((p.exp() * (p - q)).sum(1).mean())
    predicted = tp.TPV(probes="exact").drift(model, [b.inputs], plan)[0] / 2
    assert kl == pytest.approx(predicted, rel=10 * small)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("over", ["consume", "all"])
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "grouped", "vit"])
def test_probes_estimate_the_exact_scores(name: str, over: str, head: str) -> None:
    # One input many times over: then the standard error is that of the probes alone.
    b = built(name)
    one = b.inputs[:1]
    exact = tp.score(b.model, [one], b.graph, tp.TPV(head=head, probes="exact", over=over))
    many = [one.expand(250, *one.shape[1:])] * 4
    found = tp.score(b.model, many, b.graph, tp.TPV(head=head, probes=4, over=over, seed=5))
    assert found.samples == 1000
    for group, value in exact.values.items():
        distance = (found.values[group] - value).abs() / found.stderr[group]
        assert float(distance.max()) < tolerances.STDERRS
        assert float(found.stderr[group].max() / value.max()) < 0.2


@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
def test_twice_the_probes_halve_the_variance(name: str) -> None:
    b = built(name)
    many = b.inputs[:1].expand(5000, *b.inputs.shape[1:])
    one, two = (tp.score(b.model, [many], b.graph, tp.TPV(head="logits", probes=n, seed=n)) for n in (1, 2))
    ratios = torch.cat([one.stderr[g] ** 2 / two.stderr[g] ** 2 for g in one.values])
    assert float(ratios.mean()) == pytest.approx(2, rel=tolerances.HALVED)


def test_stderr_is_that_of_the_mean_over_samples(mlp) -> None:
    criterion = tp.TPV(probes="exact")
    apart = [tp.score(mlp.model, [x.unsqueeze(0)], mlp.graph, criterion) for x in mlp.inputs]
    together = tp.score(mlp.model, [mlp.inputs], mlp.graph, criterion)
    assert all(s.stderr is None for s in apart)
    for group in together.values:
        values = torch.stack([s.values[group] for s in apart])
        wanted = values.std(0) / len(values) ** 0.5
        torch.testing.assert_close(together.stderr[group], wanted, rtol=tolerances.EXACT, atol=0)


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.inner(x)


@pytest.mark.parametrize("name", ["mlp", "residual"])
@pytest.mark.parametrize("probes", [2, "exact"])
def test_scaled_outputs_scale_logit_scores_by_the_square(name: str, probes: int | str) -> None:
    b, s = built(name), 3.0
    values = []
    for factor in (1.0, s):
        model = Scaled(b.model, factor)
        graph = tp.trace(model, b.inputs)
        values.append(tp.score(model, [b.inputs], graph, tp.TPV(head="logits", probes=probes)).values)
    assert_scores_close(values[1], {k: v * s**2 for k, v in values[0].items()}, tolerances.EXACT)


def test_a_constant_added_to_all_logits_changes_no_softmax_score(mlp) -> None:
    moved = copy.deepcopy(mlp.model)
    with torch.no_grad():
        moved[4].bias += 2.5
    criterion = tp.TPV(probes="exact")
    a, b = (tp.score(m, [mlp.inputs], mlp.graph, criterion) for m in (mlp.model, moved))
    assert_scores_close(a.values, b.values, tolerances.EXACT)


@pytest.mark.parametrize("name", ["mlp", "vit"])
@pytest.mark.parametrize("probes", ["exact", 2])
def test_order_and_size_of_batches_do_not_matter(name: str, probes: str | int) -> None:
    b = built(name)
    criterion = tp.TPV(probes="exact") if probes == "exact" else None
    if criterion is None:
        # Random probes are drawn batch by batch: the same batches give the same scores, whatever holds them.
        again = [tp.score(b.model, [b.inputs], b.graph, tp.TPV(probes=2, seed=s)) for s in (1, 1, 2)]
        assert_scores_close(again[0].values, again[1].values, 0)
        assert any(not torch.equal(again[0].values[g], again[2].values[g]) for g in again[0].values)
        return
    whole = tp.score(b.model, [b.inputs], b.graph, criterion)
    parts = [b.inputs[2:], b.inputs[:1], b.inputs[1:2]]
    split = tp.score(b.model, parts, b.graph, criterion)
    assert_scores_close(split.values, whole.values, tolerances.EXACT)
    assert_scores_close(split.stderr, whole.stderr, tolerances.EXACT)


def test_scores_say_how_they_were_made(mlp) -> None:
    scores = tp.score(mlp.model, [mlp.inputs] * 3, mlp.graph, tp.TPV(head="logits", probes=2, over="all", seed=7))
    assert (scores.samples, scores.probes, scores.seed) == (15, 2, 7)
    assert scores.criterion == "tpv(head=logits, over=all)"
    assert scores.model_id == mlp.graph.model_id
    assert all(v.dtype == torch.float64 for v in scores.values.values())


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"probes": 0}, tp.InputError),
        ({"probes": 1.5}, tp.InputError),
        ({"probes": "many"}, tp.InputError),
        ({"over": "half"}, tp.InputError),
        ({"head": "hinge"}, tp.ModelError),
    ],
)
def test_wrong_settings_are_refused(kwargs: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        tp.TPV(**kwargs)


def test_a_user_criterion_is_used(mlp) -> None:
    class Constant:
        def measure(self, model, batches, graph, progress=None):
            values = {g.id: torch.ones(g.units, dtype=torch.float64) for g in graph.groups}
            return tp.Scores(values, None, "constant", 0, 0, 0, graph.model_id)

    assert tp.score(mlp.model, [], mlp.graph, Constant()).criterion == "constant"


def test_a_graph_of_another_model_is_refused(mlp, conv_bn) -> None:
    with pytest.raises(tp.PlanError, match="traced from another"):
        tp.score(conv_bn.model, [conv_bn.inputs], mlp.graph)
    wider = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 4)).double()
    with pytest.raises(tp.PlanError, match=r"'0.weight' is \(9, 6\), the graph says \(8, 6\)"):
        tp.score(wider, [mlp.inputs], mlp.graph)


def test_float32_and_half_precision_models_are_scored(conv_bn) -> None:
    exact = tp.score(conv_bn.model, [conv_bn.inputs], conv_bn.graph, tp.TPV(probes="exact")).values
    # The unit roundoffs of the two types, times what a dozen layers and sums make of them.
    for dtype, relative in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        model = copy.deepcopy(conv_bn.model).to(dtype)
        found = tp.score(model, [conv_bn.inputs.to(dtype)], conv_bn.graph, tp.TPV(probes="exact")).values
        assert_scores_close(found, exact, relative)
