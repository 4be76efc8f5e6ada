"""Masks of weights in a plan: what they say of themselves, JSON, old files, the schema."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tpvprune as tp
from tests import reference
from tests.helpers import NAMES, assert_same_state, built, plan_without, random_gone

GOLDEN = Path(__file__).with_name("golden")
SCHEMA = json.loads((Path(__file__).parents[1] / "docs/plan.schema.json").read_text(encoding="utf-8"))
CHECK = jsonschema.Draft202012Validator(SCHEMA)
steady = settings(max_examples=40, deadline=None, derandomize=True)


def dots(shape: tuple[int, ...], every: int) -> Tensor:
    """A mask that zeroes each so many entries, from the first on."""
    return (torch.arange(int(torch.tensor(shape).prod())) % every != 0).reshape(shape)


def mixed(name: str = "conv_bn", seed: int = 0) -> tp.Plan:
    b = built(name)
    keep = plan_without(b.graph, random_gone(b.graph, seed, 0.4)).keep
    shapes = {n: s for n, s in b.graph.shapes.items() if n in dict(b.model.named_parameters()) and len(s) > 1}
    weights = {n: dots(s, 2 + i % 3) for i, (n, s) in enumerate(shapes.items())}
    return tp.Plan(keep, b.graph, {"by": "hand"}, weights)


def test_golden_channels_of_format_1() -> None:
    plan = tp.Plan.load(GOLDEN / "plan-1-channels.json")
    b = built("conv_bn")
    gone = {"conv1": [0, 3], "conv2": [4]}
    assert plan.diff(plan_without(b.graph, gone)) == {}
    assert_same_state(tp.apply(b.model, plan).state_dict(), reference.sliced(b.model, b.graph, gone))
    assert (plan.made_by, plan.weights, plan.params) == ({"by": "hand"}, {}, 292)


def test_golden_weights_of_format_1() -> None:
    plan = tp.Plan.load(GOLDEN / "plan-1-weights.json")
    b = built("mlp")
    state = copy.deepcopy(b.model.state_dict())
    for block in (0, 3, 6):  # of 2 x 3, two a row of blocks
        top, left = block // 2 * 2, block % 2 * 3
        state["0.weight"][top : top + 2, left : left + 3] = 0
    for verb in (tp.apply, tp.mask):
        assert_same_state(verb(b.model, plan).state_dict(), state)
    assert (plan.zeros, plan.sparsity) == (18, 18 / 48)


def test_golden_channels_and_weights_of_format_2() -> None:
    plan = tp.Plan.load(GOLDEN / "plan-2-mixed.json")
    b = built("conv_bn")
    model = copy.deepcopy(b.model)
    with torch.no_grad():
        model.conv2.weight.view(-1)[::3] = 0
        model.fc.weight.view(-1)[::2] = 0
    wanted = reference.sliced(model, b.graph, {"conv1": [0, 3], "conv2": [4]})
    small = tp.apply(b.model, plan)
    assert_same_state(small.state_dict(), wanted)
    assert plan.zeros == sum(int((p == 0).sum()) for p in small.parameters())


@pytest.mark.parametrize("file", sorted(GOLDEN.iterdir()), ids=lambda file: file.name)
def test_what_old_files_say_is_said_again(file: Path, tmp_path: Path) -> None:
    plan = tp.Plan.load(file)
    plan.save(tmp_path / "again.json")
    again = tp.Plan.load(tmp_path / "again.json")
    assert again.diff(plan) == {}
    assert again.to_json() == plan.to_json()
    CHECK.validate(json.loads(file.read_text()))
    CHECK.validate(json.loads((tmp_path / "again.json").read_text()))


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_knows_what_is_saved(name: str) -> None:
    b = built(name)
    for plan in (mixed(name), tp.Plan({}, b.graph), tp.Plan({}, tp.weight_graph(b.model)), mixed(name).as_masks()):
        CHECK.validate(json.loads(json.dumps(plan.to_json())))


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3}, {"format": 1}, {"keep": {"conv1": [-1]}}, {"keep": {"conv1": [1, 1]}}, {"weights": {"a": "!"}},
        {"weights": {"a": [1]}}, {"graph": {}}, {"more": 1}, {"made_by": 3},
    ],
    ids=str,
)  # fmt: skip
def test_the_schema_refuses_what_is_no_plan(change: dict[str, object]) -> None:
    written = mixed().to_json()
    CHECK.validate(written)
    assert not CHECK.is_valid(written | change)
    assert not CHECK.is_valid({k: v for k, v in written.items() if k != "weights"})


@steady
@given(rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_masks_go_through_json_bit_by_bit(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    shapes = {"0.weight": (rows, columns)}
    graph = tp.Graph((), shapes, {}, "id", {})
    written = tp.Plan({}, graph, {}, {"0.weight": mask}).to_json()["weights"]["0.weight"]
    bits = "".join(f"{byte:08b}" for byte in base64.b64decode(written))
    assert bits[: mask.numel()] == "".join("01"[int(x)] for x in mask.flatten())
    assert set(bits[mask.numel() :]) <= {"0"}
    assert len(bits) - mask.numel() < 8
    back = tp.Plan.from_json(
        {"format": 2, "made_by": {}, "keep": {}, "graph": graph.to_json(), "weights": {"0.weight": written}}
    )
    assert torch.equal(back.weights["0.weight"], mask)


def test_a_large_plan_is_a_small_file(tmp_path: Path) -> None:
    graph = tp.Graph((), {"w": (2000, 1500)}, {}, "id", {})
    plan = tp.Plan({}, graph, {}, {"w": torch.rand(2000, 1500) < 0.5})
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_size < 2000 * 1500 / 6 + 1000  # a bit and a third
    assert tp.Plan.load(tmp_path / "plan.json").diff(plan) == {}


def test_what_leaves_with_a_unit_is_no_zero() -> None:
    plan = mixed()
    b = built("conv_bn")
    bare = tp.Plan({}, b.graph, {}, plan.weights)
    for name, mask in plan.weights.items():
        cut = ~plan.left(name)
        assert bool(mask[cut].all())
        assert torch.equal(mask | cut, dots(tuple(mask.shape), 2 + list(plan.weights).index(name) % 3) | cut)
        assert int(plan.left(name).sum()) == plan.weight_masks()[name].numel()
    assert bare.zeros == plan.zeros
    small = tp.apply(b.model, plan)
    assert plan.zeros == sum(int((p == 0).sum()) for p in small.parameters())
    assert plan.nonzero == sum(int((p != 0).sum()) for p in small.parameters())
    left = sum(m.numel() for m in plan.weight_masks().values())
    assert plan.sparsity == plan.zeros / left
    assert (plan.params, plan.macs) == (plan_without(b.graph, random_gone(b.graph, 0, 0.4)).params, plan.macs)


def test_a_plan_without_masks_has_no_zeros(mlp) -> None:
    plan = plan_without(mlp.graph, {"0": [1]})
    assert (plan.zeros, plan.sparsity, plan.nonzero) == (0, 0.0, plan.params)


def test_summary_tells_of_weights_that_are_left() -> None:
    plan = mixed()
    rows = {row["group"]: row for row in plan.summary()}
    assert list(rows)[:2] == ["conv1", "conv2"]
    for name, mask in plan.weight_masks().items():
        wanted = {"group": name, "kind": "weight", "units": mask.numel(), "kept": int(mask.sum())}
        assert rows[name] == wanted


def test_diff_compares_weights_where_both_leave_the_units(mlp) -> None:
    a = plan_without(mlp.graph, {"0": [0]})
    first = torch.ones(8, 6, dtype=torch.bool)
    first[0] = first[2, 3] = False  # row 0 leaves in a
    b = tp.Plan({}, tp.weight_graph(mlp.model), {}, {"0.weight": first})
    assert a.diff(b) == {
        "0": {"only_here": [], "only_there": [0]},
        "0.weight": {"only_here": [15], "only_there": []},
    }
    assert b.diff(a) == {
        "0": {"only_here": [0], "only_there": []},
        "0.weight": {"only_here": [], "only_there": [15]},
    }
    whole = tp.Plan({}, mlp.graph, {}, {"0.weight": torch.ones(8, 6, dtype=torch.bool)})
    assert whole.diff(tp.Plan({}, mlp.graph)) == {}


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"0.weight": torch.ones(48, dtype=torch.bool)}, r"bool mask of shape \(8, 6\)"),
        ({"0.weight": torch.ones(8, 6)}, r"bool mask of shape \(8, 6\)"),
        ({"nine": torch.ones(8, 6, dtype=torch.bool)}, "knows no parameter 'nine'"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mlp, weights: dict[str, Tensor], match: str) -> None:
    with pytest.raises(tp.PlanError, match=match):
        tp.Plan({}, mlp.graph, {}, weights)


def test_buffers_and_work_are_not_masked(conv_bn) -> None:
    with pytest.raises(tp.PlanError, match="knows no parameter"):
        tp.Plan({}, conv_bn.graph, {}, {"bn1.running_mean": torch.ones(6, dtype=torch.bool)})


def test_plans_of_other_models_are_not_composed(mlp, conv_bn) -> None:
    weights = tp.Plan({}, tp.weight_graph(mlp.model), {}, {"0.weight": dots((8, 6), 2)})
    with pytest.raises(tp.PlanError, match="made for another model"):
        plan_without(mlp.graph, {"0": [1]}).compose(weights)
    with pytest.raises(tp.PlanError, match="cannot compose"):
        weights.compose(tp.Plan({}, tp.weight_graph(conv_bn.model), {}, {}))
    with pytest.raises(tp.PlanError):
        weights.compose(plan_without(conv_bn.graph, {"conv1": [1]}))


def test_the_drift_of_masks_is_not_made_up(conv_bn) -> None:
    with pytest.raises(tp.PlanError, match="apply the plan and measure"):
        tp.TPV().drift(conv_bn.model, [conv_bn.inputs], mixed())
