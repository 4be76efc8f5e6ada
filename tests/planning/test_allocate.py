from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tpvprune as tp
from tests import tolerances
from tests.helpers import NAMES, built
from tpvprune.budget import parse_amount

STEADY = settings(max_examples=80, deadline=None, derandomize=True)


def random_scores(graph: tp.Graph, seed: int = 0) -> tp.Scores:
    generator = torch.Generator().manual_seed(seed)
    values = {g.id: torch.rand(g.units, generator=generator, dtype=torch.float64) for g in graph.groups}
    return tp.Scores(values, None, "random", 1, 1, seed, graph.model_id)


def got(plan: tp.Plan, quantity: str) -> int:
    return plan.macs if quantity == "macs" else plan.params


def least(graph: tp.Graph, quantity: str, **kwargs: object) -> int:
    """The floor that an unreachable budget names."""
    with pytest.raises(tp.BudgetError, match=f"{quantity} <= 1 cannot be reached: the floor is") as caught:
        tp.allocate(random_scores(graph), graph, tp.Budget(**{quantity: "1.5"}, **{"round_to": 1, **kwargs}))
    return int(str(caught.value).split("floor is ")[1].split(" ")[0].replace(",", ""))


@pytest.mark.parametrize("quantity", ["macs", "params"])
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_never_exceeded(name: str, quantity: str) -> None:
    graph = built(name).graph
    whole = got(tp.Plan({}, graph), quantity)
    for share in (1.0, 0.9, 0.75, 0.6, 0.5):
        for seed in range(3):
            budget = tp.Budget(**{quantity: share}, min_keep=0.01, round_to=1)
            if share * whole < least(graph, quantity, min_keep=0.01):
                with pytest.raises(tp.BudgetError, match="cannot be reached: the floor is"):
                    tp.allocate(random_scores(graph, seed), graph, budget)
                continue
            plan = tp.allocate(random_scores(graph, seed), graph, budget)
            assert got(plan, quantity) <= share * whole
            assert (plan.removed == 0) == (share == 1.0)


def test_no_plan_can_be_widened_by_a_unit_within_the_budget() -> None:
    for name in NAMES:
        graph = built(name).graph
        budget = tp.Budget(params=0.85, min_keep=0.01, round_to=1)
        plan = tp.allocate(random_scores(graph), graph, budget)
        for group, mask in plan.keep.items():
            if not bool(mask.all()):
                more = mask.clone()
                more[(~mask).nonzero()[0]] = True
                assert graph.params({**plan.keep, group: more}) > budget.bound(graph), (name, group)


@pytest.mark.parametrize("quantity", ["macs", "params"])
def test_fine_grained_budgets_are_met_within_a_hundredth(quantity: str) -> None:
    # Small nets have steps of several per cent; these layers are wide enough for one per mille.
    model = torch.nn.Sequential(
        torch.nn.Linear(50, 120), torch.nn.ReLU(), torch.nn.Linear(120, 90), torch.nn.ReLU(), torch.nn.Linear(90, 10)
    )
    graph = tp.trace(model, torch.randn(1, 50))
    for share in (0.9, 0.5, 0.31, 0.2):
        for seed in range(3):
            plan = tp.allocate(random_scores(graph, seed), graph, tp.Budget(**{quantity: share}, round_to=1))
            asked = share * got(tp.Plan({}, graph), quantity)
            assert (1 - tolerances.WITHIN_BUDGET) * asked <= got(plan, quantity) <= asked


@pytest.mark.parametrize("name", NAMES)
def test_the_cheapest_units_of_a_group_leave(name: str) -> None:
    graph = built(name).graph
    scores = random_scores(graph)
    plan = tp.allocate(scores, graph, tp.Budget(params=0.85, round_to=1))
    for group, mask in plan.keep.items():
        assert float(scores.values[group][~mask].max()) <= float(scores.values[group][mask].min())


def test_groups_compete_by_score_over_what_they_save(mlp) -> None:
    # Equal scores: what saves most leaves first. Then a group whose scores are a hundred times higher stays.
    ones = {g.id: torch.ones(g.units, dtype=torch.float64) for g in mlp.graph.groups}
    one_step = tp.Budget(params=mlp.graph.params() - 1, round_to=1)

    def removed_from(values: dict[str, torch.Tensor]) -> set[str]:
        scores = tp.Scores(values, None, "", 1, 1, 0, mlp.graph.model_id)
        return {n for n, m in tp.allocate(scores, mlp.graph, one_step).keep.items() if not bool(m.all())}

    assert removed_from(ones) == {"0"}  # a unit of it is 6 + 1 + 7 parameters, one of the other 8 + 1 + 4
    assert removed_from({**ones, "0": ones["0"] * 100}) == {"2"}


