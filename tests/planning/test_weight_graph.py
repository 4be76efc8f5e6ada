"""Weights and blocks of them as units: what belongs to which, and what plans over them can do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import tpvprune as tp
from tests import tolerances
from tests.helpers import assert_same_state, built, gap, outputs

LAYERS = {
    "mlp": ["0", "2", "4"],
    "conv_bn": ["conv1", "conv2", "fc"],
    "grouped": ["conv1", "grouped", "last", "fc"],
    "shared": ["embed", "tied1", "middle", "back", "twice", "fc"],
    "transposed": ["widen", "conv", "narrow", "fc"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_weight_of_every_layer_is_a_unit(name: str) -> None:
    model = built(name).model
    graph = tp.weight_graph(model)
    assert [group.id for group in graph.groups] == [f"{layer}.weight" for layer in LAYERS[name]]
    for group in graph.groups:
        (member,) = group.members
        assert (member.param, member.dim, member.index, member.role) == (group.id, None, None, "consume")
        assert (group.kind, group.units, group.exact_mask) == ("weight", model.get_parameter(group.id).numel(), True)
    assert graph.shapes == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert (graph.reuse, graph.skipped) == ({}, {})
    assert graph.model_id == built(name).graph.model_id


@pytest.mark.parametrize("block", [(1, 2), (2, 1), (4, 3), (8, 6)])
def test_blocks_are_rows_by_columns(block: tuple[int, int]) -> None:
    graph = tp.weight_graph(built("mlp").model, block, ["0"])  # 8 x 6
    (group,) = graph.groups
    matrix = torch.arange(48).reshape(8, 6)
    high, wide = block
    wanted = [
        sorted(matrix[r : r + high, c : c + wide].flatten().tolist())
        for r in range(0, 8, high)
        for c in range(0, 6, wide)
    ]
    assert [sorted(unit) for unit in group.members[0].index.tolist()] == wanted
    assert group.units == len(wanted)
    assert group.signature == f"weight:{high}x{wide}"


def test_a_block_of_a_convolution_spans_kernel_positions() -> None:
    (group,) = tp.weight_graph(built("conv_bn").model, (1, 9), ["conv2"]).groups
    assert group.units == 5 * 6
    weight = torch.arange(5 * 6 * 9).reshape(5, 6, 3, 3)
    assert group.members[0].index.tolist() == [weight[o, i].flatten().tolist() for o in range(5) for i in range(6)]


@pytest.mark.parametrize(
    ("layers", "found"),
    [(["0"], ["0"]), (["0", "4"], ["0", "4"]), (["[02]"], ["0", "2"]), (["re:[24]", "0"], ["2", "4", "0"])],
)
def test_layers_are_chosen_by_name_glob_or_expression(layers: list[str], found: list[str]) -> None:
    graph = tp.weight_graph(built("mlp").model, layers=layers)
    assert [group.id for group in graph.groups] == [f"{name}.weight" for name in found]


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"layers": ["fc"]}, "'fc' matches none of the layers 0, 2, 4"),
        ({"layers": ["0", "1"]}, "'1' matches none"),
        ({"block": (2, 4)}, "blocks of 2 x 4 do not divide '0.weight', a matrix of 8 x 6; .*layers="),
        ({"block": (0, 1)}, "blocks of 0 x 1"),
        ({"block": (1, -1)}, "blocks of 1 x -1"),
    ],
)
def test_what_cannot_be_chosen_is_refused(kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(tp.ModelError, match=match):
        tp.weight_graph(built("mlp").model, **kwargs)


@pytest.mark.parametrize("block", [2, (1.0, 2.0), (1, 2, 3), (2,), "22", (True, 2), None])
def test_a_block_is_two_whole_numbers(block: object) -> None:
    with pytest.raises(tp.InputError, match=r"block=.* is no pair of whole numbers; give rows .*block=\(4, 4\)"):
        tp.weight_graph(built("mlp").model, block=block)


def test_single_weights_however_the_pair_is_written() -> None:
    model = built("mlp").model
    for block in ([1, 1], (np.int64(1), 1)):
        graph = tp.weight_graph(model, block=block)
        assert graph.to_json() == tp.weight_graph(model).to_json()
        assert all(group.members[0].index is None for group in graph.groups)
    scores = tp.score(model, [], tp.weight_graph(model, [1, 1], ["2"]), tp.L1())  # 8 inputs
    assert tp.sparsify(scores, tp.weight_graph(model, [1, 1], ["2"]), pattern="2:4").sparsity == 0.5


def test_weights_made_of_other_parameters_are_left_out_with_a_reason() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    graph = tp.weight_graph(model)
    assert [group.id for group in graph.groups] == ["2.weight"]
    assert graph.skipped == {"0": "its weight is computed from other parameters"}
    with pytest.raises(tp.ModelError, match="matches none"):
        tp.weight_graph(model, layers=["0"])


class Mixed(nn.Module):
    """Matrices of many kinds of layers; one that is both an embedding and a linear layer is offered as the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(5, 4), nn.LSTM(4, 6, 2)
        self.place, self.shift = nn.Parameter(torch.zeros(1, 3, 6)), nn.Parameter(torch.zeros(6))
        self.attn, self.norm = nn.MultiheadAttention(6, 2), nn.LayerNorm(6)
        self.far = nn.MultiheadAttention(6, 2, kdim=3)
        self.normed = weight_norm(nn.Embedding(3, 4))
        self.fc, self.names = nn.Linear(6, 5), nn.Embedding(5, 6)
        self.names.weight = self.fc.weight


