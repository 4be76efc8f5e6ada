"""What `inspect` says of small nets, against numbers worked out by hand, brute-force masks and `allocate`."""

from __future__ import annotations

import json

import pytest
import torch

import tpvprune as tp
from tests.cases import OUTPUT
from tests.helpers import NAMES, built
from tests.planning.test_allocate import random_scores
from tpvprune.planning.inspection import NO_LAYER, OUT_OF_REACH, reasons_of

QUANTITIES = ("macs", "params")


def group_of(told: tp.Inspection, name: str) -> tp.InspectedGroup:
    return next(group for group in told.groups if group.id == name)


def test_shares_of_an_mlp_as_a_person_counts_them(mlp) -> None:
    # 6 -> 8 -> 7 -> 4: weights of 48, 56 and 28 entries, each used once, and a bias everywhere.
    told = tp.inspect(mlp.graph)
    assert told.totals == {"macs": 48 + 56 + 28, "params": 48 + 8 + 56 + 7 + 28 + 4}
    assert told.floors == {"macs": 6 + 1 + 4, "params": 6 + 1 + 1 + 1 + 4 + 4}
    first, second = told.groups
    assert (first.id, first.kind, first.units, first.least, first.width) == ("0", "channel", 8, 1, 8)
    assert (first.writes, first.scales, first.reads) == (("0",), (), ("2",))
    assert first.holds == pytest.approx({"macs": (48 + 56) / 132, "params": (48 + 8 + 56) / 151})
    assert first.saves == pytest.approx({"macs": 7 * (6 + 7) / 132, "params": 7 * (6 + 1 + 7) / 151})
    assert second.saves == pytest.approx({"macs": 6 * (8 + 4) / 132, "params": 6 * (8 + 1 + 4) / 151})
    assert told.untouched == pytest.approx({"macs": 0, "params": 4 / 151})  # the last bias
    (fixed,) = told.unprunable
    assert (fixed.reason, fixed.layers) == (OUTPUT, ("4",))
    assert fixed.holds == pytest.approx({"macs": 28 / 132, "params": 32 / 151})
    assert fixed.left == pytest.approx({"macs": 4 / 132, "params": 8 / 151})
    assert told.asks == ()


def test_shares_of_convolutions_count_positions_and_norms(conv_bn) -> None:
    # conv1: 3 -> 6, 3x3, 36 positions, no bias; conv2: 6 -> 5, 3x3, 9 positions; fc: 5 -> 4.
    told = tp.inspect(conv_bn.graph)
    macs, params = 162 * 36 + 270 * 9 + 20, 162 + 12 + 270 + 5 + 10 + 20 + 4
    assert told.totals == {"macs": macs, "params": params}
    first = group_of(told, "conv1")
    assert (first.writes, first.scales, first.reads) == (("conv1",), ("bn1",), ("conv2",))
    assert first.holds == pytest.approx({"macs": (162 * 36 + 270 * 9) / macs, "params": (162 + 12 + 270) / params})
    assert told.floors == {"macs": 27 * 36 + 9 * 9 + 4, "params": 27 + 2 + 9 + 1 + 2 + 4 + 4}


@pytest.mark.parametrize("name", NAMES)
def test_the_floor_is_what_allocate_reaches_and_nothing_below_it_is(name: str) -> None:
    graph = built(name).graph
    told = tp.inspect(graph)
    for quantity in QUANTITIES:
        floor = told.floors[quantity]
        plan = tp.allocate(random_scores(graph), graph, tp.Budget(**{quantity: str(floor)}))
        assert graph.cost(quantity, plan.keep) == floor
        with pytest.raises(tp.BudgetError, match=f"the floor is {floor:,} "):
            tp.allocate(random_scores(graph), graph, tp.Budget(**{quantity: str(floor - 1)}))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_group_saves_alone_is_what_its_plan_saves(name: str) -> None:
    graph = built(name).graph
    for group in tp.inspect(graph).groups:
        mask = torch.arange(group.units) < group.least
        for quantity in QUANTITIES:
            left = graph.cost(quantity, {group.id: mask})
            assert group.saves[quantity] == pytest.approx(1 - left / graph.cost(quantity), abs=1e-12)
            assert group.holds[quantity] >= group.saves[quantity]
            assert (group.saves[quantity] > 0) == (group.least < group.units)


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_that_stays_whole_stands_under_one_reason(name: str) -> None:
    graph = built(name).graph
    told = [layer for row in tp.inspect(graph).unprunable for layer in row.layers if layer in graph.skipped]
    assert sorted(told) == sorted(graph.skipped)


