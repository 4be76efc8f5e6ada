"""Masks of weights: exact counts, the law of N:M, ties, protection, and earlier plans, against slow choices by hand."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tpvprune as tp
from tests.cases import randomise
from tests.helpers import assert_same_state, built, plan_without

steady = settings(max_examples=50, deadline=None, derandomize=True)


def scores_of(graph: tp.Graph, values: dict[str, Tensor]) -> tp.Scores:
    return tp.Scores(values, None, "by hand", 1, 1, 0, graph.model_id)


def drawn(graph: tp.Graph, seed: int = 0, levels: int | None = None) -> tp.Scores:
    """Random scores; with `levels`, many of them equal."""
    generator = torch.Generator().manual_seed(seed)
    values = {g.id: torch.rand(g.units, generator=generator, dtype=torch.float64) for g in graph.groups}
    if levels is not None:
        values = {name: (value * levels).floor() for name, value in values.items()}
    return scores_of(graph, values)


def stack(*widths: int) -> nn.Module:
    pairs = itertools.pairwise(widths)
    return randomise(nn.Sequential(*(nn.Linear(a, b) for a, b in pairs)))


def by_sorting(graph: tp.Graph, scores: tp.Scores, count: int) -> set[tuple[str, int]]:
    """The units with the least scores, ties by name and place: one sort of all of them."""
    every = [(float(v), g.id, i) for g in graph.groups for i, v in enumerate(scores.values[g.id])]
    return {(name, place) for _, name, place in sorted(every)[:count]}


def zeros_of(plan: tp.Plan) -> set[tuple[str, int]]:
    return {
        (name, int(i)) for name, mask in plan.weights.items() for i in (~mask).flatten().nonzero().flatten().tolist()
    }


@steady
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    share=st.floats(0.01, 0.99),
    levels=st.one_of(st.none(), st.integers(1, 3)),
    seed=st.integers(0, 99),
)
def test_the_least_scores_go_and_exactly_as_many_as_asked(widths, share, levels, seed) -> None:
    graph = tp.weight_graph(stack(*widths))
    scores = drawn(graph, seed, levels)
    plan = tp.sparsify(scores, graph, share)
    assert zeros_of(plan) == by_sorting(graph, scores, round(share * graph.units))
    assert plan.zeros == round(share * graph.units)
    assert plan.sparsity == plan.zeros / graph.units
    assert plan.made_by["got"]["sparsity"] == plan.sparsity
    assert plan.nonzero == graph.params() - plan.zeros
    whole = scores_of(graph, dict(reversed(scores.values.items())))
    turned = tp.Graph(graph.groups[::-1], graph.shapes, graph.reuse, graph.model_id, graph.skipped)
    assert tp.sparsify(whole, turned, share).diff(plan) == {}


@steady
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    share=st.floats(0.01, 0.99),
    levels=st.one_of(st.none(), st.integers(1, 3)),
)
def test_every_layer_can_have_the_same_share(widths, share, levels) -> None:
    graph = tp.weight_graph(stack(*widths))
    scores = drawn(graph, 3, levels)
    plan = tp.sparsify(scores, graph, share, scope="layer")
    for group in graph.groups:
        order = sorted(range(group.units), key=lambda i, values=scores.values[group.id]: (float(values[i]), i))
        gone = (~plan.weights[group.id]).flatten().nonzero().flatten().tolist()
        assert gone == sorted(order[: round(share * group.units)])


def test_half_goes_where_nothing_is_said() -> None:
    graph = tp.weight_graph(built("mlp").model)
    assert tp.sparsify(drawn(graph), graph).zeros == graph.units // 2


def test_blocks_are_zero_as_a_whole() -> None:
    model = built("mlp").model
    graph = tp.weight_graph(model, (2, 3), ["0"])  # 8 x 6
    scores = drawn(graph)
    plan = tp.sparsify(scores, graph, 0.4)
    assert plan.zeros == 6 * round(0.4 * 8)
    blocks = plan.weights["0.weight"].reshape(4, 2, 2, 3).transpose(1, 2).reshape(8, 6)
    assert torch.equal(blocks.all(1), blocks.any(1))
    assert set((~blocks.all(1)).nonzero().flatten().tolist()) == {
        i for _, i in by_sorting(graph, scores, round(0.4 * 8))
    }


def by_hand(values: Tensor, kept: int, of: int) -> Tensor:
    """N:M along dimension 1 of a weight, one run of M after the other."""
    mask = torch.ones(values.shape, dtype=torch.bool)
    rest = [range(size) for dim, size in enumerate(values.shape) if dim != 1]
    for out, *where in itertools.product(*rest):
        for start in range(0, values.shape[1], of):
            line = [(float(values[(out, i, *where)]), i) for i in range(start, start + of)]
            for _, i in sorted(line)[: of - kept]:
                mask[(out, i, *where)] = False
    return mask


class Mixed(nn.Module):
    """Layers of every shape that a pattern meets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3, groups=2)
        self.line = nn.Conv1d(8, 4, 2)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.fc = nn.Linear(16, 3)


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("1:2", 1, 2), ("3:4", 3, 4)])
@pytest.mark.parametrize("levels", [None, 2], ids=["distinct", "ties"])
def test_patterns_run_along_the_inputs(pattern: str, n: int, m: int, levels: int | None) -> None:
    model = randomise(Mixed())
    graph = tp.weight_graph(model)
    scores = drawn(graph, 1, levels)
    plan = tp.sparsify(scores, graph, pattern=pattern)
    assert set(plan.weights) == {"conv.weight", "line.weight", "fc.weight"}
    for name, mask in plan.weights.items():
        assert torch.equal(mask, by_hand(scores.values[name].reshape(mask.shape), n, m)), name
    assert plan.made_by["stays_dense"] == {
        "stem.weight": f"{m} does not divide its 3 inputs",
        "up.weight": "transposed convolutions have no kernels for patterns",
    }
    assert plan.made_by["got"]["sparsity"] == plan.sparsity == 1 - n / m
    assert plan.made_by["pattern"] == pattern