def test_matrices_of_other_layers_are_left_out_with_a_reason() -> None:
    model = Mixed()
    graph = tp.weight_graph(model)
    assert [group.id for group in graph.groups] == ["attn.out_proj.weight", "far.out_proj.weight", "fc.weight"]
    told = {
        "place": ("Mixed", "place"),
        "embed": ("Embedding", "weight"),
        "lstm": ("LSTM", "weight_ih_l0, weight_hh_l0, weight_ih_l1, weight_hh_l1"),
        "attn": ("MultiheadAttention", "in_proj_weight"),
        "far": ("MultiheadAttention", "q_proj_weight, k_proj_weight, v_proj_weight"),
        "normed": ("ParametrizedEmbedding", "weight"),
    }
    assert graph.skipped == {
        name: f"{kind} is no convolution or linear layer, whose weights alone are units ({keys})"
        for name, (kind, keys) in told.items()
    }
    units = {id(model.get_parameter(group.id)) for group in graph.groups}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and id(parameter) not in units:
            assert name in graph.skipped or name.split(".")[0] in graph.skipped
    assert tp.Graph.from_json(graph.to_json()).skipped == graph.skipped


def test_where_a_pattern_meets_none_the_reason_is_told() -> None:
    with pytest.raises(
        tp.ModelError, match=r"'lstm' matches none of the layers attn\.out_proj.*\('lstm': LSTM is no conv"
    ):
        tp.weight_graph(Mixed(), layers=["lstm"])
    with pytest.raises(
        tp.ModelError, match=r"'\*' matches no layer: no weight of the model is a unit \('0': Embedding is"
    ):
        tp.weight_graph(nn.Sequential(nn.Embedding(4, 3)))


def test_a_graph_is_saved_and_loaded(tmp_path) -> None:
    graph = tp.weight_graph(built("mlp").model, (2, 2), ["0"])
    graph.save(tmp_path / "graph.json")
    again = tp.Graph.load(tmp_path / "graph.json")
    assert again.to_json() == graph.to_json()
    assert again.groups[0].members[0].dim is None


def some_units(graph: tp.Graph, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group.id: torch.rand(group.units, generator=generator) < 0.6 for group in graph.groups}


@pytest.mark.parametrize(
    ("name", "block", "layers"),
    [
        ("mlp", (1, 1), ["*"]),
        ("mlp", (2, 3), ["0"]),
        ("grouped", (1, 1), ["*"]),
        ("conv_bn", (1, 9), ["conv*"]),
        ("shared", (1, 1), ["*"]),
        ("transposed", (1, 2), ["widen", "narrow"]),
    ],
)
def test_a_mask_zeroes_exactly_the_plans_weights(name: str, block: tuple[int, int], layers: list[str]) -> None:
    b = built(name)
    before = copy.deepcopy(b.model.state_dict())
    graph = tp.weight_graph(b.model, block, layers)
    keep = some_units(graph)
    masked = tp.mask(b.model, tp.Plan(keep, graph))
    wanted = copy.deepcopy(before)
    for group in graph.groups:
        rows = before[group.id].shape[0]
        columns = before[group.id].numel() // rows
        matrix, unit = wanted[group.id].reshape(rows, columns), 0
        for top in range(0, rows, block[0]):
            for left in range(0, columns, block[1]):
                if not keep[group.id][unit]:
                    matrix[top : top + block[0], left : left + block[1]] = 0
                unit += 1
    for tied, first in (("tied2.weight", "tied1.weight"),):
        if tied in wanted:
            wanted[tied] = wanted[first]
    assert_same_state(masked.state_dict(), wanted)
    assert_same_state(b.model.state_dict(), before)
    assert gap(outputs(masked, b.inputs), outputs(b.model, b.inputs)) > tolerances.OTHER_FUNCTION


def test_nothing_is_cut_or_budgeted() -> None:
    b = built("mlp")
    graph = tp.weight_graph(b.model)
    plan = tp.Plan(some_units(graph), graph)
    assert_same_state(tp.apply(b.model, plan).state_dict(), tp.mask(b.model, plan).state_dict())
    scores = tp.score(b.model, [b.inputs], graph)
    with pytest.raises(tp.PlanError, match="single weights, which save no budget"):
        tp.allocate(scores, graph, tp.Budget(params=0.5))


def test_a_plan_goes_through_a_file(tmp_path) -> None:
    b = built("mlp")
    graph = tp.weight_graph(b.model, (2, 2), ["0"])
    plan = tp.Plan(some_units(graph), graph)
    plan.save(tmp_path / "plan.json")
    again = tp.Plan.load(tmp_path / "plan.json")
    assert_same_state(tp.mask(b.model, again).state_dict(), tp.mask(b.model, plan).state_dict())
