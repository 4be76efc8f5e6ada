"""Latency tables, measured by a clock that moves by a known function of layers' widths.

What a plan is predicted to take is compared with what the model that the plan leaves takes by the same clock.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tpvprune as tp
from tests.fakeclock import FakeClock, called, seconds
from tests.helpers import assert_same_state, built, plan_without, random_gone
from tests.planning.test_allocate import random_scores
from tpvprune.members import WORK
from tpvprune.planning.graph import model_id
from tpvprune.planning.latency import LatencyCost, default_cache
from tpvprune.planning.layertimes import LayerTimes, rising
from tpvprune.planning.narrow import watch
from tpvprune.planning.widths import costs_of
from tpvprune.timing import measured_latency

NETS = (
    "mlp", "conv_bn", "residual", "grouped", "depthwise", "concat", "flatten", "vit", "layernorm_stream", "transposed",
    "shared",
)  # fmt: skip
STEADY = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture
def clock() -> Iterator[FakeClock]:
    with FakeClock().running() as fake:
        yield fake


def table_of(name: str, clock: FakeClock, **kwargs: object) -> tp.LatencyTable:
    b = built(name)
    clock.whole = b.model
    return tp.latency_table(b.model, b.graph, b.inputs, clock=clock, **kwargs)


def whole_of(model: nn.Module, inputs: Tensor, clock: FakeClock) -> float:
    clock.whole = model
    return measured_latency(model, inputs, rounds=1, clock=clock)


def measured_ms(name: str, plan: tp.Plan, clock: FakeClock) -> float:
    """What the model that a plan leaves takes by the clock."""
    return whole_of(tp.apply(built(name).model, plan), built(name).inputs, clock)


# What the table says of plans


@pytest.mark.parametrize("inside", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("name", NETS)
def test_a_plans_latency_is_that_of_the_model_it_leaves(name: str, inside: float, clock: FakeClock) -> None:
    # Times are sums of products of widths here, which straight lines between the widths timed give exactly.
    clock.inside = inside
    graph, table = built(name).graph, table_of(name, clock)
    whole = whole_of(built(name).model, built(name).inputs, clock)
    assert table.latency(graph) == pytest.approx(whole, rel=1e-9)
    for seed in range(3):
        plan = plan_without(graph, random_gone(graph, seed, 0.4))
        got = measured_ms(name, plan, clock)
        assert got < whole
        assert table.latency(graph, plan.keep) == pytest.approx(got, rel=1e-9)
        assert costs_of("latency_ms", graph, plan.keep, latency=table).total == table.latency(graph, plan.keep)


@pytest.mark.parametrize("name", NETS)
def test_layers_are_timed_at_the_widths_that_plans_leave(name: str, clock: FakeClock) -> None:
    # Any layer at the widths of a plan is called on the shapes that it meets, and has, in the model the plan leaves.
    b = built(name)
    plan = plan_without(b.graph, random_gone(b.graph, 0, 0.4))
    small, sizes = tp.apply(b.model, plan), b.graph.sizes(plan.keep)
    with torch.no_grad():
        seen = watch(b.model, b.graph, lambda: b.model(b.inputs))
        meets: dict[str, list[object]] = {}
        handles = [
            module.register_forward_hook(lambda m, a, _, n=n: meets.setdefault(n, []).append(called(m, a[0])))
            for n, module in small.named_modules()
        ]
        small(b.inputs)
    for handle in handles:
        handle.remove()
    owners = {m.layer for g in b.graph.groups for m in g.members if not any(b.model.get_submodule(m.layer).children())}
    assert owners <= {layer.name for layer in seen.layers}
    for layer in seen.layers:
        if WORK not in layer.name:
            clock.calls.clear()
            layer.at(tuple(sizes[side.tensor][side.dim] for side in layer.sides))()
            assert clock.calls[0] in meets[layer.name], layer.name
            assert len(meets[layer.name]) == layer.calls


def test_the_rest_goes_with_what_layers_write(clock: FakeClock) -> None:
    # Of 5 s that no module takes, each layer's share is that of the numbers it writes; what cannot shrink is fixed.
    graph, bare = built("conv_bn").graph, table_of("conv_bn", clock)
    clock.rest = 5.0
    more = table_of("conv_bn", clock)
    assert more.latency(graph) == pytest.approx(bare.latency(graph) + 5e3, rel=1e-9)
    written = {"conv1": 6 * 36, "conv2": 5 * 9, "fc": 4}
    for name, times in more.layers.items():
        share = 5e3 * written.get(name, 0) / sum(written.values()) if name != "fc" else 0.0
        assert times.ms[-1] - bare.layers[name].ms[-1] == pytest.approx(share, rel=1e-9, abs=1e-6), name
    assert more.fixed - bare.fixed == pytest.approx(5e3 * 4 / sum(written.values()))
    half = {"conv1": torch.arange(6) < 3}
    saved = bare.latency(graph) - bare.latency(graph, half) + 5e3 * written["conv1"] / sum(written.values()) / 2
    assert more.latency(graph) - more.latency(graph, half) == pytest.approx(saved, rel=1e-9)


def test_what_no_group_touches_is_fixed(clock: FakeClock) -> None:
    b = built("uneven")  # its convolution cannot be pruned, and works as long whatever is
    table = table_of("uneven", clock)
    assert "conv" not in table.layers
    assert table.fixed == pytest.approx(1e3 * seconds(b.model.get_submodule("conv"), b.inputs), rel=1e-9)


def test_modules_that_add_up_to_more_than_the_model_are_scaled_down(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a device whose work is waited for after each of them.
    graph, bare = built("conv_bn").graph, table_of("conv_bn", clock)
    monkeypatch.setattr("tpvprune.planning.latency.measured_latency", lambda *args, **kwargs: bare.latency(graph) / 2)
    table = table_of("conv_bn", clock)
    assert table.fixed == pytest.approx(0, abs=1e-9)
    for name, times in table.layers.items():
        assert times.ms == pytest.approx([ms / 2 for ms in bare.layers[name].ms])


class Compiled(nn.Module):
    """A compiled model in which what is not a matrix product takes a third."""

    def __init__(self, model: nn.Module, clock: FakeClock, light: float) -> None:
        super().__init__()
        self.model, self.clock, self.light = model, clock, light

    def forward(self, x: Tensor) -> Tensor:
        self.clock.light = self.light
        try:
            return self.model(x)
        finally:
            self.clock.light = 1.0


def test_compiled_models_take_less_for_what_is_no_matrix_product(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.inside = 2.0
    graph, eager = built("conv_bn").graph, table_of("conv_bn", clock)
    monkeypatch.setattr(torch, "compile", lambda model: Compiled(model, clock, 1 / 3))
    table = table_of("conv_bn", clock, compiled=True)
    assert table.measured["mode"] == "compiled"
    for name, times in table.layers.items():
        by = 1 / 3 if name.startswith("bn") else 1.0
        assert times.ms == pytest.approx([by * ms for ms in eager.layers[name].ms], rel=1e-9), name
    monkeypatch.setattr(torch, "compile", lambda model: Compiled(model, clock, 5.0))
    slower = table_of("conv_bn", clock, compiled=True)
    ratio = slower.latency(graph) / eager.latency(graph)
    assert ratio > 1
    for name, times in slower.layers.items():
        assert times.ms == pytest.approx([ratio * ms for ms in eager.layers[name].ms], rel=1e-9), name


class Stubborn(nn.Module):
    """Mixes channels that it takes to be twelve."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), 3, 4).transpose(1, 2).reshape(len(x), 12)


