"""Latency tables: timed with a clock that knows what it must find, so that predictions can be checked exactly."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tpvprune as tp
from tests.helpers import assert_same_state, built, plan_without, random_gone
from tests.planning.test_allocate import random_scores
from tpvprune.planning import latency
from tpvprune.planning.latency import LatencyCost, LayerTimes, default_cache
from tpvprune.planning.widths import costs_of
from tpvprune.types import WORK

NETS = ("mlp", "conv_bn", "residual", "grouped", "depthwise", "vit", "transposed")
STEADY = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A layer takes its multiply-adds times a factor; the model all of that and `rest` more."""
    told: dict[str, Any] = {"factor": 1e-3, "rest": 0.0, "timed": 0}
    runs: dict[int, float] = {}
    runner = latency._runner

    def known(layer: nn.Module, shape: Any, sizes: Any, what: Any, device: Any) -> Callable[[], object]:
        run = runner(layer, shape, sizes, what, device)
        assert run() is not None  # the widths fit each other
        runs[id(run)] = told["factor"] * sizes[0] * sizes[1]
        told.setdefault("kept", []).append(run)
        return run

    def fake(named: dict[str, Any], device: Any, **_: Any) -> dict[str, float]:
        told["timed"] += 1
        return {name: runs.get(id(run), told.get("whole", 0.0)) for name, run in named.items()}

    def inside(modules: dict[str, nn.Module], run: Any, device: Any, **_: Any) -> dict[str, float]:
        return {name: told["inside"] * told["factor"] * dense(m.weight) for name, m in modules.items()}

    def dense(weight: torch.Tensor) -> int:
        return weight.shape[0] * weight.shape[1]

    monkeypatch.setattr(latency, "_runner", known)
    monkeypatch.setattr(latency, "milliseconds", fake)
    monkeypatch.setattr(latency, "milliseconds_inside", inside)
    told["inside"] = 1.0
    return told


def table_of(
    name: str, clock: dict[str, Any], rest: float = 0.0, inside: float = 1.0, **kwargs: Any
) -> tp.LatencyTable:
    b = built(name)
    sizes = {n: s for n, s in b.graph.shapes.items() if touched(b.graph, n)}
    clock["inside"] = inside
    clock["whole"] = rest + inside * clock["factor"] * sum(s[0] * (s[1] if len(s) > 1 else 1) for s in sizes.values())
    return tp.latency_table(b.model, b.graph, b.inputs, **kwargs)


def touched(graph: tp.Graph, name: str) -> bool:
    """Weights of linear layers and convolutions, and attention products, that some group holds entries of."""
    members = {m.param for g in graph.groups for m in g.members}
    return name in members and (WORK in name or (name.endswith("weight") and len(graph.shapes[name]) > 1))


