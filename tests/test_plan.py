from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tpvprune as tp
from tests.helpers import built, plan_without
from tpvprune.plan import attach, plan_of
from tpvprune.types import fingerprint

steady = settings(max_examples=60, deadline=None, derandomize=True)


def chain(widths: tuple[int, ...]) -> tp.Graph:
    """The graph of a stack of linear layers without biases, put together by hand."""
    shapes = {f"{i}.weight": (b, a) for i, (a, b) in enumerate(zip((3, *widths), (*widths, 2), strict=True))}
    groups = tuple(
        tp.Group(
            str(i),
            "channel",
            width,
            (tp.Member(f"{i}.weight", 0, None, "produce"), tp.Member(f"{i + 1}.weight", 1, None, "consume")),
            True,
            "linear",
        )
        for i, width in enumerate(widths)
    )
    return tp.Graph(groups, shapes, dict.fromkeys(shapes, 1), fingerprint(shapes.items()), {})


def shrunk(graph: tp.Graph, plan: tp.Plan) -> tp.Graph:
    return chain(tuple(int(plan.mask(g.id).sum()) for g in graph.groups))


@st.composite
def masks(draw: st.DrawFn, widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    keep = {}
    for i, width in enumerate(widths):
        if draw(st.booleans()):
            bits = draw(st.lists(st.booleans(), min_size=width, max_size=width).filter(any))
            keep[str(i)] = torch.tensor(bits)
    return keep


@st.composite
def two_plans(draw: st.DrawFn) -> tuple[tp.Plan, tp.Plan]:
    widths = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    first = tp.Plan(draw(masks(widths)), chain(widths))
    left = shrunk(first.graph, first)
    return first, tp.Plan(draw(masks(tuple(g.units for g in left.groups))), left)


@steady
@given(two_plans())
def test_composition_keeps_what_both_keep(plans: tuple[tp.Plan, tp.Plan]) -> None:
    first, later = plans
    both = first.compose(later)
    for group in first.graph.groups:
        units = torch.arange(group.units)
        assert torch.equal(units[both.mask(group.id)], units[first.mask(group.id)][later.mask(group.id)])
    assert (both.params, both.macs) == (later.params, later.macs)
    assert both.removed == first.removed + later.removed
    assert both.graph is first.graph


@steady
@given(two_plans())
def test_the_empty_plan_is_neutral(plans: tuple[tp.Plan, tp.Plan]) -> None:
    first, _ = plans
    assert first.compose(tp.Plan({}, shrunk(first.graph, first))).diff(first) == {}
    assert tp.Plan({}, first.graph).compose(first).diff(first) == {}


@steady
@given(two_plans())
def test_json_round_trip(plans: tuple[tp.Plan, tp.Plan]) -> None:
    plan = plans[0].compose(plans[1])
    back = tp.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back.diff(plan) == {}
    assert back.made_by == plan.made_by
    assert back.graph.to_json() == plan.graph.to_json()


@steady
@given(two_plans())
def test_diff_is_antisymmetric_and_counts_units(plans: tuple[tp.Plan, tp.Plan]) -> None:
    a = plans[0]
    b = a.compose(plans[1])
    there, back = a.diff(b), b.diff(a)
    assert {n: (d["only_here"], d["only_there"]) for n, d in there.items()} == {
        n: (d["only_there"], d["only_here"]) for n, d in back.items()
    }
    assert sum(len(d["only_here"]) for d in there.values()) == b.removed - a.removed
    assert not any(d["only_there"] for d in there.values())


@pytest.mark.parametrize("name", ["grouped", "vit", "concat"])
def test_save_and_load(name: str, tmp_path) -> None:
    b = built(name)
    plan = tp.Plan(plan_without(b.graph, {g.id: [1] for g in b.graph.groups}).keep, b.graph, {"by": "hand"})
    plan.save(tmp_path / "deep" / "plan.json")
    back = tp.Plan.load(tmp_path / "deep" / "plan.json")
    assert back.diff(plan) == {}
    assert (back.made_by, back.params, back.macs) == ({"by": "hand"}, plan.params, plan.macs)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 3}, "format 3 is not 2"),
        ({"format": None}, "format None is not 2"),
        ({"weights": None}, "incomplete or damaged"),
        ({"weights": {"0.weight": 3}}, "incomplete or damaged"),
        ({"weights": {"nine": ""}}, "incomplete or damaged"),
        ({"weights": {"0.weight": "AAAAAAA="}}, "holds 5 bytes for the 48 weights of '0.weight'"),
        ({"weights": {"0.weight": "AAAAAAAAAA=="}}, "holds 7 bytes for the 48 weights"),
        ({"weights": {"0.weight": "AAAA!AAA"}}, "no base64"),
        ({"keep": None}, "incomplete or damaged"),
        ({"keep": {"0": [99]}}, "incomplete or damaged"),
        ({"keep": {"0": []}}, "would lose all 8 units"),
        ({"keep": {"nine": [0]}}, "no group 'nine'"),
        ({"keep": {"0": ["a"]}}, "incomplete or damaged"),
        ({"keep": {"0": [0.5, 1.7]}}, "0.5 is no whole number"),
        ({"keep": {"0": [True, False]}}, "True is no whole number"),
        ({"keep": {"0": [10**30]}}, "incomplete or damaged"),
        ({"graph": {"format": 7}}, "graph: format 7 is not 1"),
        ({"graph": {"format": 1}}, "graph is incomplete"),
        ({"made_by": 3}, "incomplete or damaged"),
    ],
)
def test_other_formats_and_damage_are_refused(mlp, tmp_path, change: dict[str, object], match: str) -> None:
    data = plan_without(mlp.graph, {"0": [1]}).to_json() | change
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(tp.PlanError, match=match):
        tp.Plan.load(tmp_path / "plan.json")


