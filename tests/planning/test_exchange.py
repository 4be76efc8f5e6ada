"""Joint plans against the best plan there is, by enumeration, and against plans that no exchange can better."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import tpvprune as tp
from tests import tolerances
from tests.helpers import built
from tests.planning.test_joint import made_up, places, scores_of
from tpvprune.planning.joint import estimated_shrinkage

SHARES = (0.8, 0.6, 0.4)


def small_nets() -> Iterator[tuple[nn.Module, torch.Tensor]]:
    """Twelve units each, in two and in three groups."""
    for seed in range(6):
        torch.manual_seed(seed)
        yield (
            nn.Sequential(
                nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3)
            ),
            torch.randn(200, 6),
        )
        yield (
            nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)),
            torch.randn(200, 2, 8, 8),
        )


def quadratic(known: tp.Sensitivities, rho: float) -> tuple[np.ndarray, np.ndarray]:
    """`Q` and `l` of the drift `l . z + z Q z` of what leaves, `z`."""
    rows = known.rows.double().numpy()
    q = rows.T @ rows / known.samples
    return (1 - rho) * q + rho * np.diag(np.diag(q)), known.linear.numpy()


def gone_of(plan: tp.Plan) -> np.ndarray:
    return torch.cat([~plan.mask(g.id) for g in plan.graph.groups]).double().numpy()


def test_plans_of_small_nets_are_within_a_hundredth_of_the_best() -> None:
    ratios = []
    for net, inputs in small_nets():
        graph = tp.trace(net, inputs[:1])
        assert graph.units == 12
        scores = tp.score(net, [inputs], graph)
        assert scores.sensitivities is not None
        q, linear = quadratic(scores.sensitivities, estimated_shrinkage(scores.sensitivities))
        every = np.array(list(itertools.product([0.0, 1.0], repeat=12)))
        drifts = np.einsum("ni,ij,nj->n", every, q, every) + every @ linear
        columns = places(graph)
        keeps = [{n: torch.tensor(z[c] == 0) for n, c in columns.items()} for z in every]
        whole = np.array([all(bool(mask.any()) for mask in keep.values()) for keep in keeps])
        macs = np.array([graph.macs(keep) for keep in keeps])
        for share in SHARES:
            plan = tp.allocate(scores, graph, tp.Budget(macs=share, round_to=1, min_keep=1e-9))
            z = gone_of(plan)
            best = drifts[whole & (macs <= share * graph.macs())].min()
            ratios.append((z @ q @ z + linear @ z) / best)
    assert min(ratios) >= 1 - 1e-9
    assert float(np.mean(np.array(ratios) <= 1.01)) >= 0.95
    assert max(ratios) < 1.2


@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("name", ["conv_bn", "residual", "concat"])
def test_no_exchange_inside_a_group_lowers_the_drift(name: str, rho: float) -> None:
    graph = built(name).graph
    for seed in range(3):
        known = made_up(graph, seed)
        q, linear = quadratic(known, rho)
        plan = tp.allocate(
            scores_of(graph, known), graph, tp.Budget(macs=0.6, round_to=1, min_keep=0.01), shrinkage=rho
        )
        z = gone_of(plan)
        now = z @ q @ z + linear @ z
        for columns in places(graph).values():
            for i, j in itertools.product((c for c in columns if z[c]), (c for c in columns if not z[c])):
                other = z.copy()
                other[i], other[j] = 0, 1
                assert other @ q @ other + linear @ other >= now - tolerances.FLOAT32 * abs(now) - 1e-9


def test_exchanges_can_be_left_out_and_lower_the_drift_where_they_are_not() -> None:
    graph, lower = built("residual").graph, 0
    for seed in range(6):
        known = made_up(graph, seed)
        q, linear = quadratic(known, 0.0)
        budget = tp.Budget(macs=0.6, round_to=1, min_keep=0.01)
        drifts = []
        for exchange in (False, True):
            plan = tp.allocate(scores_of(graph, known), graph, budget, shrinkage=0.0, exchange=exchange)
            z = gone_of(plan)
            drifts.append(z @ q @ z + linear @ z)
        assert drifts[1] <= drifts[0] * (1 + 1e-6)
        lower += drifts[1] < 0.99 * drifts[0]
    assert lower >= 3


@pytest.mark.parametrize("round_to", [1, 2])
def test_exchanges_keep_the_bounds_the_widths_and_the_floors(round_to: int) -> None:
    graph = built("residual").graph
    for seed in range(5):
        budget = tp.Budget(macs=0.6, params=0.7, round_to=round_to, min_keep=0.3)
        plan = tp.allocate(scores_of(graph, made_up(graph, seed)), graph, budget, shrinkage=0.0)
        assert plan.macs <= 0.6 * graph.macs()
        assert plan.params <= 0.7 * graph.params()
        for group in graph.groups:
            kept = int(plan.mask(group.id).sum())
            assert kept >= 0.3 * group.units
            assert kept == group.units or kept % round_to == 0


@pytest.mark.parametrize("name", ["conv_bn", "residual", "vit"])
def test_nothing_leaves_that_the_bound_does_not_ask_for(name: str) -> None:
    # Slopes that fall say that whatever leaves lowers the drift: no reason to end far below what was asked.
    graph = built(name).graph
    bound = graph.macs() * 7 // 10
    for seed in range(4):
        known = made_up(graph, seed)
        known = dataclasses.replace(known, linear=known.linear - 4.0)
        plan = tp.allocate(scores_of(graph, known), graph, tp.Budget(macs=bound, round_to=1, min_keep=0.01))
        assert plan.macs <= bound
        for group, mask in plan.keep.items():
            back = mask.clone()
            back[(~mask).nonzero()[0]] = True
            assert graph.macs({**plan.keep, group: back}) > bound, (seed, group)


def test_exchanges_do_not_give_up_what_is_ranked_by() -> None:
    # The bound is on units, the ranking per multiply-add: fewer multiply-adds are not given back for less drift.
    graph = built("residual").graph
    budget = tp.Budget(units=graph.units - 6, round_to=1)
    for seed in range(5):
        scores = scores_of(graph, made_up(graph, seed))
        per_unit, per_mac = (tp.allocate(scores, graph, budget, per=per, shrinkage=0.0) for per in ("units", "macs"))
        assert per_mac.macs <= per_unit.macs
