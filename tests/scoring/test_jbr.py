"""JBR, the pruning criterion of the TPV paper (arXiv 2512.11089), number for number from its description."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import example
from tests.helpers import assert_same_state, assert_scores_close, built, plan_without, random_gone
from tests.scoring.loops import loss_gradients, squared_slices
from tpvprune.testing import check_criterion
from tpvprune.types import Graph

SURE = 0.9
NAMES = ("mlp", "conv_bn", "residual", "grouped", "depthwise", "flatten", "vit", "shared", "transposed")


@torch.no_grad()
def pseudo_labels(dense: nn.Module, x: Tensor, confidence: float = SURE) -> tuple[Tensor, Tensor]:
    """The dense model's answers, and which of them it is sure of."""
    p = torch.stack([row.exp() / row.exp().sum() for row in dense(x)])
    return p.argmax(1), p.amax(1) > confidence


def jbr(
    model: nn.Module, batches: list[Tensor], graph: Graph, dense: nn.Module | None = None, confidence: float = SURE
) -> dict[str, Tensor]:
    """`mean over batches of sum over members of (sum over a slice of weight * gradient)^2`, loop by loop."""
    scores = {group.id: torch.zeros(group.units, dtype=torch.float64) for group in graph.groups}
    used = []
    for x in batches:
        labels, sure = pseudo_labels(dense or model, x, confidence)
        if not bool(sure.any()):
            continue
        used.append(len(x))
        gradients = loss_gradients(model, x[sure], labels[sure])
        for group in graph.groups:
            scores[group.id] += squared_slices(model, group, gradients) * len(x)
    return {name: value / sum(used) for name, value in scores.items()}


def data(name: str, *sizes: int) -> list[Tensor]:
    return list(example(sum(sizes), *built(name).inputs.shape[1:], seed=11).split(sizes))


@cache
def partly_sure(name: str) -> nn.Module:
    """A case that is sure of some samples of every batch of six, and not of others, by its last layer's scale."""
    model = copy.deepcopy(built(name).model)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.bias -= torch.cat([model(x) for x in data(name, 6, 6)]).mean(0)
        for _ in range(60):
            if all(0 < int(pseudo_labels(model, x)[1].sum()) < len(x) for x in data(name, 6, 6)):
                return model
            last.weight *= 1.2
            last.bias *= 1.2
    raise AssertionError(name)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_papers_description(name: str) -> None:
    model, graph, batches = partly_sure(name), built(name).graph, data(name, 6, 6)
    scores = tp.score(model, batches, graph, tp.JBR())
    assert_scores_close(scores.values, jbr(model, batches, graph), tolerances.EXACT)
    assert all(float(value.max()) > 0 for value in scores.values.values())
    assert (scores.criterion, scores.samples) == ("jbr", 12)


@pytest.mark.parametrize("left_out", [0, 2, 5, 11])
def test_another_confidence_leaves_out_others(left_out: int) -> None:
    model, graph, batches = partly_sure("residual"), built("residual").graph, data("residual", 6, 6)
    with torch.no_grad():
        most = model(torch.cat(batches)).softmax(1).amax(1).sort().values
    confidence = float(most[left_out - 1 : left_out + 1].mean()) if left_out else 0.0
    assert int(pseudo_labels(model, torch.cat(batches), confidence)[1].sum()) == 12 - left_out
    found = tp.score(model, batches, graph, tp.JBR(confidence=confidence)).values
    assert_scores_close(found, jbr(model, batches, graph, confidence=confidence), tolerances.EXACT)


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "residual"])
def test_samples_that_are_not_sure_are_ignored(name: str) -> None:
    model, graph = partly_sure(name), built(name).graph
    (x,) = data(name, 6)
    sure = pseudo_labels(model, x)[1]
    whole = tp.score(model, [x], graph, tp.JBR()).values
    assert_scores_close(tp.score(model, [x[sure]], graph, tp.JBR()).values, whole, tolerances.EXACT)
    # They may be anything else the model is not sure of.
    other = x.clone()
    other[~sure] = x[~sure][0]
    assert_scores_close(tp.score(model, [other], graph, tp.JBR()).values, whole, tolerances.EXACT)