@pytest.mark.parametrize("inside", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("name", NETS)
def test_layers_take_what_they_take_inside_the_model(name: str, inside: float, clock: dict[str, Any]) -> None:
    graph = built(name).graph
    table = table_of(name, clock, inside=inside)
    assert set(table.layers) == {n for n in graph.shapes if touched(graph, n)}
    assert table.fixed == pytest.approx(0, abs=1e-9)
    assert LatencyCost(graph, table).total == pytest.approx(clock["whole"])
    for times in table.layers.values():
        for out, row in zip(times.out, times.ms, strict=True):
            for into, ms in zip(times.into, row, strict=True):
                assert ms == pytest.approx(inside * clock["factor"] * out * into)


@pytest.mark.parametrize("name", NETS)
def test_a_plans_latency_is_that_of_its_widths(name: str, clock: dict[str, Any]) -> None:
    # What a layer takes is a product of its widths here, which straight lines between the widths timed give exactly.
    graph, table = built(name).graph, table_of(name, clock)
    for seed in range(3):
        plan = plan_without(graph, random_gone(graph, seed, 0.4))
        sizes = graph.sizes(plan.keep)
        clamped = {
            n: [max(a, g[0]) for a, g in zip([*sizes[n], 1], (t.out, t.into), strict=False)]
            for n, t in table.layers.items()
        }
        wanted = clock["factor"] * sum(a * b for a, b in clamped.values())
        assert costs_of("latency_ms", graph, plan.keep, latency=table).total == pytest.approx(wanted)


@pytest.mark.parametrize("name", NETS)
def test_savings_add_up_and_touch_neighbours_alone(name: str, clock: dict[str, Any]) -> None:
    graph, table = built(name).graph, table_of(name, clock, rest=0.3)
    cost, keep = LatencyCost(graph, table), {}
    for group in graph.groups:
        others = {g.id: cost.saving(g, 1) for g in graph.groups if g.units > 1}
        before, saved = cost.total, cost.saving(group, 1)
        cost.remove(group, 1)
        assert cost.total == pytest.approx(before - saved)
        keep[group.id] = torch.arange(group.units) > 0
        assert cost.total == pytest.approx(costs_of("latency_ms", graph, keep, latency=table).total)
        for other, was in others.items():
            if not cost.touches(group, graph[other]):
                assert cost.saving(graph[other], 1) == was
    for group in graph.groups:
        cost.remove(group, -1)
    assert cost.total == pytest.approx(LatencyCost(graph, table).total)


@pytest.mark.parametrize("name", ["conv_bn", "vit"])
def test_the_rest_goes_with_what_layers_write(name: str, clock: dict[str, Any]) -> None:
    graph = built(name).graph
    bare, more = table_of(name, clock), table_of(name, clock, rest=5.0)
    assert LatencyCost(graph, more).total == pytest.approx(LatencyCost(graph, bare).total + 5.0)
    written = {n: graph.reuse.get(n, 0) * s[0] for n, s in graph.shapes.items() if len(s) > 1}
    for layer, times in more.layers.items():
        if layer in written:
            extra = times.ms[-1][-1] - bare.layers[layer].ms[-1][-1]
            assert extra == pytest.approx(5.0 * written[layer] / sum(written.values()))
    assert 0 <= more.fixed < 5.0


def test_layers_that_add_up_to_more_than_the_model_are_scaled_down(clock: dict[str, Any]) -> None:
    table = table_of("conv_bn", clock)
    clock["whole"] /= 2
    b = built("conv_bn")
    half = tp.latency_table(b.model, b.graph, b.inputs)
    assert half.fixed == pytest.approx(0)
    assert LatencyCost(b.graph, half).total == pytest.approx(LatencyCost(b.graph, table).total / 2)


@STEADY
@given(
    st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=4, max_size=4),
    st.integers(0, 90), st.integers(0, 90), st.integers(0, 9), st.integers(0, 9),
)  # fmt: skip
def test_less_is_never_slower(rows: list[list[float]], out: int, into: int, more_out: int, more_into: int) -> None:
    times = latency._rising((8, 16, 40, 64), (4, 32, 64), rows)
    assert times.at(out, into) <= times.at(out + more_out, into + more_into) + 1e-9
    for i, width in enumerate(times.out):
        for j, inner in enumerate(times.into):
            assert times.at(width, inner) == times.ms[i][j]
            assert times.ms[i][j] == max(rows[a][b] for a in range(i + 1) for b in range(j + 1))


def test_between_widths_times_lie_on_straight_lines() -> None:
    times = LayerTimes((10, 20), (100, 300), ((1.0, 2.0), (3.0, 8.0)))
    assert times.at(15, 100) == pytest.approx(2.0)
    assert times.at(10, 150) == pytest.approx(1.25)
    assert times.at(15, 200) == pytest.approx(3.5)
    assert times.at(5, 50) == 1.0
    assert times.at(50, 500) == 8.0