class Odd(nn.Module):
    """A layer that does not run at other widths, and a model that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(5, 12), Stubborn(), nn.Linear(12, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)) * scale)


def test_a_layer_that_runs_at_no_other_width_is_fixed_and_named(
    clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    model = Odd()
    sides = ("first.weight", 0, "produce"), ("first.bias", 0, "produce"), ("last.weight", 1, "consume")
    twelve = tuple(tp.Member(param, dim, None, role) for param, dim, role in sides)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    graph = tp.Graph((tp.Group("first", "channel", 12, twelve, True, ""),), shapes, {}, model_id(model), {})
    with caplog.at_level(logging.WARNING):
        table = tp.latency_table(model, graph, {"x": torch.randn(2, 5), "scale": torch.ones(1)}, clock=clock)
    assert "mix cannot be timed at other widths" in caplog.text
    assert set(table.layers) == {"first", "last"}
    keep = {"first": torch.arange(12) < 6}
    assert table.latency(graph) == pytest.approx(12 * 8)
    assert table.latency(graph, keep) == pytest.approx(6 * 8)
    again = tp.latency_table(model, graph, (torch.randn(2, 5), torch.ones(1)), clock=clock)
    assert again.latency(graph, keep) == pytest.approx(6 * 8)


# The cost that the allocators see


@pytest.mark.parametrize("name", NETS)
def test_savings_add_up_and_touch_neighbours_alone(name: str, clock: FakeClock) -> None:
    clock.rest = 0.3
    graph, table = built(name).graph, table_of(name, clock)
    cost, keep = LatencyCost(graph, table), {}
    for group in graph.groups:
        others = {g.id: cost.saving(g, 1) for g in graph.groups}
        before, saved = cost.total, cost.saving(group, 1)
        assert saved >= 0
        cost.remove(group, 1)
        assert cost.total == pytest.approx(before - saved)
        assert cost.saving(group, -1) == pytest.approx(-saved)
        keep[group.id] = torch.arange(group.units) > 0
        assert cost.total == table.latency(graph, keep)
        assert cost.touches(group, group)
        for other, was in others.items():
            if not cost.touches(group, graph[other]):
                assert cost.saving(graph[other], 1) == was
    for group in graph.groups:
        cost.remove(group, -1)
    assert cost.total == table.latency(graph)


@pytest.mark.parametrize("name", NETS)
def test_groups_that_share_a_layer_touch(name: str, clock: FakeClock) -> None:
    graph = built(name).graph
    cost = LatencyCost(graph, table_of(name, clock))
    for group in graph.groups:
        for other in graph.groups:
            shared = set(group.layers) & set(other.layers) - {""}
            assert cost.touches(group, other) >= any(layer in cost.table.layers for layer in shared)


def test_the_cost_of_a_pruned_models_graph_is_read_off_the_dense_table(clock: FakeClock) -> None:
    b = built("vit")
    table = table_of("vit", clock)
    keep = {f"blocks.{i}.attn": torch.tensor([True, False, False, False]) for i in range(2)}  # one head: no group more
    plan = tp.Plan({**keep, "blocks.0.mlp.fc1": torch.arange(64) < 40}, b.graph)
    small = tp.apply(b.model, plan)
    again = tp.trace(small, b.inputs)
    assert "blocks.0.attn" not in again
    assert LatencyCost(again, table).total == pytest.approx(table.latency(b.graph, plan.keep))
    with pytest.raises(tp.PlanError, match="measure again"):
        table.latency(again)


@pytest.mark.parametrize("share", [0.9, 0.7])
def test_a_budget_of_milliseconds_is_met(share: float, clock: FakeClock) -> None:
    graph, table = built("residual").graph, table_of("residual", clock)
    whole = table.latency(graph)
    budget = tp.Budget(latency_ms=share, round_to=1, min_keep=0.01)
    plan = tp.allocate(random_scores(graph), graph, budget, latency=table)
    got = table.latency(graph, plan.keep)
    assert plan.made_by["got"]["latency_ms"] == pytest.approx(got)
    assert 0.8 * share * whole < got <= share * whole * (1 + 1e-9)
    assert measured_ms("residual", plan, clock) == pytest.approx(got)
    both = tp.Budget(latency_ms=f"{share * whole} ms", macs=0.6, round_to=1, min_keep=0.01)
    plan = tp.allocate(random_scores(graph), graph, both, latency=table)
    assert plan.macs <= 0.6 * graph.macs()
    assert table.latency(graph, plan.keep) <= share * whole * (1 + 1e-9)


def test_milliseconds_need_a_table_of_the_model(clock: FakeClock) -> None:
    graph = built("residual").graph
    with pytest.raises(
        tp.PlanError, match=r"latency_ms needs a table of the machine at hand; give latency=tpvprune\.latency_table"
    ):
        tp.allocate(random_scores(graph), graph, tp.Budget(latency_ms=0.5))
    with pytest.raises(tp.PlanError, match="the latency table is of model"):
        tp.allocate(random_scores(graph), graph, tp.Budget(latency_ms=0.5), latency=table_of("conv_bn", clock))
    table = table_of("residual", clock)
    with pytest.raises(tp.BudgetError, match=r"latency_ms <= 0\.0001 cannot be reached: the floor is"):
        tp.allocate(random_scores(graph), graph, tp.Budget(latency_ms="0.0001 ms"), latency=table)


# Times between and beyond the widths timed

TABLE = st.lists(st.floats(0, 10), min_size=12, max_size=12)


@STEADY
@given(TABLE, st.integers(0, 90), st.integers(0, 90), st.integers(0, 9), st.integers(0, 9))
def test_less_is_never_slower(ms: list[float], out: int, into: int, more_out: int, more_into: int) -> None:
    grids = ((8, 16, 40, 64), (4, 32, 64))
    times = LayerTimes((("w", 1), ("w", 0)), grids, rising(ms, (4, 3)))
    assert times.at(out, into) <= times.at(out + more_out, into + more_into) + 1e-9
    for i, a in enumerate(grids[0]):
        for j, b in enumerate(grids[1]):
            assert times.at(a, b) == times.ms[3 * i + j]
            most = max(ms[3 * k + m] for k in range(i + 1) for m in range(j + 1))
            least = min(ms[3 * k + m] for k in range(i, 4) for m in range(j, 3))
            assert times.ms[3 * i + j] == pytest.approx((most + least) / 2)


def test_times_that_rise_are_left_as_they_are() -> None:
    assert rising([1.0, 2.0, 2.0, 5.0, 7.5, 9.0], (2, 3)) == (1.0, 2.0, 2.0, 5.0, 7.5, 9.0)
    assert rising([3.0, 1.0], (2,)) == (2.0, 2.0)


def test_between_widths_times_lie_on_straight_lines() -> None:
    times = LayerTimes((("w", 0), ("w", 1)), ((10, 20), (100, 300)), (1.0, 2.0, 3.0, 8.0))
    assert times.at(15, 100) == pytest.approx(2.0)
    assert times.at(10, 150) == pytest.approx(1.25)
    assert times.at(15, 200) == pytest.approx(3.5)
    assert times.at(5, 50) == 1.0
    assert times.at(50, 500) == 8.0
    assert LayerTimes((("w", 0),), ((4, 8, 16),), (1.0, 3.0, 4.0)).at(10) == pytest.approx(3.25)
    more = times.scaled(2.0, 3.0)
    assert more.ms == pytest.approx((2 * 1 + 1, 2 * 2 + 3, 2 * 3 + 1, 2 * 8 + 3))


def test_timed_widths_are_ones_that_a_plan_can_leave(clock: FakeClock) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 96, 1), nn.ReLU(), nn.Conv2d(96, 96, 3, groups=4), nn.Conv2d(96, 20, 1), nn.Flatten(),
        nn.Linear(80, 100), nn.Linear(100, 3),
    )  # fmt: skip
    graph = tp.trace(model, torch.randn(1, 3, 4, 4))
    table = tp.latency_table(model, graph, torch.randn(1, 3, 4, 4), clock=clock)
    assert table.layers["0"].widths == ((8, 24, 48, 72, 96),)
    assert table.layers["1"].widths == ((8, 24, 48, 72, 96),)
    assert table.layers["2"].widths == ((2, 6, 12, 18, 24), (8, 24, 48, 72, 96))
    assert table.layers["5"].widths == ((8, 16, 40, 64, 80), (8, 24, 48, 72, 100))
    heads = table_of("vit", clock).layers[f"blocks.0.attn{WORK}attention"]
    assert heads.widths == ((4, 8, 12, 16),)


# Files and caches


@pytest.mark.parametrize("change", ["batch", "threads", "dtype", "compiled", "stride", "groups"])
def test_a_table_is_taken_from_the_cache_under_the_same_conditions_alone(
    change: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = table_of("conv_bn", clock, cache=tmp_path)
    now = clock.now
    assert table_of("conv_bn", clock, cache=tmp_path) == first
    assert clock.now == now
    b = built("conv_bn")
    model, graph, inputs = copy.deepcopy(b.model), b.graph, b.inputs
    if change == "batch":
        inputs = inputs[:1]
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    elif change == "dtype":
        model, inputs = model.float(), inputs.float()
    elif change == "compiled":
        monkeypatch.setattr(torch, "compile", lambda model: model)
    elif change == "stride":
        model.conv2.stride = (1, 1)
    else:
        graph = tp.Graph(graph.groups[1:], graph.shapes, graph.reuse, graph.model_id, {})
    tp.latency_table(model, graph, inputs, cache=tmp_path, clock=clock, compiled=change == "compiled")
    assert clock.now > now
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_a_damaged_table_in_the_cache_is_made_anew(clock: FakeClock, tmp_path: Path) -> None:
    first = table_of("conv_bn", clock, cache=tmp_path)
    (file,) = tmp_path.glob("*.json")
    file.write_text("{")
    again, graph = table_of("conv_bn", clock, cache=tmp_path), built("conv_bn").graph
    assert again.latency(graph) == pytest.approx(first.latency(graph))
    assert tp.LatencyTable.load(file) == again


@pytest.mark.parametrize(("factor", "disturbed"), [(1.5, True), (0.6, True), (1.2, False)])
def test_a_table_of_a_busy_machine_is_said_to_be_one(
    factor: float, disturbed: bool, clock: FakeClock, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def change(*_: object) -> None:
        clock.inside = factor

    with caplog.at_level(logging.WARNING):
        table_of("conv_bn", clock, cache=tmp_path, progress=change)
    (file,) = tmp_path.glob("*.json")
    assert (f"delete {file} and measure again when the machine is idle" in caplog.text) == disturbed


def test_tables_are_files(clock: FakeClock, tmp_path: Path) -> None:
    table, path = table_of("vit", clock), tmp_path / "t.json"
    table.save(path)
    again = tp.LatencyTable.load(path)
    assert again == table
    assert again.measured["batch"] == list(built("vit").inputs.shape)
    assert again.measured["dtype"] == "torch.float64"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(tp.PlanError, match="format 99"):
        tp.LatencyTable.load(path)
    data["layers"]["head"]["ms"].pop()
    path.write_text(json.dumps(data))
    with pytest.raises(tp.PlanError, match=r"incomplete.*measure again"):
        tp.LatencyTable.load(path)
    del data["layers"]
    path.write_text(json.dumps(data))
    with pytest.raises(tp.PlanError, match="incomplete"):
        tp.LatencyTable.load(path)


def test_the_cache_lies_where_the_system_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "tpvprune" / "latency"


# The model


@pytest.mark.parametrize("name", ["conv_bn", "depthwise", "vit"])
def test_measuring_for_real_leaves_the_model_as_it_was(name: str) -> None:
    b = built(name)
    model = copy.deepcopy(b.model).train()
    model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    told = []
    table = tp.latency_table(model, b.graph, b.inputs, progress=lambda *what: told.append(what))
    assert_same_state(model.state_dict(), state)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert torch.equal(torch.get_rng_state(), rng)
    assert told == [("latency", done, len(told)) for done in range(1, len(told) + 1)]
    assert len(told) == len(table.layers)
    assert table.fixed >= 0
    assert table.latency(b.graph) > 0


def test_an_example_that_does_not_fit_is_named(mlp) -> None:
    with pytest.raises(tp.ModelError, match=r"does not run on an example of shape \(2, 99\)"):
        tp.latency_table(mlp.model, mlp.graph, torch.zeros(2, 99, dtype=torch.float64))
    for measure in (partial(tp.latency_table, mlp.model, mlp.graph), partial(tp.measured_latency, mlp.model)):
        with pytest.raises(tp.ModelError, match="the example input holds no row; give a batch of at least one"):
            measure(mlp.inputs[:0])
    with pytest.raises(tp.PlanError, match="the graph is of model"):
        tp.latency_table(mlp.model, built("conv_bn").graph, mlp.inputs)
    with pytest.raises(tp.ModelError, match="example input is a int"):
        tp.latency_table(mlp.model, mlp.graph, 3)