@steady
@given(
    rows=st.integers(1, 5),
    runs=st.integers(1, 4),
    of=st.integers(2, 9),
    data=st.data(),
    levels=st.sampled_from([2, 99]),
)
def test_the_law_of_patterns(rows, runs, of, levels, data) -> None:
    kept = data.draw(st.integers(1, of - 1))
    graph = tp.weight_graph(randomise(nn.Sequential(nn.Linear(runs * of, rows))))
    plan = tp.sparsify(drawn(graph, runs, levels), graph, pattern=f"{kept}:{of}")
    assert bool((plan.weights["0.weight"].reshape(rows, runs, of).sum(2) == kept).all())


@pytest.mark.parametrize(
    ("protect", "dense"),
    [
        (["0"], {"0.weight"}),
        (["0.weight"], {"0.weight"}),
        (["[02]"], {"0.weight", "2.weight"}),
        (["re:[24]"], {"2.weight", "4.weight"}),
        (["0", "4"], {"0.weight", "4.weight"}),
    ],
)
def test_what_is_protected_stays_dense_and_is_not_counted(protect: list[str], dense: set[str]) -> None:
    graph = tp.weight_graph(built("mlp").model)
    plan = tp.sparsify(drawn(graph), graph, 0.75, protect=protect)
    assert set(plan.weights) == {g.id for g in graph.groups} - dense
    assert plan.made_by["stays_dense"] == dict.fromkeys(dense, "protected")
    assert plan.zeros == round(0.75 * sum(g.units for g in graph.groups if g.id not in dense))


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"sparsity": 0.0}, tp.BudgetError, "between 0 and 1"),
        ({"sparsity": 1.0}, tp.BudgetError, "between 0 and 1"),
        ({"sparsity": float("nan")}, tp.BudgetError, "between 0 and 1"),
        ({"sparsity": "half"}, tp.BudgetError, "between 0 and 1"),
        ({"sparsity": 0.5, "pattern": "2:4"}, tp.BudgetError, "give one"),
        ({"pattern": "4:2"}, tp.BudgetError, "write '2:4'"),
        ({"pattern": "4:4"}, tp.BudgetError, "write '2:4'"),
        ({"pattern": "0:4"}, tp.BudgetError, "write '2:4'"),
        ({"pattern": "2/4"}, tp.BudgetError, "write '2:4'"),
        ({"pattern": "2:4:8"}, tp.BudgetError, "write '2:4'"),
        ({"scope": "row"}, tp.BudgetError, "'global' or 'layer'"),
        ({"protect": ["fc9"]}, tp.BudgetError, "'fc9' matches no layer"),
        ({"protect": ["re:["]}, tp.BudgetError, "no regular expression"),
        ({"protect": "0"}, tp.InputError, "protect=.* is one string; give a list"),
        ({"protect": ["*"]}, tp.BudgetError, "no weight may be zero"),
        ({"pattern": "1:5"}, tp.BudgetError, "5 does not divide its 6 inputs"),
    ],
)
def test_what_cannot_be_read_or_met_is_refused(kwargs: dict[str, object], error: type[Exception], match: str) -> None:
    graph = tp.weight_graph(built("mlp").model)  # 6, 8 and 7 inputs
    with pytest.raises(error, match=match):
        tp.sparsify(drawn(graph), graph, **kwargs)