@pytest.mark.parametrize("round_to", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_kept_widths_are_multiples_of_the_rounding(name: str, round_to: int) -> None:
    graph = built(name).graph
    floor = least(graph, "params", round_to=round_to, min_keep=0.01)
    plan = tp.allocate(random_scores(graph), graph, tp.Budget(params=floor + 5, round_to=round_to, min_keep=0.01))
    assert (plan.removed > 0) == (floor < graph.params())  # no width of a narrow group may be a multiple
    for group, mask in plan.keep.items():
        width = max(m.width() for m in graph[group].of_role("consume"))
        kept = int(mask.sum()) * (1 if graph[group].kind == "head" else width)
        if graph[group].kind == "channel" and kept != graph[group].units * width:
            assert kept % round_to == 0, group


def test_without_a_rounding_wide_groups_get_multiples_of_eight() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 100), torch.nn.ReLU(), torch.nn.Linear(100, 20), torch.nn.Linear(20, 4)
    )
    graph = tp.trace(model, torch.randn(1, 8))
    for share in (0.8, 0.5, 0.3):
        plan = tp.allocate(random_scores(graph), graph, tp.Budget(params=share))
        assert int(plan.mask("0").sum()) in (100, *range(8, 100, 8))
        assert int(plan.mask("2").sum()) in (20, *range(2, 20, 2))


@pytest.mark.parametrize("name", NAMES)
def test_floors_are_respected(name: str) -> None:
    graph = built(name).graph
    first = graph.groups[0].id
    floors = {"min_keep": 0.6, "per_group": {first: 0.3}}
    plan = tp.allocate(
        random_scores(graph), graph, tp.Budget(params=least(graph, "params", **floors), round_to=1, **floors)
    )
    for group in graph.groups:
        share = 0.3 if first in (group.id, *group.layers) else 0.6
        multiple = 2 if any(m.width() > 1 for m in group.members) and group.kind == "channel" else 1
        assert int(plan.mask(group.id).sum()) == max(multiple, math.ceil(share * group.units - 1e-9))


def test_a_grouped_convolution_never_turns_depthwise() -> None:
    graph = built("grouped").graph
    floor = least(graph, "params", min_keep=0.01)
    plan = tp.allocate(random_scores(graph), graph, tp.Budget(params=floor, min_keep=0.01, round_to=1))
    assert plan.params == floor
    assert {n: int(m.sum()) for n, m in plan.keep.items()} == {"conv1": 2, "grouped": 2, "last": 1}
    tp.apply(built("grouped").model, plan)(built("grouped").inputs)


@pytest.mark.parametrize("quantity", ["macs", "params"])
@pytest.mark.parametrize("name", NAMES)
def test_an_unreachable_budget_names_a_floor_that_can_be_reached(name: str, quantity: str) -> None:
    graph = built(name).graph
    floor = least(graph, quantity, round_to=None)
    assert got(tp.allocate(random_scores(graph), graph, tp.Budget(**{quantity: floor})), quantity) == floor
    with pytest.raises(tp.BudgetError):
        tp.allocate(random_scores(graph), graph, tp.Budget(**{quantity: floor - 1}))


def test_what_holds_the_floor_is_named(residual) -> None:
    with pytest.raises(tp.BudgetError) as caught:
        tp.allocate(random_scores(residual.graph), residual.graph, tp.Budget(macs=0.1, protect=("stem", "b1")))
    message = str(caught.value)
    assert "min_keep=0.1" in message
    assert "2 protected groups (stem, b1)" in message
    assert "1 layers that cannot be pruned" in message


@pytest.mark.parametrize(
    ("pattern", "whole"),
    [
        ("a1", {"stem", "a1"}),  # its inputs and its outputs
        ("a1_bn", {"a1"}),
        ("fc", {"down"}),
        ("b?", {"stem", "a1", "down", "b1"} - {"a1"}),
        ("re:a[0-9]", {"stem", "a1"}),
        ("re:.*_bn", {"stem", "a1", "down", "b1"}),
        ("*", {"stem", "a1", "down", "b1"}),
    ],
)
def test_protected_layers_keep_inputs_and_outputs(residual, pattern: str, whole: set[str]) -> None:
    graph, budget = residual.graph, tp.Budget(macs=0.9999, protect=(pattern,), round_to=1)
    everything = {g.id for g in graph.groups}
    if whole == everything:
        with pytest.raises(tp.BudgetError, match="cannot be reached"):
            tp.allocate(random_scores(graph), graph, budget)
        return
    for seed in range(4):
        floor = least(graph, "macs", protect=(pattern,))
        plan = tp.allocate(random_scores(graph, seed), graph, tp.Budget(macs=floor, protect=(pattern,), round_to=1))
        assert {n for n in everything if bool(plan.mask(n).all())} == whole


def test_protecting_a_block_protects_what_is_in_it() -> None:
    graph = built("vit").graph
    floor = least(graph, "macs", protect=("blocks.0",))
    plan = tp.allocate(random_scores(graph), graph, tp.Budget(macs=floor, protect=("blocks.0",), round_to=1))
    kept = {g.id for g in graph.groups if bool(plan.mask(g.id).all())}
    assert kept == {"patch_embed.proj", "blocks.0.attn", "blocks.0.mlp.fc1"}