def _changed(value: object, path: tuple[object, ...], to: object) -> object:
    if not path:
        return to
    copy: Any = dict(value) if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
    copy[path[0]] = _changed(copy[path[0]], path[1:], to)
    return copy


def _paths(value: object, before: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*before, key)
        yield from _paths(inner, (*before, key))


@pytest.mark.parametrize("name", ["vit", "grouped"])
def test_whatever_is_damaged_is_refused_or_can_be_read(name: str) -> None:
    b = built(name)
    graph = dataclasses.replace(b.graph, told={"wide": {b.graph.groups[0].id: 1}})
    opening = tp.members.Opening("forward", "x.view(3)", 0, None)
    graph = dataclasses.replace(graph, openings={b.graph.groups[0].id: (opening,)})
    whole = plan_without(graph, {g.id: [1] for g in graph.groups}).to_json()
    refused = tried = 0
    for path in _paths(whole):
        for to in (None, -1, 1.5, True, "x", [], {}, [1, 2], 10**30) if path[0] != "made_by" else ():
            tried += 1
            try:
                plan = tp.Plan.from_json(json.loads(json.dumps(_changed(whole, path, to))))
                assert plan.params + plan.macs >= 0
            except tp.PlanError:
                refused += 1
    assert refused > tried / 2


def test_units_counted_from_the_end_are_refused(mlp) -> None:
    data = plan_without(mlp.graph, {"0": [1]}).to_json()
    data["keep"] = {"0": [-1, 0]}
    with pytest.raises(tp.PlanError):
        tp.Plan.from_json(data)


def test_missing_and_broken_files_are_named(tmp_path) -> None:
    with pytest.raises(tp.PlanError, match=r"no plan at .*gone.json"):
        tp.Plan.load(tmp_path / "gone.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(tp.PlanError, match=r"broken.json is no plan"):
        tp.Plan.load(tmp_path / "broken.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(tp.PlanError, match=r"binary.json is no plan"):
        tp.Plan.load(tmp_path / "binary.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(tp.PlanError, match="format None"):
        tp.Plan.load(tmp_path / "list.json")


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.ones(7, dtype=torch.bool), r"bool mask of shape \(8,\)"),
        (torch.ones(8), r"bool mask of shape \(8,\)"),
        (torch.ones(8, 1, dtype=torch.bool), r"bool mask of shape \(8,\)"),
        (torch.zeros(8, dtype=torch.bool), "keep at least one"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mlp, mask: torch.Tensor, match: str) -> None:
    with pytest.raises(tp.PlanError, match=match):
        tp.Plan({"0": mask}, mlp.graph)


def test_plans_of_other_models_are_not_composed_or_compared(mlp, conv_bn) -> None:
    plan = plan_without(mlp.graph, {"0": [1]})
    with pytest.raises(tp.PlanError, match="trace the pruned model and plan again"):
        plan.compose(plan)
    with pytest.raises(tp.PlanError, match="no group 'conv1'"):
        plan.compose(plan_without(conv_bn.graph, {"conv1": [1]}))
    with pytest.raises(tp.PlanError, match="made for another model"):
        plan.compose(tp.Plan({}, mlp.graph))
    with pytest.raises(tp.PlanError, match="plans of two models"):
        plan.diff(plan_without(conv_bn.graph, {"conv1": [1]}))


def test_a_model_carries_its_plan(mlp) -> None:
    plan = plan_without(mlp.graph, {"0": [1]})
    small = tp.apply(mlp.model, plan)
    assert plan_of(small) is plan
    assert "_tpvprune_plan" not in dict(small.named_modules())
    assert list(small.state_dict()) == list(mlp.model.state_dict())
    attach(small, tp.Plan({}, mlp.graph))
    assert plan_of(small).removed == 0


def test_summary_has_a_row_for_every_group(mlp) -> None:
    assert plan_without(mlp.graph, {"0": [1, 2]}).summary() == [
        {"group": "0", "kind": "channel", "units": 8, "kept": 6},
        {"group": "2", "kind": "channel", "units": 7, "kept": 7},
    ]
