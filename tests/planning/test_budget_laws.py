"""Laws that every plan keeps, whatever the network, the scores, the allocator and the budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tpvprune as tp
from tests.helpers import NAMES, built
from tests.planning.test_allocate import random_scores
from tests.planning.test_joint import made_up, scores_of
from tpvprune.planning.allocate import ALLOCATORS

STEADY = settings(max_examples=60, deadline=None, derandomize=True)
QUANTITIES = st.sampled_from(["macs", "params", "bytes", "units"])
NETS = st.sampled_from(NAMES)
CHOICES = st.sampled_from(ALLOCATORS)
SEEDS = st.integers(0, 99)


def scored(graph: tp.Graph, seed: int, allocator: str) -> tp.Scores:
    if allocator == "joint":
        return scores_of(graph, made_up(graph, seed))
    return random_scores(graph, seed)


def planned(graph: tp.Graph, seed: int, allocator: Any, budget: tp.Budget) -> tp.Plan:
    """A plan; an example whose budget lies below the floor is none."""
    try:
        return tp.allocate(scored(graph, seed, allocator), graph, budget, allocator=allocator)
    except tp.BudgetError as error:
        assume("cannot be reached" not in str(error))
        raise


@STEADY
@given(NETS, QUANTITIES, st.floats(0.3, 1), CHOICES, SEEDS, st.sampled_from([None, 1, 2]))
def test_met(name: str, quantity: str, share: float, allocator: str, seed: int, round_to: int | None) -> None:
    graph = built(name).graph
    plan = planned(graph, seed, allocator, tp.Budget(**{quantity: share}, round_to=round_to, min_keep=0.01))
    assert graph.cost(quantity, plan.keep) <= share * graph.cost(quantity) * (1 + 1e-9)
    assert plan.made_by["got"] == {quantity: graph.cost(quantity, plan.keep)}


@STEADY
@given(NETS, st.floats(0.3, 0.95), CHOICES, SEEDS, st.data())
def test_protected_layers_lose_nothing(name: str, share: float, allocator: str, seed: int, data: Any) -> None:
    graph = built(name).graph
    layer = data.draw(st.sampled_from(sorted({m.layer for g in graph.groups for m in g.members})))
    plan = planned(graph, seed, allocator, tp.Budget(macs=share, round_to=1, min_keep=0.01, protect=(layer,)))
    sizes = graph.sizes(plan.keep)
    for tensor, shape in graph.shapes.items():
        if tensor.rpartition(".")[0] == layer:
            assert sizes[tensor] == shape


@STEADY
@given(NETS, st.floats(0.3, 0.95), CHOICES, SEEDS, st.floats(0.05, 0.9))
def test_floors_hold(name: str, share: float, allocator: str, seed: int, floor: float) -> None:
    graph = built(name).graph
    plan = planned(graph, seed, allocator, tp.Budget(macs=share, round_to=1, min_keep=floor))
    for group in graph.groups:
        assert int(plan.mask(group.id).sum()) >= floor * group.units - 1e-6


@STEADY
@given(NETS, st.floats(0.4, 0.95), CHOICES, SEEDS)
def test_the_order_of_groups_is_nothing(name: str, share: float, allocator: str, seed: int) -> None:
    graph = built(name).graph
    turned = dataclasses.replace(graph, groups=graph.groups[::-1])
    scores = scored(graph, seed, allocator)
    if scores.sensitivities is not None:
        known = scores.sensitivities
        columns = torch.cat(list(torch.arange(graph.units).split([n for _, n in known.groups]))[::-1])
        scores = dataclasses.replace(
            scores,
            sensitivities=tp.Sensitivities(
                known.groups[::-1], known.rows[:, columns], known.linear[columns], known.samples
            ),
        )
    budget = tp.Budget(macs=share, round_to=1, min_keep=0.01)
    one = planned(graph, seed, allocator, budget)
    other = tp.allocate(scores, turned, budget, allocator=allocator)  # type: ignore[arg-type]
    if allocator in ("uniform", "isomorphic"):  # where shares are equal, the first group goes first
        assert abs(one.macs - other.macs) <= 0.1 * graph.macs()
    else:
        assert one.diff(other) == {}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from(["macs", "params", "bytes"]), CHOICES, SEEDS)
def test_less_is_asked_less_is_left(quantity: str, allocator: str, seed: int) -> None:
    # Wide enough for steps of less than a hundredth: a budget that is two hundredths smaller leaves a smaller model.
    model = torch.nn.Sequential(
        torch.nn.Linear(50, 120), torch.nn.ReLU(), torch.nn.Linear(120, 90), torch.nn.ReLU(), torch.nn.Linear(90, 10)
    )
    graph = tp.trace(model, torch.randn(1, 50))
    scores = scored(graph, seed, allocator)
    shares = [0.9, 0.88, 0.6, 0.58, 0.3, 0.28]
    left = [
        tp.allocate(scores, graph, tp.Budget(**{quantity: s}, round_to=1), allocator=allocator)  # type: ignore[arg-type]
        for s in shares
    ]
    costs = [graph.cost(quantity, plan.keep) for plan in left]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(shares)
    for cost, share in zip(costs, shares, strict=True):
        assert 0.985 * share <= cost / graph.cost(quantity) <= share


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_pattern_that_matches_nothing_is_an_error(residual, allocator: str) -> None:
    budget = tp.Budget(macs=0.8, protect=("b1*", "nothing.*"))
    with pytest.raises(tp.BudgetError, match=r"'nothing\.\*' matches no layer"):
        tp.allocate(scored(residual.graph, 0, allocator), residual.graph, budget, allocator=allocator)  # type: ignore[arg-type]
