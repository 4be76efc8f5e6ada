"""Blocks beside everything else that plans are made with: bounds, exchanges, masks of weights, steps, curves."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.block_cases import NAMES, built, gone_with, skipping
from tests.cases import example
from tests.helpers import assert_same_state, gap, outputs, plan_without
from tests.planning.test_joint import made_up, scores_of
from tests.planning.test_trace import macs_of, params_of
from tpvprune import schedule
from tpvprune.planning.exchange import Exchange
from tpvprune.planning.latency import LatencyTable
from tpvprune.planning.layertimes import LayerTimes
from tpvprune.planning.sparsity import sparsify
from tpvprune.planning.weights import weight_graph
from tpvprune.planning.widths import check_reachable, costs_of
from tpvprune.plots import draw

STEADY = settings(max_examples=80, deadline=None, derandomize=True)
LAYERS = (nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm)
QUANTITIES = ("macs", "params", "bytes", "units", "latency_ms")
MASKED = ("stages", "inverted", "vit")


def table_of(graph: tp.Graph) -> LatencyTable:
    """Times that rise unevenly with both widths, of every weight with two dimensions or more."""
    weights = [name for name, shape in graph.shapes.items() if name.endswith(".weight") and len(shape) > 1]
    layers = {}
    for place, name in enumerate(weights):
        rows, columns = graph.shapes[name][:2]
        sides, grid = ((name, 0), (name, 1)), ((1, rows), (1, columns) if columns > 1 else (1,))
        ms = (1.0, 2.0 + place, 3.0 + place, 5.0 + 2 * place) if columns > 1 else (1.0, 2.0 + place)
        layers[name.removesuffix(".weight")] = LayerTimes(sides, grid, ms)
    blocks = tuple(group.id for group in graph.groups if group.kind == "block")
    return LatencyTable(layers, 7.0, graph.model_id, {}, blocks)


def counted(quantity: str, small: nn.Module, plan: tp.Plan, inputs: Tensor) -> float:
    """What a pruned model costs, without the graph where that can be."""
    if quantity == "macs":
        return macs_of(copy.deepcopy(small), inputs)
    if quantity == "params":
        return params_of(small)
    if quantity == "bytes":
        return sum(tensor.nbytes for tensor in (*small.parameters(), *small.buffers()))
    if quantity == "units":
        return sum(int(plan.mask(group.id).sum()) for group in plan.graph.groups)
    parameters, table = dict(small.named_parameters()), table_of(plan.graph)
    weights = {name: parameters.get(f"{name}.weight") for name in table.layers}
    left = {name: weight.shape[:2] for name, weight in weights.items() if weight is not None}
    return table.fixed + sum(table.layers[name].at(*shape) for name, shape in left.items())


@STEADY
@given(
    st.sampled_from(NAMES),
    st.sampled_from(["joint", "global"]),
    st.lists(st.sampled_from(QUANTITIES), min_size=1, max_size=2, unique=True),
    st.floats(0.3, 0.95),
    st.integers(0, 99),
    st.booleans(),
)
def test_what_a_plan_got_is_what_its_model_costs(
    name: str, allocator: Any, quantities: list[str], share: float, seed: int, held: bool
) -> None:
    b = built(name)
    graph, table = b.graph, table_of(b.graph)
    protect = b.blocks[:1] if held else ()
    budget = tp.Budget(**dict.fromkeys(quantities, share), round_to=1, protect=protect)
    scores = scores_of(graph, made_up(graph, seed))
    try:
        plan = tp.allocate(scores, graph, budget, allocator=allocator, latency=table)
    except tp.BudgetError as error:
        assume("cannot be reached" not in str(error))
        raise
    small = tp.apply(b.model, plan)
    for quantity in quantities:
        got = plan.made_by["got"][quantity]
        assert got == pytest.approx(counted(quantity, small, plan, b.inputs), rel=1e-12)
        assert got == pytest.approx(costs_of(quantity, graph, plan.keep, latency=table).total, rel=1e-12)
        assert got <= share * costs_of(quantity, graph, latency=table).total * (1 + 1e-9)
    assert plan.params == params_of(small)
    assert plan.macs == macs_of(copy.deepcopy(small), b.inputs)
    assert plan.removed == graph.units - counted("units", small, plan, b.inputs)
    for block in b.blocks:
        assert all(not plan.mask(n).any() for n in graph.within(block)) or plan.mask(block).all()
    assert all(plan.mask(block).all() for block in protect)


@pytest.mark.parametrize("allocator", ["uniform", "isomorphic"])
@pytest.mark.parametrize("name", ["stages", "inverted", "vit", "convnext"])
def test_allocators_of_shares_count_right_where_all_blocks_are_held(name: str, allocator: Any) -> None:
    b = built(name)
    table, scores = table_of(b.graph), scores_of(b.graph, made_up(b.graph, 1))
    for quantity in QUANTITIES:
        per_group = dict.fromkeys(b.blocks, 0.1)  # of one unit, and of the layers in the block
        budget = tp.Budget(**{quantity: 0.8}, round_to=1, per_group=per_group)
        plan = tp.allocate(scores, b.graph, budget, allocator=allocator, latency=table)
        small = tp.apply(b.model, plan)
        assert plan.made_by["got"][quantity] == pytest.approx(counted(quantity, small, plan, b.inputs), rel=1e-12)
        assert all(plan.mask(block).all() for block in b.blocks)


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_block_that_stays_costs_what_it_did(name: str, quantity: str) -> None:
    b, table = built(name), table_of(built(name).graph)
    dense = costs_of(quantity, b.graph, latency=table).total
    whole = {block: torch.ones(1, dtype=torch.bool) for block in b.blocks}
    cost = costs_of(quantity, b.graph, whole, latency=table)
    assert cost.total == dense
    assert cost.saving(b.graph[b.blocks[0]], 0) == 0
    cost.remove(b.graph[b.blocks[0]], 0)
    assert cost.total == dense


def test_the_floor_of_held_blocks_counts_them() -> None:
    b = built("mixing")
    with pytest.raises(tp.BudgetError, match=f"the floor is {b.graph.macs():,}"):
        check_reachable(b.graph, tp.Budget(macs=2, protect=b.blocks))
    one = b.graph.macs({b.blocks[1]: torch.zeros(1, dtype=torch.bool)})
    with pytest.raises(tp.BudgetError, match=f"the floor is {one:,}"):
        check_reachable(b.graph, tp.Budget(macs=2, protect=b.blocks[:1]))


@pytest.mark.parametrize("name", ["stages", "vit"])
def test_exchanges_leave_blocks_where_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    b, seen = built(name), []
    improve = Exchange.improve

    def watched(self: Exchange, graph: tp.Graph, gone: dict[str, Tensor], spending: Any) -> None:
        before = {group: mask.clone() for group, mask in gone.items()}
        improve(self, graph, gone, spending)
        lost = graph.lost(before)
        moved = {group for group, mask in before.items() if not torch.equal(mask, gone[group])}
        assert not [group for group in moved if graph[group].kind == "block" or group in lost]
        seen.append((bool(lost), bool(moved)))

    monkeypatch.setattr(Exchange, "improve", watched)
    for seed in range(12):
        scores = scores_of(b.graph, made_up(b.graph, seed))
        tp.allocate(scores, b.graph, tp.Budget(macs=0.55, round_to=1), allocator="joint", shrinkage=0.3)
    assert (True, True) in seen  # units were exchanged while a block was skipped


def masks_for(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    return {name: torch.rand(p.shape, generator=generator) > 0.3 for name, p in weights.items()}


@pytest.mark.parametrize("name", MASKED)
def test_masked_weights_of_a_skipped_block_vanish(name: str) -> None:
    b = built(name)
    masks, block = masks_for(b.model, 2), b.blocks[0]
    plan = tp.Plan(plan_without(b.graph, gone_with(b, [block], 1)).keep, b.graph, {}, masks)
    assert not [tensor for tensor in plan.weights if tensor.startswith(f"{block}.")]
    small = tp.apply(b.model, plan)
    parameters = dict(small.named_parameters())
    assert plan.zeros == sum(int((parameters[tensor] == 0).sum()) for tensor in plan.weights)
    assert plan.nonzero == sum(int((p != 0).sum()) for p in small.parameters())
    again = tp.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.diff(plan) == {}
    assert_same_state(tp.apply(b.model, again).state_dict(), small.state_dict())
    # Masks first and the cut after them, in two plans of which the second is of the model the first one leaves.
    masked = tp.apply(b.model, tp.Plan({}, b.graph, {}, masks))
    later = tp.apply(masked, tp.Plan(plan.keep, b.graph))
    assert_same_state(later.state_dict(), small.state_dict())


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_block_is_skipped_in_the_same_shape_and_stays_so(name: str) -> None:
    b = built(name)
    plan = plan_without(b.graph, {b.blocks[0]: [0]})
    silent, wanted = tp.mask(b.model, plan), outputs(skipping(b.model, b.blocks[:1]), b.inputs)
    assert gap(outputs(silent, b.inputs), wanted) < tolerances.SAME_FUNCTION
    assert {n: p.shape for n, p in silent.named_parameters()} == {n: p.shape for n, p in b.model.named_parameters()}
    batches = [example(16, *b.inputs.shape[1:], seed=seed) for seed in (1, 2)]
    refitted = tp.reconstruct(silent, batches, b.model)
    parameters = dict(refitted.named_parameters())
    assert all(not parameters[m.param].any() for m in b.graph[b.blocks[0]].of_role("inside"))


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("name", MASKED)
def test_weights_are_zeroed_after_blocks_have_gone(name: str, scope: Any) -> None:
    b = built(name)
    plan, weights = plan_without(b.graph, gone_with(b, b.blocks[:1], 3)), weight_graph(b.model)
    values = {g.id: torch.rand(g.units, generator=torch.Generator().manual_seed(5)) for g in weights.groups}
    scores = tp.Scores(values, None, "by hand", 0, 0, 0, weights.model_id)
    both = sparsify(scores, weights, 0.5, scope=scope, after=plan)
    small = tp.apply(b.model, both)
    left = [p for n, p in small.named_parameters() if n in values]
    assert both.sparsity == pytest.approx(0.5, abs=0.1)
    assert both.zeros == sum(int((p == 0).sum()) for p in left)
    if scope == "global":
        assert both.zeros == round(0.5 * sum(p.numel() for p in left))
    assert not [n for n in both.made_by["composed"][-1]["stays_dense"] if n.startswith(f"{b.blocks[0]}.")]
    # The same of the model that the first plan leaves.
    cut = tp.apply(b.model, plan)
    now = weight_graph(cut)
    left_values = {g.id: values[g.id][plan.left(g.id).flatten()] for g in now.groups}
    later = tp.Scores(left_values, None, "by hand", 0, 0, 0, now.model_id)
    again = sparsify(later, now, 0.5, scope=scope, after=plan)
    assert again.diff(both) == {}


@pytest.mark.parametrize("name", ["stages", "inverted", "vit"])
@pytest.mark.parametrize("quantity", ["macs", "params", "units", "latency_ms"])
def test_plans_in_steps_skip_blocks_and_are_one_plan(name: str, quantity: str) -> None:
    b, share = built(name), 0.5 if quantity == "latency_ms" else 0.4
    batches = [example(8, *b.inputs.shape[1:], seed=seed) for seed in (3, 4)]
    budget, planning = tp.Budget(**{quantity: share}, round_to=1), tp.Planning(steps=3)
    table = table_of(b.graph)
    plan = tp.plan_for(b.model, batches, b.graph, budget, planning=planning, latency=table)
    small = tp.apply(b.model, plan)
    assert plan.made_by["got"] == {quantity: pytest.approx(counted(quantity, small, plan, b.inputs), rel=1e-12)}
    assert plan.made_by["got"][quantity] <= share * costs_of(quantity, b.graph, latency=table).total
    assert plan.params == params_of(small)
    assert plan.graph is b.graph


def test_a_block_skipped_in_an_early_step_stays_so_and_others_go_later() -> None:
    b = built("stages")
    first = plan_without(b.graph, {"stage1.1": [0], "stage2.1.conv1": [1, 2]})
    small = tp.apply(b.model, first)
    now = tp.trace(small, b.inputs, depth=True)
    assert [g.id for g in now.groups if g.kind == "block"] == ["stage1.0", "stage2.1"]
    later = plan_without(now, {"stage2.1": [0], "stem": [2]})
    both = first.compose(later)
    wanted = plan_without(b.graph, {"stage1.1": [0], "stage2.1": [0], "stem": [2]})
    assert both.diff(wanted) == {}
    assert_same_state(tp.apply(small, later).state_dict(), tp.apply(b.model, wanted).state_dict())


def test_steps_that_lose_sight_of_a_block_do_not_count_it_as_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    b, again = built("stages"), schedule.trace

    def without_blocks(*args: Any, depth: bool, **kwargs: Any) -> tp.Graph:
        return again(*args, **kwargs)

    monkeypatch.setattr(schedule, "trace", without_blocks)
    batches, planning = [example(8, *b.inputs.shape[1:], seed=3)], tp.Planning(steps=2)
    with pytest.raises(tp.PlanError, match=r"block 'stage.*' counts as a unit, but cannot be skipped any more"):
        tp.plan_for(b.model, batches, b.graph, tp.Budget(units=0.6, round_to=1), planning=planning)
    plan = tp.plan_for(b.model, batches, b.graph, tp.Budget(macs=0.6, round_to=1), planning=planning)
    assert plan.made_by["got"]["macs"] == plan.macs <= 0.6 * b.graph.macs()


@pytest.mark.parametrize("name", ["stages", "mixing", "vit"])
def test_a_block_has_one_point_of_sensitivity(name: str) -> None:
    b = built(name)
    batches, held_out = [example(16, *b.inputs.shape[1:], seed=2)], [example(8, *b.inputs.shape[1:], seed=5)]
    curves = tp.sensitivity(b.model, batches, b.graph, shares=(0.75, 0.5), held_out=held_out)
    scores = tp.score(b.model, batches, b.graph)
    assert {curve.group for curve in curves.ranked(0.5)} == {group.id for group in b.graph.groups}
    dense = outputs(b.model, held_out[0]).log_softmax(-1)
    for block in b.blocks:
        (point,) = curves[block].points
        assert (point.share, point.kept) == (0.0, 0)
        assert curves[block].at(0.75) == curves[block].at(0.5) == point
        assert point.predicted_kl == pytest.approx(float(scores.values[block][0]) / 2, rel=1e-4)
        skipped = outputs(skipping(b.model, [block]), held_out[0]).log_softmax(-1)
        wanted = float((dense.exp() * (dense - skipped)).sum(-1).mean())
        assert point.measured_kl == pytest.approx(wanted, rel=1e-5, abs=1e-12)
        small = tp.apply(b.model, plan_without(b.graph, {block: [0]}))
        assert point.params_saved == pytest.approx(1 - params_of(small) / params_of(b.model))
    inner = [curve for curve in curves.curves if curve.kind != "block"]
    assert set(curves.ratios()) == ({0.75, 0.5} if inner else set())
    assert tp.SensitivityCurves.from_json(json.loads(json.dumps(curves.to_json()))) == curves


def test_curves_with_blocks_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    b = built("stages")
    curves = tp.sensitivity(b.model, [example(16, *b.inputs.shape[1:], seed=2)], b.graph, shares=(0.5,))
    text = draw(curves).decode()
    assert text.count("block gone") == 1
    assert "stage1.1" in text


@pytest.mark.parametrize("name", NAMES)
def test_inspection_tells_what_a_block_weighs(name: str) -> None:
    b = built(name)
    told = tp.inspect(b.graph, tp.Budget(macs=0.9, protect=b.blocks[:1]))
    rows, inputs = {group.id: group for group in told.groups}, b.inputs
    for block in b.blocks:
        small = tp.apply(b.model, plan_without(b.graph, {block: [0]}))
        share = 1 - macs_of(copy.deepcopy(small), inputs) / b.graph.macs()
        assert rows[block].holds["macs"] == pytest.approx(share)
        assert rows[block].saves["macs"] == pytest.approx(0.0 if block == b.blocks[0] else share)
        assert rows[block].least == (block == b.blocks[0])
        assert (rows[block].writes, rows[block].reads, rows[block].width) == ((), (), 1)
    flat = tp.inspect(tp.trace(b.model, b.inputs))
    deep = tp.inspect(b.graph)
    assert deep.floors["macs"] < flat.floors["macs"]
    assert {row.reason for row in deep.unprunable} <= {row.reason for row in flat.unprunable}
    for row in deep.unprunable:
        assert all(math.isfinite(value) and 0 <= value <= 1 for value in (*row.holds.values(), *row.left.values()))


class Twice(nn.Module):
    """A block that runs two times, and so cannot be skipped; what it reads and writes can shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6, 4)
        self.block = nn.Sequential(_Around())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.block(self.block(x)).mean((2, 3)))


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_a_block_that_cannot_be_skipped_is_no_reason_for_its_layers() -> None:
    graph = tp.trace(Twice().double(), example(2, 3, 5, 5), depth=True)
    (held,) = [layer for layer, reason in graph.skipped.items() if "residual" in reason]
    rows = {row.layers: row for row in tp.inspect(graph).unprunable}
    assert rows[(held,)].holds["macs"] == 0.0
    with pytest.raises(tp.BudgetError, match="1 layer that cannot be pruned"):
        check_reachable(graph, tp.Budget(macs=2))


