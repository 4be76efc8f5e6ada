"""Joint plans against a greedy choice that evaluates the whole plan's drift for every candidate."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import tpvprune as tp
from tests import tolerances
from tests.helpers import built
from tpvprune.planning import joint
from tpvprune.planning.joint import Joint

NETS = ("conv_bn", "residual", "concat")
RHO = 0.3


def made_up(graph: tp.Graph, seed: int, samples: int = 12, positive: bool = False) -> tp.Sensitivities:
    """Rows with common parts, so that units neither cancel by chance alone nor ignore each other."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(samples, 2, generator=generator) @ torch.randn(2, graph.units, generator=generator)
    rows = common + 0.3 * torch.randn(samples, graph.units, generator=generator)
    rows = rows.abs() if positive else rows
    linear = 0.2 * torch.rand(graph.units, generator=generator, dtype=torch.float64)
    return tp.Sensitivities(tuple((g.id, g.units) for g in graph.groups), rows, linear, samples)


def scores_of(graph: tp.Graph, known: tp.Sensitivities) -> tp.Scores:
    alone = known.linear.double() + known.rows.double().square().sum(0) / known.samples
    values = dict(zip((g.id for g in graph.groups), alone.split([g.units for g in graph.groups]), strict=True))
    return tp.Scores(values, None, "made up", known.samples, 1, 0, graph.model_id, sensitivities=known)


def drift(known: tp.Sensitivities, gone: list[int], rho: float) -> float:
    """`sum of linear + (1 - rho) |R 1|^2 + rho sum of |R_c|^2`, over samples, written out."""
    rows = known.rows.double().numpy()[:, gone]
    together, alone = (rows.sum(1) ** 2).sum(), (rows**2).sum()
    return float(known.linear[gone].sum()) + float((1 - rho) * together + rho * alone) / known.samples


def places(graph: tp.Graph) -> dict[str, list[int]]:
    ends = list(itertools.accumulate(g.units for g in graph.groups))
    return {g.id: list(range(end - g.units, end)) for g, end in zip(graph.groups, ends, strict=True)}


def masks(graph: tp.Graph, gone: list[int]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([c not in gone for c in columns]) for name, columns in places(graph).items()}


def macs_without(graph: tp.Graph, gone: list[int]) -> int:
    return graph.macs(masks(graph, gone))


def brute_force(graph: tp.Graph, known: tp.Sensitivities, bound: int, rho: float, step: int = 1) -> list[int]:
    """Per step: the group whose next `step` units, chosen one by one, add least drift per multiply-add saved."""
    gone: list[int] = []
    while macs_without(graph, gone) > bound:
        candidates = []
        for columns in places(graph).values():
            left = [c for c in columns if c not in gone]
            # Widths are multiples of the step, so that the first step of a group may be shorter.
            count = (len(left) - 1) % step + 1
            if len(left) <= count:
                continue
            chosen: list[int] = []
            for _ in range(count):
                chosen.append(
                    min((c for c in left if c not in chosen), key=lambda c: drift(known, [*gone, *chosen, c], rho))
                )
            added = drift(known, [*gone, *chosen], rho) - drift(known, gone, rho)
            saved = macs_without(graph, gone) - macs_without(graph, [*gone, *chosen])
            candidates.append((added / saved, chosen))
        gone += min(candidates)[1]
    return gone


def steps_taken(graph: tp.Graph, known: tp.Sensitivities, bound: int, rho: float, step: int = 1) -> list[int]:
    """The same by the allocator's own steps, before anything is given back."""
    widths = {g.id: [g.units, *(k for k in range(g.units - 1, 0, -1) if k % step == 0)] for g in graph.groups}
    steps, gone = Joint(graph, widths, known, rho), []
    while macs_without(graph, gone) > bound:
        saving = {}
        for name, columns in places(graph).items():
            if count := steps.next_units(name):
                left = [c for c in columns if c not in gone]
                saving[name] = macs_without(graph, gone) - macs_without(graph, [*gone, *left[:count]])
        name, _ = steps.best(saving)
        gone += [places(graph)[name][unit] for unit in steps.take(name).tolist()]
    return gone


@pytest.mark.parametrize("rho", [0.0, RHO, 1.0])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", range(3))
def test_units_leave_in_the_order_of_a_brute_force_greedy_choice(name: str, seed: int, rho: float) -> None:
    graph = built(name).graph
    known, bound = made_up(graph, seed), round(0.4 * graph.macs())
    wanted = brute_force(graph, known, bound, rho)
    assert len(wanted) > 3
    assert steps_taken(graph, known, bound, rho) == wanted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step", [2, 3])