@pytest.mark.parametrize("share", [0.9, 0.7])
def test_a_budget_of_milliseconds_is_met(share: float, clock: dict[str, Any]) -> None:
    graph, table = built("residual").graph, table_of("residual", clock)
    plan = tp.allocate(
        random_scores(graph), graph, tp.Budget(latency_ms=share, round_to=1, min_keep=0.01), latency=table
    )
    got = costs_of("latency_ms", graph, plan.keep, latency=table).total
    assert plan.made_by["got"]["latency_ms"] == pytest.approx(got)
    assert 0.8 * share * clock["whole"] < got <= share * clock["whole"] * (1 + 1e-9)
    both = tp.Budget(latency_ms=f"{share * clock['whole']} ms", macs=0.6, round_to=1, min_keep=0.01)
    plan = tp.allocate(random_scores(graph), graph, both, latency=table)
    assert plan.macs <= 0.6 * graph.macs()
    assert costs_of("latency_ms", graph, plan.keep, latency=table).total <= share * clock["whole"] * (1 + 1e-9)


def test_milliseconds_need_a_table_of_the_model(clock: dict[str, Any]) -> None:
    graph = built("residual").graph
    with pytest.raises(
        tp.PlanError, match=r"need a table of the machine at hand; give latency=tpvprune\.latency_table"
    ):
        tp.allocate(random_scores(graph), graph, tp.Budget(latency_ms=0.5))
    with pytest.raises(tp.PlanError, match="the latency table is of model"):
        tp.allocate(random_scores(graph), graph, tp.Budget(latency_ms=0.5), latency=table_of("conv_bn", clock))
    table = table_of("residual", clock)
    with pytest.raises(tp.BudgetError, match=r"latency_ms <= 0\.0001 cannot be reached: the floor is"):
        tp.allocate(random_scores(graph), graph, tp.Budget(latency_ms="0.0001 ms"), latency=table)


def test_a_table_is_taken_from_the_cache_under_the_same_conditions(clock: dict[str, Any], tmp_path: Path) -> None:
    first = table_of("conv_bn", clock, cache=tmp_path)
    timed = clock["timed"]
    assert table_of("conv_bn", clock, cache=tmp_path) == first
    assert clock["timed"] == timed
    b = built("conv_bn")
    tp.latency_table(b.model, b.graph, b.inputs[:1], cache=tmp_path)
    assert clock["timed"] > timed
    timed, threads = clock["timed"], torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        table_of("conv_bn", clock, cache=tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert clock["timed"] > timed
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_tables_are_files(clock: dict[str, Any], tmp_path: Path) -> None:
    table = table_of("vit", clock, rest=1.0)
    table.save(tmp_path / "t.json")
    again = tp.LatencyTable.load(tmp_path / "t.json")
    assert again == table
    assert again.measured["batch"] == list(built("vit").inputs.shape)
    data = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(tp.PlanError, match="format 99"):
        tp.LatencyTable.load(tmp_path / "t.json")
    del data["layers"]
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(tp.PlanError, match="incomplete"):
        tp.LatencyTable.load(tmp_path / "t.json")


def test_the_cache_lies_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "tpvprune" / "latency"


@pytest.mark.parametrize("name", ["conv_bn", "vit"])
def test_measuring_for_real_leaves_the_model_as_it_was(name: str) -> None:
    b = built(name)
    model = copy.deepcopy(b.model).train()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    told = []
    table = tp.latency_table(model, b.graph, b.inputs, progress=lambda *what: told.append(what))
    assert_same_state(model.state_dict(), state)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    assert told[-1] == ("latency", len(table.layers), len(table.layers))
    assert LatencyCost(b.graph, table).total > 0


def test_an_example_that_does_not_fit_is_named(mlp) -> None:
    with pytest.raises(tp.ModelError, match=r"does not run on \(2, 99\)"):
        tp.latency_table(mlp.model, mlp.graph, torch.zeros(2, 99, dtype=torch.float64))