def test_scores_and_units_of_another_kind_are_refused(mlp, conv_bn) -> None:
    graph = tp.weight_graph(mlp.model)
    with pytest.raises(tp.PlanError, match="score again"):
        tp.sparsify(drawn(tp.weight_graph(conv_bn.model)), graph)
    with pytest.raises(tp.PlanError, match=r"the scores lack group '0.weight'"):
        tp.sparsify(scores_of(graph, {}), graph)
    with pytest.raises(tp.PlanError, match="no single weights"):
        tp.sparsify(drawn(mlp.graph), mlp.graph)
    blocks = tp.weight_graph(mlp.model, (2, 2), ["0"])
    with pytest.raises(tp.PlanError, match=r"units of '0.weight' are blocks"):
        tp.sparsify(drawn(blocks), blocks, pattern="2:4")


def test_a_layer_that_loses_everything_is_told(mlp, caplog) -> None:
    graph = tp.weight_graph(mlp.model)
    values = {g.id: torch.full((g.units,), float(g.id == "0.weight")) for g in graph.groups}
    with caplog.at_level(logging.WARNING):
        plan = tp.sparsify(scores_of(graph, values), graph, 0.64)
    assert "no weight is left of 2.weight, 4.weight" in caplog.text
    assert plan.zeros == round(0.64 * graph.units)


def channels(name: str = "conv_bn") -> tuple[tp.Plan, nn.Module]:
    """A plan of channels, and the model it leaves."""
    b = built(name)
    gone = {"conv_bn": {"conv1": [0, 3], "conv2": [4]}, "mlp": {"0": [1, 2, 5, 7], "2": [0, 3, 6]}}[name]
    plan = plan_without(b.graph, gone)
    return plan, tp.apply(b.model, plan)


@pytest.mark.parametrize("asked", [{"pattern": "1:2"}, {"sparsity": 0.3}, {"sparsity": 0.6, "scope": "layer"}], ids=str)
def test_an_earlier_plan_of_channels_in_either_coordinates(asked: dict[str, object]) -> None:
    # The same scores, written down in the dense model and in the pruned one, choose the same weights.
    before, small = channels()
    dense = built("conv_bn").model
    wide, narrow = tp.weight_graph(dense), tp.weight_graph(small)
    scores = drawn(wide, 5, levels=4)
    values = {name: before.cut(name, v.reshape(wide.shapes[name])).flatten() for name, v in scores.values.items()}
    one = tp.sparsify(scores, wide, after=before, **asked)
    other = tp.sparsify(scores_of(narrow, values), narrow, after=before, **asked)
    alone = tp.sparsify(scores_of(narrow, values), narrow, **asked)
    assert one.diff(other) == {} == one.diff(before.compose(alone))
    assert one.diff(before).keys() == alone.weights.keys()
    assert (one.params, one.macs, one.removed) == (before.params, before.macs, before.removed)
    assert one.zeros == alone.zeros > 0
    assert one.sparsity == alone.sparsity
    assert_same_state(tp.apply(dense, one).state_dict(), tp.apply(small, alone).state_dict())