def test_units_that_leave_together_are_judged_together(step: int, seed: int) -> None:
    # With products above zero no step costs less than its units one by one, and none can hide behind that guess.
    graph = built("residual").graph
    known, bound = made_up(graph, seed, positive=True), round(0.5 * graph.macs())
    wanted = brute_force(graph, known, bound, RHO, step)
    assert steps_taken(graph, known, bound, RHO, step) == wanted


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_what_steps_add_sums_up_to_the_drift_of_the_plan(name: str, step: int) -> None:
    graph = built(name).graph
    known = made_up(graph, 5)
    widths = {g.id: [g.units, *(k for k in range(g.units - 1, 0, -1) if k % step == 0)] for g in graph.groups}
    steps, gone, total = Joint(graph, widths, known, RHO), [], 0.0
    while saving := {name: 7 for name in widths if steps.next_units(name)}:
        name, added = steps.best(saving)
        gone += [places(graph)[name][unit] for unit in steps.take(name).tolist()]
        total += added
    assert len(set(gone)) == len(gone) == graph.units - sum(kept[-1] for kept in widths.values())
    assert total == pytest.approx(drift(known, gone, RHO), rel=tolerances.FLOAT32)
    left = {group: ~mask for group, mask in masks(graph, gone).items()}
    assert steps.drift(left) == pytest.approx(drift(known, gone, RHO), rel=tolerances.FLOAT32)


@pytest.mark.parametrize("small", [0, 10**9])
@pytest.mark.parametrize("share", [0.7, 0.3])
def test_products_that_are_not_held_give_the_same_plan(
    small: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = built("residual").graph
    scores = scores_of(graph, made_up(graph, 1))
    budget = tp.Budget(macs=share, round_to=1, min_keep=0.01)
    wanted = tp.allocate(scores, graph, budget)
    monkeypatch.setattr(joint, "SMALL", small)
    monkeypatch.setattr(joint, "FRESH", 10**9)
    assert tp.allocate(scores, graph, budget).diff(wanted) == {}


def test_products_that_wait_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = built("residual").graph
    known = made_up(graph, 1)
    monkeypatch.setattr(joint, "SMALL", 0)
    monkeypatch.setattr(joint, "FRESH", 2)
    widths = {g.id: list(range(g.units, 0, -1)) for g in graph.groups}
    steps, gone = Joint(graph, widths, known, RHO), []
    for _ in range(8):
        name, _ = steps.best({name: 1 for name in widths if steps.next_units(name)})
        gone += [places(graph)[name][unit] for unit in steps.take(name).tolist()]
        if not steps._counts[1]:
            left = [c for columns in places(graph).values() for c in columns if c not in gone]
            wanted = [drift(known, [*gone, c], RHO) - drift(known, gone, RHO) for c in left]
            assert steps._adds[left].tolist() == pytest.approx(wanted, rel=tolerances.FLOAT32, abs=1e-6)
    assert gone


def chain(units: int) -> tp.Graph:
    net = torch.nn.Sequential(torch.nn.Linear(3, units), torch.nn.Tanh(), torch.nn.Linear(units, 2))
    return tp.trace(net, torch.zeros(1, 3))


def plan_of(rows: list[list[float]], kept: int, shrinkage: float) -> list[bool]:
    graph = chain(len(rows[0]))
    known = tp.Sensitivities(
        (("0", graph.units),), torch.tensor(rows), torch.zeros(graph.units, dtype=torch.float64), len(rows)
    )
    budget = tp.Budget(units=kept, round_to=1, min_keep=0.01)
    return tp.allocate(scores_of(graph, known), graph, budget, shrinkage=shrinkage).mask("0").tolist()


def test_units_that_cancel_leave_together_and_units_that_add_up_do_not() -> None:
    # Units 0 and 1 cancel; 2 and 3 are the least alone but add up.
    rows = [[2.0, -2.0, 1.9, 1.9, 5.0], [1.0, -1.0, 0.9, 0.9, -5.0]]
    assert plan_of(rows, 3, shrinkage=1.0) == [True, True, False, False, True]
    # One by one, 2 goes first and 1 takes back what it did; exchanging 2 for 0 leaves a pair that does nothing.
    assert plan_of(rows, 3, shrinkage=0.0) == [False, False, True, True, True]


def test_the_linear_part_counts() -> None:
    graph = chain(3)
    rows = torch.tensor([[1.0, 1.1, 1.2]])
    for linear, left in (([0.0, 0.0, 0.0], 0), ([0.5, 0.0, 0.0], 1), ([0.5, 0.4, -0.1], 2)):
        known = tp.Sensitivities((("0", 3),), rows, torch.tensor(linear, dtype=torch.float64), 1)
        plan = tp.allocate(scores_of(graph, known), graph, tp.Budget(units=2, round_to=1), shrinkage=0.0)
        assert np.flatnonzero(~plan.mask("0").numpy()).tolist() == [left]


def test_sensitivities_of_other_groups_are_refused() -> None:
    graph = built("residual").graph
    others = made_up(built("conv_bn").graph, 0)
    scores = dataclasses.replace(scores_of(graph, made_up(graph, 0)), sensitivities=others)
    with pytest.raises(tp.PlanError, match="sensitivities are of other groups than the graph's; score again"):
        tp.allocate(scores, graph, tp.Budget(macs=0.7))


def test_joint_needs_sensitivities_and_auto_does_without() -> None:
    graph = built("residual").graph
    scores = dataclasses.replace(scores_of(graph, made_up(graph, 0)), sensitivities=None)
    budget = tp.Budget(macs=0.7, round_to=1)
    with pytest.raises(tp.PlanError, match=r"needs scores with sensitivities: score with TPV\(sensitivities=1280\)"):
        tp.allocate(scores, graph, budget, allocator="joint")
    auto = tp.allocate(scores, graph, budget)
    assert auto.diff(tp.allocate(scores, graph, budget, allocator="global")) == {}
    assert auto.made_by["allocator"] == "global"