class Fixed(nn.Module):
    """Two classes, of which the first has the probability that stands in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.up.weight.fill_(1)
            self.down.weight.copy_(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
        self.double().eval()

    def forward(self, p: Tensor) -> Tensor:
        return self.down(self.up((p / (1 - p)).log()))


def test_a_sample_at_the_threshold_is_left_out() -> None:
    model, p = Fixed(), torch.tensor([[0.95], [0.9], [0.7]], dtype=torch.float64)
    graph = tp.trace(model, p)
    with torch.no_grad():
        at = float(model(p).softmax(1)[1, 0])
    assert at == pytest.approx(0.9)
    for confidence, used in ((at, 1), (at - 1e-9, 2), (0.7 - 1e-9, 3), (0.1, 3)):
        found = tp.score(model, [p], graph, tp.JBR(confidence=confidence)).values
        alone = tp.score(model, [p[:used]], graph, tp.JBR(confidence=0.0)).values
        assert_scores_close(found, alone, tolerances.EXACT)
    # By hand: the loss is log(1 + e^-z), and either member of either unit has half of z.
    z = float((p[0] / (1 - p[0])).log())
    effect = -(1 - 0.95) * z / 2
    value = tp.score(model, [p[:1]], graph, tp.JBR()).values["up"]
    assert value.tolist() == pytest.approx([2 * effect**2] * 2, rel=tolerances.EXACT)


def test_a_batch_that_nothing_is_left_of_counts_nothing() -> None:
    model, graph = partly_sure("mlp"), built("mlp").graph
    (x,) = data("mlp", 6)
    sure = pseudo_labels(model, x)[1]
    unsure = x[~sure]
    plain = tp.score(model, [x, x[sure]], graph, tp.JBR())
    for batches in ([unsure, x, x[sure]], [x, unsure, unsure, x[sure]], [x, x[sure], unsure]):
        found = tp.score(model, batches, graph, tp.JBR())
        assert_scores_close(found.values, plain.values, tolerances.EXACT)
        assert_scores_close(found.stderr, plain.stderr, tolerances.EXACT)
        assert found.samples == plain.samples == 6 + int(sure.sum())
        assert found.manifest["batches"] == len(batches)


def test_scores_of_nothing_are_refused() -> None:
    model, graph = partly_sure("mlp"), built("mlp").graph
    (x,) = data("mlp", 6)
    unsure = x[~pseudo_labels(model, x)[1]]
    with pytest.raises(tp.InputError, match="jbr could use none of the samples; give more"):
        tp.score(model, [unsure, unsure], graph, tp.JBR())


def test_a_stopped_scoring_goes_on_after_batches_that_counted_nothing(tmp_path) -> None:
    model, graph = partly_sure("mlp"), built("mlp").graph
    first, second = data("mlp", 6, 6)
    unsure = first[~pseudo_labels(model, first)[1]]
    batches = [unsure, first, unsure, second]
    whole = tp.score(model, batches, graph, tp.JBR())
    for stop in (2, 3):

        def some(stop: int = stop) -> Any:
            yield from batches[:stop]
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tp.score(model, some(), graph, tp.JBR(), save=tmp_path / f"{stop}")
        assert tp.Scores.load(tmp_path / f"{stop}").manifest["batches"] == stop
        done = tp.score(model, batches, graph, tp.JBR(), save=tmp_path / f"{stop}")
        assert_scores_close(done.values, whole.values, tolerances.EXACT)
        assert done.manifest == whole.manifest
        assert done.tally.to_json() == whole.tally.to_json()


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "residual", "grouped"])
def test_labels_stay_those_of_the_dense_model(name: str) -> None:
    dense, batches = partly_sure(name), data(name, 6, 6)
    graph = built(name).graph
    small = tp.apply(dense, plan_without(graph, random_gone(graph, 3)))
    now = tp.trace(small, batches[0])
    # The pruned model answers otherwise, and is sure of others.
    labels, sure = pseudo_labels(dense, torch.cat(batches))
    other, other_sure = pseudo_labels(small, torch.cat(batches))
    assert not torch.equal(labels[sure], other[sure]) or not torch.equal(sure, other_sure)
    before = copy.deepcopy(dense.state_dict())
    found = tp.score(small, batches, now, tp.JBR(reference=dense)).values
    assert_scores_close(found, jbr(small, batches, now, dense), tolerances.EXACT)
    assert_same_state(dense.state_dict(), before)
    own = jbr(small, batches, now, confidence=0.0)
    assert_scores_close(tp.score(small, batches, now, tp.JBR(confidence=0.0)).values, own, tolerances.EXACT)
    assert all(not torch.allclose(found[n], own[n], rtol=0.01) for n in found)


def test_a_model_is_its_own_reference() -> None:
    model, graph, batches = partly_sure("conv_bn"), built("conv_bn").graph, data("conv_bn", 6, 6)
    own = tp.score(model, batches, graph, tp.JBR()).values
    named = tp.score(model, batches, graph, tp.JBR(reference=copy.deepcopy(model))).values
    assert_scores_close(named, own, 0)


def test_jbr_is_taylor_on_the_models_own_answers() -> None:
    model, graph, batches = partly_sure("residual"), built("residual").graph, data("residual", 6, 4)
    labelled = [(x, pseudo_labels(model, x)[0]) for x in batches]
    found = tp.score(model, batches, graph, tp.JBR(confidence=0.0)).values
    assert_scores_close(found, tp.score(model, labelled, graph, tp.Taylor()).values, tolerances.EXACT)


def test_a_score_is_the_sum_over_members_and_nothing_else() -> None:
    model, graph, (x,), unit = partly_sure("mlp"), built("mlp").graph, data("mlp", 6), 3
    labels, sure = pseudo_labels(model, x)
    gradient = loss_gradients(model, x[sure], labels[sure])
    row = float((model[2].weight * gradient["2.weight"]).detach()[unit].sum())
    column = float((model[4].weight * gradient["4.weight"]).detach()[:, unit].sum())
    value = float(tp.score(model, [x], graph, tp.JBR()).values["2"][unit])
    assert value == pytest.approx(row**2 + column**2, rel=tolerances.EXACT)


@pytest.mark.parametrize("name", ["mlp", "conv_bn"])
def test_single_weights_are_scored_too(name: str) -> None:
    model, batches = partly_sure(name), data(name, 6, 6)
    graph = tp.weight_graph(model)
    found = tp.score(model, batches, graph, tp.JBR()).values
    assert_scores_close(found, jbr(model, batches, graph), tolerances.EXACT)


class Unreadable:
    def __getattribute__(self, name: str) -> Any:
        raise AssertionError("a label was looked at")


def test_labels_are_not_looked_at() -> None:
    model, graph, (x,) = partly_sure("mlp"), built("mlp").graph, data("mlp", 6)
    plain = tp.score(model, [x], graph, tp.JBR()).values
    for batch in ((x, torch.full((6,), 99)), (x, Unreadable())):
        assert_scores_close(tp.score(model, [batch], graph, tp.JBR()).values, plain, 0)


@pytest.mark.parametrize("confidence", [-0.1, 1.0, 2.0])
def test_a_confidence_that_no_probability_can_exceed_is_refused(confidence: float) -> None:
    with pytest.raises(tp.InputError, match=r"confidence=.* must lie in \[0, 1\)"):
        tp.JBR(confidence=confidence)


def test_outputs_that_are_no_logits_are_refused(mlp) -> None:
    class Wide(nn.Module):
        def __init__(self, wide: bool) -> None:
            super().__init__()
            self.inner, self.wide = mlp.model, wide

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[:, None] if self.wide else self.inner(x)

    graph = tp.trace(Wide(False), mlp.inputs)
    for model, reference in ((Wide(True), None), (Wide(False), Wide(True))):
        with pytest.raises(tp.ModelError, match=r"criterion jbr needs logits \(batch, classes\), not \(5, 1, 4\)"):
            tp.score(model, [mlp.inputs], graph, tp.JBR(reference=reference))


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "residual"])
def test_the_criterion_promise_is_kept(name: str) -> None:
    model, graph, batches = copy.deepcopy(partly_sure(name)), built(name).graph, data(name, 6, 6)
    check_criterion(tp.JBR(), model, batches, graph)
    dense = copy.deepcopy(model).train()
    check_criterion(tp.JBR(reference=dense), model, batches, graph)
    assert_same_state(dense.state_dict(), model.state_dict())
    assert all(module.training for module in dense.modules())
    assert all(p.requires_grad and p.grad is None for p in dense.parameters())