def test_a_layer_that_stays_whole_is_still_narrowed_by_what_it_reads() -> None:
    # conv: 3 -> 8, 3x3, 9 positions; a: 3 -> 3 and b: 5 -> 5; fc: 8 -> 4, which reads a and b.
    told = tp.inspect(built("uneven").graph)
    total = 216 * 9 + (9 + 25) * 9 + 32
    rows = {row.reason: row for row in told.unprunable}
    assert rows[OUTPUT].holds["macs"] == pytest.approx(32 / total)
    assert rows[OUTPUT].left["macs"] == pytest.approx(4 * 2 / total)
    (other,) = (row for row in told.unprunable if row.layers == ("conv",))
    assert "takes a part of its channels" in other.reason
    assert other.holds["macs"] == other.left["macs"] == pytest.approx(216 * 9 / total)
    assert told.unprunable[0] is other, "what holds most comes first"
    assert told.untouched["macs"] == pytest.approx(216 * 9 / total)


@pytest.mark.parametrize(
    ("name", "group", "units", "width"),
    [("vit", "blocks.0.attn", 4, 16), ("flatten", "0", 4, 4), ("grouped", "conv1", 4, 8), ("groupnorm", "0", 4, 8)],
)
def test_width_is_counted_in_channels(name: str, group: str, units: int, width: int) -> None:
    found = group_of(tp.inspect(built(name).graph), group)
    assert (found.units, found.width) == (units, width)


def test_writers_include_loose_parameters() -> None:
    stream = group_of(tp.inspect(built("vit").graph), "patch_embed.proj")
    assert {"cls_token", "pos_embed", "patch_embed.proj", "blocks.1.mlp.fc2"} <= set(stream.writes)
    assert {"norm", "blocks.0.norm1"} <= set(stream.scales)
    assert {"head", "blocks.0.attn.qkv"} <= set(stream.reads)


def test_floors_follow_min_keep_and_what_is_protected(mlp) -> None:
    half = tp.inspect(mlp.graph, tp.Budget(macs=0.9, min_keep=0.5))
    assert [group.least for group in half.groups] == [4, 4]
    assert half.floors["macs"] == 6 * 4 + 4 * 4 + 4 * 4
    assert half.min_keep == 0.5
    whole = tp.inspect(mlp.graph, tp.Budget(macs=0.9, protect=("0",)))
    assert group_of(whole, "0").least == 8
    assert group_of(whole, "0").saves["macs"] == 0
    with pytest.raises(tp.BudgetError, match="matches no layer"):
        tp.inspect(mlp.graph, tp.Budget(macs=0.9, protect=("nowhere",)))


def test_budgets_are_held_against_the_floor(mlp) -> None:
    floors = tp.inspect(mlp.graph).floors
    told = tp.inspect(mlp.graph, tp.Budget(macs="11", params=str(floors["params"] - 1), bytes=0.5, drift=0.1))
    asks = {ask.quantity: ask for ask in told.asks}
    assert list(asks) == ["macs", "params", "bytes", "drift"]
    assert (asks["macs"].at_most, asks["macs"].floor, asks["macs"].reachable) == (11, 11, True)
    assert (asks["params"].at_most, asks["params"].reachable) == (16, False)
    assert {row.reason for row in told.unprunable} == {OUTPUT}
    assert asks["bytes"].at_most == told.totals["bytes"] // 2 == 151 * 8 // 2
    assert asks["drift"] == tp.planning.inspection.Ask("drift", 0.1, None, None, None)
    for quantity, reachable in (("macs", True), ("params", False)):
        budget = tp.Budget(**{quantity: str(asks[quantity].at_most)})
        if reachable:
            tp.allocate(random_scores(mlp.graph), mlp.graph, budget)
        else:
            with pytest.raises(tp.BudgetError, match="cannot be reached"):
                tp.allocate(random_scores(mlp.graph), mlp.graph, budget)


class Milliseconds:
    """Three for each unit of group `0`, a tenth for each of the others, and two that stay."""

    def __init__(self) -> None:
        self.total = 3.0 * 8 + 0.1 * 7 + 2

    def saving(self, group: tp.Group, units: int) -> float:
        return units * (3.0 if group.id == "0" else 0.1)

    def remove(self, group: tp.Group, units: int) -> None:
        self.total -= self.saving(group, units)

    def touches(self, group: tp.Group, other: tp.Group) -> bool:
        return group is other