def test_blocks_are_found_from_an_example_of_zeros() -> None:
    for name in NAMES:
        b = built(name)
        found = tp.trace(b.model, torch.zeros_like(b.inputs), depth=True)
        assert [group.id for group in found.groups] == [group.id for group in b.graph.groups]
    model = built("stages").model
    bare = copy.deepcopy(model)
    for parameter in (p for n, p in bare.named_parameters() if n.endswith("bias")):
        nn.init.zeros_(parameter)
    for norm in (m for m in bare.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.zeros_(norm.running_mean)  # so that zeros stay zeros
    found = tp.trace(bare, torch.zeros(1, 3, 8, 8, dtype=torch.float64), depth=True)
    assert [g.id for g in found.groups if g.kind == "block"] == list(built("stages").blocks)


def test_bundles_are_traced_again_in_steps() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(12, 6, 1)
    )
    model = nn.Sequential(net, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).double().eval()
    inputs = example(8, 3, 6, 6)
    graph = tp.trace(model, inputs, bundles=True)
    assert "bundle" in {group.kind for group in graph.groups}
    budget, planning = tp.Budget(macs=0.5, round_to=1), tp.Planning(steps=2)
    plan = tp.plan_for(model, [inputs], graph, budget, planning=planning)
    small = tp.apply(model, plan)
    assert plan.made_by["got"]["macs"] == macs_of(copy.deepcopy(small), inputs) <= 0.5 * graph.macs()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "convnext"])  # 8 channels, on 8 x 8 pixels
def test_a_measured_table_knows_all_layers_of_a_block(name: str, tmp_path: Path) -> None:
    b = built(name)
    tp.latency_table(b.model, b.graph, b.inputs).save(tmp_path / "table.json")
    table = LatencyTable.load(tmp_path / "table.json")
    assert table.blocks == b.blocks
    dense = table.latency(b.graph)
    for block in b.blocks:
        inside = [n for n, m in b.model.named_modules() if n.startswith(f"{block}.") and isinstance(m, LAYERS)]
        assert inside
        assert set(inside) <= table.within(block)
        own = sum(table.layers[n].ms[-1] for n in table.within(block))
        skipped = {block: torch.zeros(1, dtype=torch.bool)}
        assert dense - table.latency(b.graph, skipped) == pytest.approx(own, rel=1e-9)
        small = tp.apply(b.model, tp.Plan(skipped, b.graph))
        now = tp.trace(small, b.inputs, depth=True)  # which does not say what was skipped
        assert costs_of("latency_ms", now, latency=table).total == pytest.approx(dense - own, rel=1e-9)
