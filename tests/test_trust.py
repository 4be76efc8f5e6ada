"""How far products of units are trusted: measured by plans that cost the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests.cases import example
from tpvprune.planning.joint import estimated_shrinkage
from tpvprune.report import compare
from tpvprune.trust import MEASURED_ON, First, trusted_shrinkage

CHOICE = {"allocator": "auto", "per": None, "shrinkage": None, "latency": None}


def cancelling(seed: int) -> nn.Sequential:
    """A network with channels that sum to a constant before a norm, so that effects cancel to first order alone."""
    generator = torch.Generator().manual_seed(seed)
    layers = (nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 32), nn.LayerNorm(32))
    model = nn.Sequential(*layers, nn.Linear(32, 5)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.7 if p.ndim > 1 else 0.3))
        model[5].weight += 1
        model[4].weight -= model[4].weight.mean(0)
    return model


def drift(model: nn.Module, plan: tp.Plan, batches: list[Tensor]) -> float:
    return compare({"cut": tp.apply(model, plan)}, model, batches)[0]["cut"]["kl"]


def test_plans_drift_less_and_never_more_for_the_same_cost() -> None:
    batches, others = list(example(256, 6).split(64)), list(example(512, 6, seed=5).split(64))
    better = []
    for seed in range(6, 8):
        model = cancelling(seed)
        graph = tp.trace(model, batches[0][:1])
        scores, budget = tp.score(model, batches, graph), tp.Budget(macs=0.6, round_to=1)
        plan = tp.plan_for(model, batches, graph, budget, scores=scores)
        plain = tp.allocate(scores, graph, budget)
        assert plan.macs <= 0.6 * graph.macs()
        assert (plan.made_by["shrinkage"] == plain.made_by["shrinkage"]) == (not plan.diff(plain))
        assert drift(model, plan, batches) <= drift(model, plain, batches) * (1 + 1e-9)
        if plan.diff(plain):
            better.append(drift(model, plan, others) / drift(model, plain, others))
        assert plan.made_by["shrinkage"] >= plain.made_by["shrinkage"] > 0
    assert better
    assert max(better) < 1


@pytest.mark.parametrize(
    ("measured", "share"), [([1.0, 0.95], None), ([1.0, 0.8, 0.75], 0.5), ([1.0, 0.8, 0.7], 0.25), ([1.0, 1.2], None)]
)
def test_less_is_trusted_as_long_as_that_clearly_helps(measured: list[float], share: float | None) -> None:
    model, batches = cancelling(0), list(example(256, 6).split(64))
    graph = tp.trace(model, batches[0][:1])
    scores = tp.score(model, batches, graph)
    assert scores.sensitivities is not None
    told, sizes = iter(measured), []

    def measure(cut: nn.Module) -> float:
        sizes.append(sum(p.numel() for p in cut.parameters()))
        return next(told)

    found = trusted_shrinkage(model, scores, graph, tp.Budget(params=0.5, round_to=1), CHOICE, measure)
    estimated = estimated_shrinkage(scores.sensitivities)
    assert found == (None if share is None else pytest.approx(1 - (1 - estimated) * share))
    assert next(told, None) is None
    assert max(sizes) <= 0.5 * graph.params()


def test_under_drift_what_is_compared_costs_the_same() -> None:
    model, batches = cancelling(1), list(example(256, 6).split(64))
    graph = tp.trace(model, batches[0][:1])
    scores, costs = tp.score(model, batches, graph), []

    def measure(cut: nn.Module) -> float:
        costs.append(tp.trace(cut, batches[0][:1]).macs())
        return 1 / len(costs)

    trusted_shrinkage(model, scores, graph, tp.Budget(drift=0.05, round_to=1), CHOICE, measure)
    assert len(costs) == 3
    assert 0.95 * costs[0] < min(costs)
    assert max(costs) == costs[0] < graph.macs()


def test_what_planning_says_is_not_measured() -> None:
    model, batches = cancelling(4), list(example(256, 6).split(64))
    graph = tp.trace(model, batches[0][:1])
    scores, stages = tp.score(model, batches, graph), []
    budget = tp.Budget(macs=0.6, round_to=1)
    for planning in (tp.Planning(shrinkage=0.2), tp.Planning(allocator="global")):
        plan = tp.plan_for(
            model,
            batches,
            graph,
            budget,
            scores=scores,
            planning=planning,
            progress=lambda *told: stages.append(told[0]),
        )
        assert set(stages) <= {"allocate"}
        choice = {"shrinkage": planning.shrinkage, "allocator": planning.allocator}
        assert not plan.diff(tp.allocate(scores, graph, budget, **choice))
    assert not tp.plan_for(model, iter(batches), graph, budget, scores=scores).diff(tp.allocate(scores, graph, budget))


def test_the_first_batches_are_read_anew() -> None:
    batches = [torch.zeros(MEASURED_ON // 2, 1) for _ in range(5)]
    first = First(batches)
    assert [sum(map(len, first)) for _ in range(2)] == [MEASURED_ON, MEASURED_ON]
    assert sum(map(len, First(batches[:1]))) == MEASURED_ON // 2