def test_channels_first_and_then_two_of_four() -> None:
    dense = randomise(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)))
    graph = tp.trace(dense, torch.randn(2, 8, dtype=torch.float64))
    before = plan_without(graph, {"0": [0, 1, 5, 6, 9, 10, 13, 15], "2": [1, 3, 4, 11]})
    wide = tp.weight_graph(dense)
    plan = tp.sparsify(drawn(wide), wide, pattern="2:4", after=before)
    small = tp.apply(dense, plan)
    for name in ("0", "2", "4"):
        weight = small.get_submodule(name).weight
        assert bool(((weight.reshape(len(weight), -1, 4) != 0).sum(2) == 2).all()), name
    assert small[2].weight.shape == (8, 8)
    # In the coordinates of the dense model runs of four do not stand side by side.
    assert not bool((plan.weights["2.weight"].reshape(12, 4, 4).sum(2) == 2).all())


def test_what_is_zero_already_stays_so_and_counts(mlp) -> None:
    graph = tp.weight_graph(mlp.model)
    first = tp.sparsify(drawn(graph, 1), graph, 0.4)
    scores = drawn(graph, 2)
    plan = tp.sparsify(scores, graph, 0.7, after=first)
    assert plan.zeros == round(0.7 * graph.units)
    before = zeros_of(first)
    rest = sorted((float(v), g.id, i) for g in graph.groups for i, v in enumerate(scores.values[g.id]))
    more = [(name, i) for _, name, i in rest if (name, i) not in before][: plan.zeros - len(before)]
    assert zeros_of(plan) == before | set(more)
    with pytest.raises(tp.BudgetError, match=r"sparsity=0.2 of the model .* holds \d+ at zero already"):
        tp.sparsify(scores, graph, 0.2, after=first)
    emptied = {name: ~mask for name, mask in first.weights.items()}
    with pytest.raises(tp.BudgetError, match=r"of [024].weight is"):
        tp.sparsify(scores, graph, 0.5, after=tp.Plan({}, graph, {}, emptied), scope="layer")


def test_a_pattern_uses_the_zeros_that_are_there() -> None:
    graph = tp.weight_graph(randomise(nn.Sequential(nn.Linear(4, 3))))
    first = torch.ones(3, 4, dtype=torch.bool)
    first[0, 3] = first[1, 1:] = False
    scores = scores_of(graph, {"0.weight": torch.arange(12.0)})
    plan = tp.sparsify(scores, graph, pattern="2:4", after=tp.Plan({}, graph, {}, {"0.weight": first}))
    assert plan.weights["0.weight"].int().tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1]]


def test_blocks_of_what_is_cut_or_masked_in_part_are_refused(mlp) -> None:
    before, small = channels("mlp")
    blocks = tp.weight_graph(mlp.model, (2, 2), ["0"])
    with pytest.raises(tp.PlanError, match="in part"):
        tp.sparsify(drawn(blocks), blocks, after=before)
    single = tp.Plan({}, blocks, {}, {"0.weight": torch.arange(48).reshape(8, 6) > 0})
    with pytest.raises(tp.PlanError, match="in part"):
        tp.sparsify(drawn(blocks), blocks, after=single)
    narrow = tp.weight_graph(small, (2, 2), ["0"])
    plan = tp.sparsify(drawn(narrow), narrow, 0.5, after=before)
    assert plan.zeros == 12
    again = tp.sparsify(drawn(narrow, 4), narrow, 0.75, after=plan)
    assert again.zeros == round(0.75 * 6) * 4
    assert not {e for d in again.diff(plan).values() for e in d["only_here"]}


def test_an_earlier_plan_of_another_model_is_refused(mlp, conv_bn) -> None:
    graph = tp.weight_graph(mlp.model)
    with pytest.raises(tp.PlanError, match="neither of the dense model of `after` nor of the one it leaves"):
        tp.sparsify(drawn(graph), graph, after=channels("conv_bn")[0])