@pytest.mark.parametrize("where", ["protect", "per_group"])
@pytest.mark.parametrize(
    ("pattern", "match"),
    [
        ("b1_bm", "matches no layer of the model; did you mean b1_bn"),
        ("stem?x", "matches no layer"),
        ("re:nothing.*", "matches no layer"),
        ("re:[", "is no regular expression"),
        ("", "matches no layer"),
        ("A1", "matches no layer"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(residual, where: str, pattern: str, match: str) -> None:
    given = {"protect": (pattern,)} if where == "protect" else {"per_group": {pattern: 0.5}}
    with pytest.raises(tp.BudgetError, match=match):
        tp.allocate(random_scores(residual.graph), residual.graph, tp.Budget(macs=0.7, **given))


def test_a_pattern_may_name_a_layer_that_cannot_be_pruned_anyway() -> None:
    graph = built("shared").graph
    tp.allocate(random_scores(graph), graph, tp.Budget(params=0.9, protect=("embed",), round_to=1))


def test_scores_of_another_model_or_with_gaps_are_refused(mlp, conv_bn) -> None:
    with pytest.raises(tp.PlanError, match="score again"):
        tp.allocate(random_scores(conv_bn.graph), mlp.graph, tp.Budget(macs=0.5))
    whole = random_scores(mlp.graph)
    for values in ({"0": whole.values["0"]}, {**whole.values, "2": whole.values["2"][:3]}):
        with pytest.raises(tp.PlanError, match="lack group '2' with its 7 units"):
            tp.allocate(tp.Scores(values, None, "", 1, 1, 0, mlp.graph.model_id), mlp.graph, tp.Budget(macs=0.5))


def test_plans_say_how_they_were_made(mlp) -> None:
    plan = tp.allocate(random_scores(mlp.graph), mlp.graph, tp.Budget(macs="80%"))
    assert plan.made_by["asked"] == {"macs": math.floor(0.8 * mlp.graph.macs())}
    assert plan.made_by["rank"] == "score per macs"


def test_the_same_scores_give_the_same_plan(residual) -> None:
    plans = [tp.allocate(random_scores(residual.graph), residual.graph, tp.Budget(macs=0.6)) for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()


# Amounts


@pytest.mark.parametrize(
    ("written", "amount"),
    [
        (0.5, 0.5), ("0.5", 0.5), ("50%", 0.5), (" 50 % ", 0.5), ("100%", 1.0), (1, 1.0), ("1.2G", 1.2e9),
        ("1.2g", 1.2e9), (41_000_000, 41e6), ("41_000_000", 41e6), ("41M", 41e6), ("300k", 3e5), ("2T", 2e12),
        ("1e6", 1e6),
    ],
)  # fmt: skip
def test_amounts(written: float | str, amount: float) -> None:
    assert parse_amount(written, "macs") == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize(
    "written",
    [
        "",
        "half",
        "101%",
        "-1",
        -0.5,
        0,
        "0",
        "0%",
        "nan",
        "inf",
        float("nan"),
        float("inf"),
        True,
        "%",
        "G",
        "1.2GB",
        "5 0",
    ],
)
def test_bad_amounts_are_refused(written: float | str) -> None:
    with pytest.raises(tp.BudgetError, match="macs="):
        parse_amount(written, "macs")
    with pytest.raises(tp.BudgetError):
        tp.Budget(macs=written)


@STEADY
@given(st.floats(min_value=1e-6, max_value=1e15, allow_nan=False))
def test_amounts_round_trip(amount: float) -> None:
    assert parse_amount(amount, "x") == parse_amount(str(amount), "x") == amount
    if amount <= 1:
        assert parse_amount(f"{amount * 100!r}%", "x") == pytest.approx(amount, rel=1e-12)
    for suffix, factor in (("k", 1e3), ("M", 1e6), ("g", 1e9), ("T", 1e12)):
        assert parse_amount(f"{amount!r}{suffix}", "x") == pytest.approx(amount * factor, rel=1e-12)


@STEADY
@given(st.integers(min_value=2, max_value=10**15))
def test_whole_amounts_are_absolute(amount: int) -> None:
    assert tp.Budget(macs=f"{amount:_}").bound(built("mlp").graph) == amount


def test_fractions_are_of_the_dense_model(mlp) -> None:
    assert tp.Budget(macs=1.0).bound(mlp.graph) == mlp.graph.macs()
    assert tp.Budget(params="50%").bound(mlp.graph) == mlp.graph.params() // 2
    assert tp.Budget(params=0.1).bound(mlp.graph) == math.floor(0.1 * mlp.graph.params())


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "not nothing"),
        ({"macs": 0.5, "params": 0.5}, "not macs and params"),
        ({"macs": 0.5, "min_keep": 0}, "min_keep=0"),
        ({"macs": 0.5, "min_keep": 1.1}, "min_keep=1.1"),
        ({"macs": 0.5, "per_group": {"a": 0}}, "a=0"),
        ({"macs": 0.5, "round_to": 0}, "round_to=0"),
        ({"macs": 0.5, "protect": "fc"}, "is one string"),
    ],
)
def test_budgets_that_contradict_themselves_are_refused(kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(tp.BudgetError, match=match):
        tp.Budget(**kwargs)
