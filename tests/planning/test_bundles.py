"""Whole groups of grouped convolutions, against groups written by hand and convolutions cut by hand."""

from __future__ import annotations

import copy

import pytest
import timm
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import batchnorm, example, layer, randomise, runs
from tests.helpers import assert_same_state, assert_scores_close, gap, outputs, plan_without
from tests.planning.test_trace import macs_of, params_of
from tpvprune.plan import plan_of
from tpvprune.planning.widths import kept_widths


class Next(nn.Module):
    """Two grouped convolutions between dense ones, of four groups each, and a depthwise one between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.bn2 = nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.BatchNorm2d(12)
        self.dw, self.again = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1, groups=4)
        self.last, self.fc = nn.Conv2d(8, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.grouped(F.relu(self.bn1(self.first(x))))))
        return self.fc(self.last(F.relu(self.again(self.dw(x)))).mean((2, 3)))


class Stream(nn.Module):
    """A grouped convolution that writes into a residual stream, so that all of it is cut by its groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 9, 1)
        self.grouped, self.fc = nn.Conv2d(9, 6, 1, groups=3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        return self.fc((x + self.grouped(self.up(x).tanh())).mean((2, 3)))


NETS = {"next": Next, "stream": Stream}


def made(name: str) -> tuple[nn.Module, Tensor, tp.Graph]:
    model, inputs = randomise(NETS[name]()), example(3, 3, 6, 6)
    return model, inputs, tp.trace(model, inputs, bundles=True)


def members_of(group: tp.Group) -> dict[tuple[str, int, str], list[list[int]]]:
    return {(m.param, m.dim, m.role): m.entries(group.units).tolist() for m in group.members}


def test_groups_are_those_written_by_hand() -> None:
    _, _, graph = made("next")
    assert [(g.id, g.kind, g.units) for g in graph.groups] == [("first", "bundle", 4), ("last", "channel", 5)]
    two, three = runs(4, 2), runs(4, 3)
    wanted = dict.fromkeys(layer("first", "produce", bias=False) | batchnorm("bn1"), two)
    wanted |= dict.fromkeys(layer("grouped", "affine") | batchnorm("bn2") | layer("dw", "affine"), three)
    wanted |= dict.fromkeys(layer("again", "affine") | layer("last", "consume"), two)
    assert members_of(graph["first"]) == wanted
    assert graph["first"].exact_mask
    assert set(graph.skipped) == {"fc"}


def test_a_stream_is_cut_by_the_groups_that_write_it() -> None:
    _, _, graph = made("stream")
    assert [(g.id, g.kind, g.units) for g in graph.groups] == [("stem", "bundle", 3)]
    two, three = runs(3, 2), runs(3, 3)
    sides = layer("stem", "produce") | layer("up", "consume") | layer("grouped", "affine") | layer("fc", "consume")
    wanted = dict.fromkeys(sides, two) | dict.fromkeys(layer("up", "produce"), three)
    assert members_of(graph["stem"]) == wanted


def test_without_the_option_units_are_channels() -> None:
    model, inputs, _ = made("next")
    assert {g.kind for g in tp.trace(model, inputs).groups} == {"channel"}


def by_hand(model: nn.Module, kept: list[int]) -> nn.Module:
    """`Next` with these groups alone, built anew at its widths."""
    out = copy.deepcopy(model)
    n, two, three = len(kept), [2 * k + i for k in kept for i in (0, 1)], [3 * k + i for k in kept for i in (0, 1, 2)]
    out.first, out.bn1 = nn.Conv2d(3, 2 * n, 1, bias=False), nn.BatchNorm2d(2 * n)
    out.grouped, out.bn2 = nn.Conv2d(2 * n, 3 * n, 3, padding=1, groups=n), nn.BatchNorm2d(3 * n)
    out.dw, out.again = nn.Conv2d(3 * n, 3 * n, 3, padding=1, groups=3 * n), nn.Conv2d(3 * n, 2 * n, 1, groups=n)
    out.last = nn.Conv2d(2 * n, 5, 1)
    state = model.state_dict()
    rows = {"first": two, "bn1": two, "grouped": three, "bn2": three, "dw": three, "again": two}
    cut = {k: v[rows[k.split(".")[0]]] if k.split(".")[0] in rows and v.ndim else v for k, v in state.items()}
    out.double().load_state_dict(cut | {"last.weight": state["last.weight"][:, two]})
    return out.eval()


@pytest.mark.parametrize("gone", [[0], [3], [1, 2], [0, 1, 3]])
def test_removing_groups_is_building_the_layer_with_fewer(gone: list[int]) -> None:
    model, inputs, graph = made("next")
    plan = plan_without(graph, {"first": gone})
    small, hand = tp.apply(model, plan), by_hand(model, [k for k in range(4) if k not in gone])
    assert_same_state(small.state_dict(), hand.state_dict())
    for name in ("first", "grouped", "dw", "again", "last"):
        mine, theirs = small.get_submodule(name), hand.get_submodule(name)
        assert (mine.in_channels, mine.out_channels, mine.groups) == (
            theirs.in_channels,
            theirs.out_channels,
            theirs.groups,
        )
    assert gap(outputs(small, inputs), outputs(hand, inputs)) < tolerances.SAME_FUNCTION
    assert plan.params == params_of(small)
    assert plan.macs == macs_of(small, inputs)


@pytest.mark.parametrize("name", NETS)
def test_masking_equals_removal(name: str) -> None:
    model, inputs, graph = made(name)
    plan = plan_without(graph, {graph.groups[0].id: [1]})
    small = outputs(tp.apply(model, plan), inputs)
    assert gap(small, outputs(tp.mask(model, plan), inputs)) < tolerances.SAME_FUNCTION
    assert gap(small, outputs(model, inputs)) > tolerances.OTHER_FUNCTION


@pytest.mark.parametrize("head", ["logits", "softmax"])
@pytest.mark.parametrize("over", ["consume", "all"])
@pytest.mark.parametrize("name", NETS)
def test_exact_scores_are_those_of_dense_jacobians(name: str, over: str, head: str) -> None:
    model, inputs, graph = made(name)
    scores = tp.score(model, [inputs], graph, tp.TPV(head=head, probes="exact", over=over))
    assert_scores_close(scores.values, reference.tpv(model, inputs, graph, head, over), tolerances.EXACT)


def test_plans_compose_and_are_saved(tmp_path) -> None:
    model, inputs, graph = made("next")
    first = plan_without(graph, {"first": [2]})
    middle = tp.apply(model, first)
    later = plan_without(tp.trace(middle, inputs, bundles=True), {"first": [0], "last": [1]})
    in_turn, at_once = tp.apply(middle, later), tp.apply(model, first.compose(later))
    assert_same_state(in_turn.state_dict(), at_once.state_dict())
    assert gap(outputs(in_turn, inputs), outputs(at_once, inputs)) < tolerances.SAME_FUNCTION
    assert plan_of(in_turn).mask("first").tolist() == [False, True, False, True]
    tp.save(in_turn, tmp_path)
    again = tp.load(tmp_path, skeleton=copy.deepcopy(model))
    assert gap(outputs(again, inputs), outputs(in_turn, inputs)) == 0
    assert again.grouped.groups == 2


def test_allocation_keeps_two_groups_and_whole_ones() -> None:
    model, inputs, graph = made("next")
    assert kept_widths(graph["first"], 2, tp.Budget(macs=0.5, round_to=1)) == [4, 3, 2]
    scores = tp.score(model, [inputs], graph)
    plan = tp.allocate(scores, graph, tp.Budget(macs=0.65, round_to=1))
    assert plan.macs == macs_of(tp.apply(model, plan), inputs) <= 0.65 * graph.macs()
    with pytest.raises(tp.BudgetError, match="the floor is"):
        tp.allocate(scores, graph, tp.Budget(macs=0.2, round_to=1))


class Normed(nn.Module):
    """A grouped convolution with something else than its groups around it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=3)
        width, groups = {"groups": (12, 6), "depthwise": (3, 3)}.get(kind, (12, 1))
        self.other = nn.GroupNorm(4, 12) if kind == "norm" else nn.Conv2d(12, width, 1, groups=groups)
        self.kind, self.fc = kind, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.first(x).tanh())
        return self.grouped(x).mean((2, 3)) if self.kind == "output" else self.fc(self.other(x).tanh().mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("norm", "it has a single unit"),
        ("groups", "the code of 'other' (Conv2d) cannot do without them"),
        ("output", "its outputs are the model's outputs"),
    ],
)
def test_groups_that_must_stay_are_listed_with_the_reason(kind: str, why: str) -> None:
    model = randomise(Normed(kind))
    graph = tp.trace(model, example(2, 3, 4, 4), bundles=True)
    assert not [g for g in graph.groups if g.kind == "bundle"]
    assert why in graph.skipped["grouped"]


def test_the_groups_of_a_layer_leave_with_what_reads_them_each() -> None:
    model, inputs = randomise(Normed("depthwise")), example(2, 3, 4, 4)
    graph = tp.trace(model, inputs, bundles=True)
    assert [(g.id, g.kind, g.units) for g in graph.groups] == [("first", "bundle", 3)]
    plan = plan_without(graph, {"first": [1]})
    small = tp.apply(model, plan)
    assert (small.grouped.groups, small.other.groups, small.fc.in_features) == (2, 2, 2)
    assert gap(outputs(small, inputs), outputs(tp.mask(model, plan), inputs)) < 1e-12


MODELS = {"resnext50_32x4d": 16, "regnetx_002": 13, "regnety_002": 13}


@pytest.mark.parametrize("name", [n if n == "regnety_002" else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_timm_models_lose_whole_groups(name: str) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=5).double().eval()
    inputs = example(1, 3, 64, 64)
    graph = tp.trace(model, inputs, bundles=True, depth=True)
    bundles = [g for g in graph.groups if g.kind == "bundle"]
    assert len(bundles) == MODELS[name]
    plan = plan_without(graph, {g.id: [0, *range(2, g.units, 3)] for g in bundles})
    small = tp.apply(model, plan)
    assert gap(outputs(small, inputs), outputs(tp.mask(model, plan), inputs)) < tolerances.SAME_FUNCTION
    assert plan.params == params_of(small)
    assert plan.macs == macs_of(small, inputs)
    block = next(g.id for g in graph.groups if g.kind == "block")
    both = plan_without(graph, {block: [0]} | {g.id: [1] for g in bundles})
    assert both.macs == macs_of(tp.apply(model, both), inputs)


class Rises(nn.Module):
    """A grouped transposed convolution between dense ones, and what it makes is added to a branch beside it."""

    def __init__(self, made: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(3, 7, 3), nn.Conv2d(7, 4, 1)
        self.rise = nn.ConvTranspose2d(4, made, 2, stride=2, groups=groups, bias=bias)
        self.beside, self.bn, self.fc = nn.Conv2d(7, made, 1), nn.BatchNorm2d(6), nn.Linear(6, 3)
        self.last = nn.Conv2d(made, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        risen = self.rise(F.relu(self.squeeze(x)))
        risen = risen + F.interpolate(self.beside(x), scale_factor=2)
        return self.fc(F.relu(self.bn(self.last(F.relu(risen)))).mean((2, 3)))


@pytest.mark.parametrize("bundles", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("made", "groups"), [(4, 2), (4, 4), (8, 4), (2, 2)])
def test_around_a_grouped_transposed_convolution_the_rest_is_cut(
    made: int, groups: int, bias: bool, bundles: bool
) -> None:
    model, inputs = randomise(Rises(made, groups, bias)), example(2, 3, 6, 6)
    graph = tp.trace(model, inputs, bundles=bundles)
    assert [(group.id, group.units) for group in graph.groups] == [("stem", 7), ("last", 6)]
    assert graph.skipped["rise"] == graph.skipped["squeeze"] == "'rise' is a grouped transposed convolution"
    assert set(graph.skipped) == {"rise", "squeeze", "beside", "fc"}
    plan = plan_without(graph, {"stem": [0, 3, 4], "last": [1, 5]})
    small = tp.apply(model, plan)
    assert gap(outputs(small, inputs), outputs(tp.mask(model, plan), inputs)) < tolerances.SAME_FUNCTION
    assert gap(outputs(small, inputs), outputs(model, inputs)) > tolerances.OTHER_FUNCTION
    assert plan.params == params_of(small) < graph.params()
    assert graph.macs() == macs_of(copy.deepcopy(model), inputs)
    assert plan.macs == macs_of(small, inputs) < graph.macs()
