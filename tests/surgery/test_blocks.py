"""Skipping blocks, against forward passes that go around them by hand."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import nn

import tpvprune as tp
from tests import reference, tolerances
from tests.block_cases import NAMES, built, gone_with, skipping
from tests.helpers import assert_same_state, gap, outputs, plan_without
from tpvprune.plan import plan_of


@pytest.mark.parametrize("name", NAMES)
def test_skipping_is_going_around_the_block(name: str) -> None:
    b = built(name)
    for some in [[block] for block in b.blocks] + [list(b.blocks[1:]), list(b.blocks)]:
        plan = plan_without(b.graph, {block: [0] for block in some})
        small, by_hand = tp.apply(b.model, plan), skipping(b.model, some)
        assert gap(outputs(small, b.inputs), outputs(by_hand, b.inputs)) < tolerances.SAME_FUNCTION
        assert gap(outputs(small, b.inputs), outputs(b.model, b.inputs)) > tolerances.OTHER_FUNCTION
        assert_same_state(small.state_dict(), by_hand.state_dict())
        assert all(type(small.get_submodule(block)) is nn.Identity for block in some)


@pytest.mark.parametrize("name", NAMES)
def test_masking_a_block_is_the_same_function(name: str) -> None:
    b = built(name)
    for some in [[block] for block in b.blocks] + [list(b.blocks)]:
        plan = plan_without(b.graph, {block: [0] for block in some})
        masked, small = tp.mask(b.model, plan), tp.apply(b.model, plan)
        assert gap(outputs(masked, b.inputs), outputs(small, b.inputs)) < tolerances.SAME_FUNCTION
        assert {n: p.shape for n, p in masked.named_parameters()} == {n: p.shape for n, p in b.model.named_parameters()}
        for key, parameter in masked.named_parameters():
            within = key.startswith(tuple(f"{block}." for block in some))
            assert torch.equal(parameter, torch.zeros_like(parameter) if within else b.model.get_parameter(key))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_channels_are_cut_around_a_skipped_block(name: str, seed: int) -> None:
    b = built(name)
    some = list(b.blocks[seed % len(b.blocks) :: 2])
    gone = gone_with(b, some, seed)
    small = tp.apply(b.model, plan_without(b.graph, gone))
    cut = reference.sliced(b.model, b.graph, {n: units for n, units in gone.items() if n not in b.blocks})
    left = {n: t for n, t in cut.items() if not n.startswith(tuple(f"{block}." for block in some))}
    assert_same_state(small.state_dict(), left)
    # Cutting first and going around afterwards is the same.
    flat = tp.trace(b.model, b.inputs)
    first = tp.apply(b.model, plan_without(flat, {n: units for n, units in gone.items() if n in flat}))
    assert gap(outputs(small, b.inputs), outputs(skipping(first, some), b.inputs)) < tolerances.SAME_FUNCTION


def test_what_lies_in_a_skipped_block_is_gone_whatever_was_asked() -> None:
    b = built("stages")
    plan = plan_without(b.graph, {"stage1.0": [0]})
    for units in ([0], [0, 2], [0, 1, 2, 3]):
        other = plan_without(b.graph, {"stage1.0": [0], "stage1.0.conv1": units})
        assert plan.diff(other) == {}
        assert other.removed == plan.removed == 1 + 4
    rows = {row["group"]: (row["kind"], row["kept"]) for row in plan.summary()}
    assert rows["stage1.0"] == ("block", 0)
    assert rows["stage1.0.conv1"] == ("channel", 0)
    assert rows["stage1.1"] == ("block", 1)
    assert plan.diff(tp.Plan({}, b.graph)) == {
        "stage1.0": {"only_here": [], "only_there": [0]},
        "stage1.0.conv1": {"only_here": [], "only_there": [0, 1, 2, 3]},
    }
    assert b.graph.cost("units", plan.keep) == b.graph.units - 5


def test_other_groups_still_keep_a_unit() -> None:
    b = built("stages")
    with pytest.raises(tp.PlanError, match=r"'stage1\.1\.conv1' would lose all 5 units"):
        plan_without(b.graph, {"stage1.0": [0], "stage1.1.conv1": [0, 1, 2, 3, 4]})
    with pytest.raises(tp.PlanError, match="'stem' would lose all 6 units"):
        plan_without(b.graph, {**{block: [0] for block in b.blocks}, "stem": list(range(6))})


@pytest.mark.parametrize("name", NAMES)
def test_plans_are_written_and_read(name: str, tmp_path) -> None:
    b = built(name)
    plan = plan_without(b.graph, gone_with(b, b.blocks[:1], 0))
    plan.save(tmp_path / "plan.json")
    again = tp.Plan.load(tmp_path / "plan.json")
    assert again.diff(plan) == {}
    assert again.to_json() == plan.to_json()
    assert json.loads((tmp_path / "plan.json").read_text())["keep"][b.blocks[0]] == []
    assert_same_state(tp.apply(b.model, again).state_dict(), tp.apply(b.model, plan).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_blocks_is_saved_and_rebuilt(name: str, tmp_path) -> None:
    b = built(name)
    small = tp.apply(b.model, plan_without(b.graph, gone_with(b, b.blocks[::2], 1)))
    tp.save(small, tmp_path)
    again = tp.load(tmp_path, skeleton=copy.deepcopy(b.model))
    assert_same_state(again.state_dict(), small.state_dict())
    assert gap(outputs(again, b.inputs), outputs(small, b.inputs)) == 0
    assert plan_of(again).diff(plan_of(small)) == {}


def test_a_model_known_by_name_needs_no_skeleton(tmp_path) -> None:
    from tpvprune.zoo.models import create_model

    model = create_model("cifar_resnet20").eval()
    inputs = torch.randn(2, 3, 32, 32)
    graph = tp.trace(model, inputs, depth=True)
    names = [g.id for g in graph.groups if g.kind == "block"]
    assert names == [f"layer{i}.{j}" for i in (1, 2, 3) for j in range(3) if (i, j) not in ((2, 0), (3, 0))]
    small = tp.apply(model, plan_without(graph, {"layer1.2": [0], "layer3.1": [0]}))
    tp.save(small, tmp_path)
    assert gap(outputs(tp.load(tmp_path), inputs), outputs(small, inputs)) == 0


@pytest.mark.parametrize("depth_first", [True, False])
@pytest.mark.parametrize("name", ["stages", "inverted", "vit", "convnext"])
def test_two_plans_in_turn_equal_their_composition(name: str, depth_first: bool) -> None:
    b = built(name)
    blocks = {block: [0] for block in b.blocks[:1]}
    channels = gone_with(b, [], 3)
    first = plan_without(b.graph, blocks if depth_first else channels)
    middle = tp.apply(b.model, first)
    later = tp.trace(middle, b.inputs, depth=True)
    inside = b.graph.within(b.blocks[0])
    rest = {n: u for n, u in channels.items() if n not in inside} if depth_first else {b.blocks[0]: [0]}
    second = plan_without(later, rest)
    in_turn, whole = tp.apply(middle, second), first.compose(second)
    at_once = tp.apply(b.model, whole)
    assert_same_state(in_turn.state_dict(), at_once.state_dict())
    assert plan_of(in_turn).diff(whole) == {}
    assert gap(outputs(in_turn, b.inputs), outputs(at_once, b.inputs)) < tolerances.SAME_FUNCTION
    assert whole.diff(plan_without(b.graph, channels | blocks)) == {}


def test_blocks_leave_one_after_the_other() -> None:
    b = built("vit")
    small = b.model
    for block in b.blocks[:2]:
        graph = tp.trace(small, b.inputs, depth=True)
        small = tp.apply(small, plan_without(graph, {block: [0]}))
    graph = tp.trace(small, b.inputs, depth=True)
    assert [g.id for g in graph.groups if g.kind == "block"] == list(b.blocks[2:])
    at_once = tp.apply(b.model, plan_without(b.graph, {block: [0] for block in b.blocks[:2]}))
    assert_same_state(small.state_dict(), at_once.state_dict())
    assert plan_of(small).diff(plan_of(at_once)) == {}


def test_a_plan_that_skips_what_the_first_graph_does_not_know_is_refused() -> None:
    b = built("stages")
    flat = plan_without(tp.trace(b.model, b.inputs), {"stem": [0]})
    small = tp.apply(b.model, flat)
    later = plan_without(tp.trace(small, b.inputs, depth=True), {"stage1.0": [0]})
    with pytest.raises(tp.PlanError, match=r"skips block 'stage1\.0'.*depth=True"):
        tp.apply(small, later)


def test_the_model_given_is_untouched_and_modes_are_kept() -> None:
    b = built("stages")
    model = copy.deepcopy(b.model).train()
    model.stage1[0].eval()
    state = copy.deepcopy(model.state_dict())
    small = tp.apply(model, plan_without(b.graph, {"stage1.0": [0], "stage1.1": [0]}))
    assert_same_state(model.state_dict(), state)
    assert (small.stage1[0].training, small.stage1[1].training) == (False, True)
    assert isinstance(model.stage1[0], type(b.model.stage1[0]))
    assert plan_of(model) is None


def test_widths_written_out_within_skipped_blocks_are_left_alone() -> None:
    torch.manual_seed(0)
    model = timm.create_model("edgenext_xx_small", num_classes=7).double().eval()
    inputs = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    graph = tp.trace(model, inputs, depth=True)
    block = "stages.3.blocks.1"
    assert f"{block}.xca" in graph.openings
    assert any(name.startswith(f"{block}.") for name in graph.counts)
    plan = plan_without(graph, {block: [0], "stages.3.blocks.0.mlp.fc1": [1, 5]})
    small = tp.apply(model, plan)
    assert isinstance(small.get_submodule(block), nn.Identity)
    assert vars(small.get_submodule(block)).keys() == vars(nn.Identity()).keys()
    assert gap(outputs(small, inputs), outputs(tp.mask(model, plan), inputs)) < tolerances.SAME_FUNCTION