def test_other_costs_are_shown_beside_and_given_back_as_they_came(mlp) -> None:
    clock = Milliseconds()
    told = tp.inspect(mlp.graph, costs={"latency_ms": clock})
    assert told.totals["latency_ms"] == pytest.approx(26.7)
    assert told.floors["latency_ms"] == pytest.approx(3 + 0.1 + 2)
    assert group_of(told, "0").saves["latency_ms"] == pytest.approx(21 / 26.7)
    assert group_of(told, "2").saves["latency_ms"] == pytest.approx(0.6 / 26.7)
    assert set(told.groups[0].holds) == set(told.untouched) == {"macs", "params"}
    assert clock.total == pytest.approx(26.7)
    asked = tp.inspect(mlp.graph, tp.Budget(latency_ms="5 ms"), costs={"latency_ms": clock})
    assert [ask.reachable for ask in asked.asks] == [False]


def test_a_cost_that_is_not_known_is_refused(mlp) -> None:
    with pytest.raises(tp.PlanError, match="latency_ms"):
        tp.inspect(mlp.graph, tp.Budget(latency_ms="5 ms"))


def attention_graph() -> tp.Graph:
    """An attention block that stays whole in a stream that does not, a norm out of reach, and loose products."""
    stream = tp.Group(
        "embed",
        "channel",
        4,
        (
            tp.Member("embed.weight", 0, None, "produce"),
            tp.Member("attn.proj.weight", 0, None, "produce"),
            tp.Member("attn.qkv.weight", 1, None, "consume"),
            tp.Member("fc.weight", 1, None, "consume"),
        ),
        True,
        "",
    )
    shapes = {"embed.weight": (4, 3), "attn.qkv.weight": (6, 4), "attn.proj.weight": (4, 2), "norm.weight": (2,)}
    shapes |= {"fc.weight": (5, 4), "#rest": ()}
    reuse = {"embed.weight": 1, "attn.qkv.weight": 1, "attn.proj.weight": 1, "fc.weight": 1, "#rest": 100}
    skipped = {"attn": "the heads differ", "fc": OUTPUT}
    return tp.Graph((stream,), shapes, reuse, "id", skipped)


def test_a_block_that_stays_whole_holds_its_layers_that_no_group_writes() -> None:
    told = tp.inspect(attention_graph(), tp.Budget(macs=1.0, min_keep=0.25))
    total = 12 + 24 + 8 + 20 + 100
    rows = {row.reason: row for row in told.unprunable}
    assert rows["the heads differ"].holds["macs"] == pytest.approx(24 / total), "proj is written by the stream"
    assert rows["the heads differ"].left["macs"] == pytest.approx(6 / total)
    assert rows["the heads differ"].layers == ("attn",)
    assert rows[NO_LAYER].holds["macs"] == rows[NO_LAYER].left["macs"] == pytest.approx(100 / total)
    assert rows[OUT_OF_REACH].layers == ("norm",)
    assert rows[OUT_OF_REACH].holds["params"] == pytest.approx(2 / (12 + 24 + 8 + 2 + 20))
    assert told.unprunable[0].reason == NO_LAYER


def test_reasons_that_differ_in_a_name_alone_are_one() -> None:
    skipped = {"a": "'a.attn' is new", "b": "'b.attn' is new", "c": "it is not used", "d": "'d' is odd"}
    assert reasons_of(skipped) == {"'*' is new": ("a", "b"), "it is not used": ("c",), "'d' is odd": ("d",)}


@pytest.mark.parametrize("name", ["vit", "split"])
def test_the_json_is_the_same_every_time_and_after_a_round_trip_of_the_graph(name: str, tmp_path) -> None:
    graph = built(name).graph
    written = json.dumps(tp.inspect(graph, tp.Budget(macs=0.5)).to_json(), allow_nan=False)
    assert json.dumps(tp.inspect(graph, tp.Budget(macs=0.5)).to_json()) == written
    graph.save(tmp_path / "graph.json")
    again = tp.inspect(tp.Graph.load(tmp_path / "graph.json"), tp.Budget(macs=0.5))
    assert json.dumps(again.to_json()) == written
    told = json.loads(written)
    assert told["format"] == 1
    assert {"totals", "floors", "groups", "unprunable", "untouched", "asks", "min_keep", "model_id"} <= set(told)


def test_a_model_without_groups_is_all_floor() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    told = tp.inspect(tp.trace(model, torch.zeros(1, 3)))
    assert told.groups == ()
    assert told.floors == told.totals == {"macs": 6, "params": 8}
    assert told.untouched == {"macs": 1.0, "params": 1.0}
