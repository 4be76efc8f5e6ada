"""Criteria that look at weights alone, against plain loops over each unit's weights."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import Built, assert_scores_close, built
from tests.scoring.loops import unit_of, weight_members
from tpvprune.members import Group
from tpvprune.testing import check_criterion

NAMES = ("mlp", "conv_bn", "residual", "grouped", "depthwise", "concat", "flatten", "vit", "transposed", "groupnorm")
WITH_BATCHNORM = ("conv_bn", "residual", "grouped", "depthwise", "concat")
EVERY = (tp.Random(), tp.L1(), tp.L2(), tp.LAMP(), tp.FPGM(), tp.WHC(), tp.BNScale())


def averaged(parts: list[list[float]]) -> list[float]:
    """Mean over members of each member's scores in units of their mean."""
    relative = [[value / (sum(part) / len(part)) for value in part] for part in parts]
    return [sum(column) / len(column) for column in zip(*relative, strict=True)]


def sizes(model: nn.Module, group: Group, power: int) -> list[float]:
    """Sum of powers of absolute weights over all members."""
    return averaged(
        [
            [sum(abs(float(w)) ** power for w in unit_of(weight, group, member, unit)) for unit in range(group.units)]
            for member, weight in weight_members(model, group)
        ]
    )


def lamp(model: nn.Module, group: Group) -> list[float]:
    squares = sizes(model, group, 2)
    return [s / sum(other for other in squares if other >= s) for s in squares]


def filters(model: nn.Module, group: Group) -> list[list[Tensor]]:
    """Per member that writes the channels, the weights of each unit."""
    return [
        [unit_of(weight, group, member, unit) for unit in range(group.units)]
        for member, weight in weight_members(model, group, ("produce",))
    ]


def fpgm(model: nn.Module, group: Group) -> list[float]:
    return averaged(
        [[sum(math.dist(a.tolist(), b.tolist()) for b in rows) for a in rows] for rows in filters(model, group)]
    )


def whc(model: nn.Module, group: Group) -> list[float]:
    parts = []
    for rows in filters(model, group):
        part = [0.0] * group.units
        for i, j in combinations(range(group.units), 2):
            a, b = float((rows[i] @ rows[i]).sqrt()), float((rows[j] @ rows[j]).sqrt())
            apart = a * b * (1 - abs(float(rows[i] @ rows[j])) / (a * b))
            part[i] += apart
            part[j] += apart
        parts.append(part)
    return averaged(parts)


REFERENCES: dict[str, tuple[Any, Callable[[nn.Module, Group], list[float]]]] = {
    "l1": (tp.L1(), lambda model, group: sizes(model, group, 1)),
    "l2": (tp.L2(), lambda model, group: sizes(model, group, 2)),
    "lamp": (tp.LAMP(), lamp),
    "fpgm": (tp.FPGM(), fpgm),
    "whc": (tp.WHC(), whc),
}


def wanted(b: Built, of: Callable[[nn.Module, Group], list[float]]) -> dict[str, Tensor]:
    return {group.id: torch.tensor(of(b.model, group), dtype=torch.float64) for group in b.graph.groups}


# A class token is one number a channel: numbers all point the same way or the opposite, and WHC divides by zero.
@pytest.mark.parametrize(("name", "which"), [(n, w) for n in NAMES for w in REFERENCES if (n, w) != ("vit", "whc")])
def test_scores_are_those_of_plain_loops(name: str, which: str) -> None:
    b, (criterion, of) = built(name), REFERENCES[which]
    scores = tp.score(b.model, [b.inputs], b.graph, criterion)
    assert_scores_close(scores.values, wanted(b, of), tolerances.EXACT)
    assert scores.criterion == which
    assert scores.stderr is None


def test_heads_are_compared_by_all_rows_of_the_fused_projection() -> None:
    b = built("vit")
    found = tp.score(b.model, [], b.graph, tp.WHC()).values
    heads = [group for group in b.graph.groups if group.kind == "head"]
    assert len(heads) == 2
    for group in heads:
        assert found[group.id].tolist() == pytest.approx(whc(b.model, group), rel=tolerances.EXACT)


@pytest.mark.parametrize("criterion", [tp.L1(), tp.L2(), tp.FPGM(), tp.WHC()], ids=lambda c: type(c).__name__)
def test_the_scale_of_a_layer_does_not_matter(residual: Built, criterion: Any) -> None:
    model = copy.deepcopy(residual.model)
    with torch.no_grad():
        model.a2.weight *= 7
    found = tp.score(model, [], residual.graph, criterion).values
    assert_scores_close(found, tp.score(residual.model, [], residual.graph, criterion).values, tolerances.EXACT)


def test_the_scores_of_an_undivided_member_average_one(conv_bn: Built) -> None:
    for criterion in (tp.L1(), tp.L2(), tp.FPGM(), tp.WHC()):
        for value in tp.score(conv_bn.model, [], conv_bn.graph, criterion).values.values():
            assert float(value.mean()) == pytest.approx(1, rel=tolerances.EXACT)


@pytest.mark.parametrize("criterion", [tp.L1(), tp.L2(), tp.LAMP(), tp.WHC()], ids=lambda c: type(c).__name__)
def test_a_unit_without_weights_scores_least(conv_bn: Built, criterion: Any) -> None:
    model = copy.deepcopy(conv_bn.model)
    with torch.no_grad():
        for tensor in (model.conv1.weight[2], model.bn1.weight[2], model.conv2.weight[:, 2]):
            tensor.zero_()
    value = tp.score(model, [], conv_bn.graph, criterion).values["conv1"]
    assert float(value[2]) == 0
    assert float(value.sort().values[1]) > 0


def test_filters_alike_are_the_first_to_go() -> None:
    # What FPGM and WHC are for: two filters that point the same way replace each other, however large they are.
    model = randomise(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    with torch.no_grad():
        model[0].weight.copy_(4 * torch.eye(5, 6, dtype=torch.float64))
        model[0].weight[1] = model[0].weight[0]
    graph = tp.trace(model, example(2, 6))
    for criterion in (tp.FPGM(), tp.WHC()):
        value = tp.score(model, [], graph, criterion).values["0"]
        assert set(value.argsort()[:2].tolist()) == {0, 1}
    assert float(tp.score(model, [], graph, tp.WHC()).values["0"][0]) > 0  # three others point elsewhere


def test_filters_of_one_weight_have_distances_too() -> None:
    model = randomise(nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 3)))
    graph = tp.trace(model, example(3, 1))
    value = tp.score(model, [], graph, tp.FPGM()).values["0"]
    assert value.tolist() == pytest.approx(fpgm(model, graph["0"]), rel=tolerances.EXACT)


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "grouped"])
def test_single_weights_are_scored_as_they_are(name: str) -> None:
    b = built(name)
    graph = tp.weight_graph(b.model)
    weights = {group.id: b.model.get_parameter(group.id).detach().flatten() for group in graph.groups}
    for criterion, of in (
        (tp.L1(), lambda w: [abs(x) for x in w]),
        (tp.L2(), lambda w: [x**2 for x in w]),
        # LAMP as published: over the weights of the layer that are no smaller, itself among them.
        (tp.LAMP(), lambda w: [x**2 / sum(y**2 for y in w if y**2 >= x**2) for x in w]),
    ):
        found = tp.score(b.model, [], graph, criterion).values
        for n, w in weights.items():
            assert found[n].tolist() == pytest.approx(of(w.tolist()), rel=tolerances.EXACT)


def test_blocks_are_summed(mlp: Built) -> None:
    graph = tp.weight_graph(mlp.model, (4, 3), ["0"])
    matrix = mlp.model[0].weight.detach()
    blocks = [matrix[i : i + 4, j : j + 3] for i in (0, 4) for j in (0, 3)]
    found = {type(c).__name__: tp.score(mlp.model, [], graph, c).values["0.weight"] for c in (tp.L1(), tp.L2())}
    for name, power in (("L1", 1), ("L2", 2)):
        sums = [float(block.abs().pow(power).sum()) for block in blocks]
        assert found[name].tolist() == pytest.approx(sums, rel=tolerances.EXACT)


def test_lamp_keeps_the_order_of_squares_and_ends_at_one(residual: Built) -> None:
    squares = tp.score(residual.model, [], residual.graph, tp.L2()).values
    for name, value in tp.score(residual.model, [], residual.graph, tp.LAMP()).values.items():
        assert value.argsort().tolist() == squares[name].argsort().tolist()
        assert float(value.max()) == 1
        assert float(value.min()) > 0


@pytest.mark.parametrize("name", WITH_BATCHNORM)
def test_bnscale_is_the_mean_absolute_scale_of_the_batch_norms(name: str) -> None:
    b = built(name)
    model, found = copy.deepcopy(b.model), {}
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[::2] *= -1
    for group in b.graph.groups:
        scales = [
            [float(unit_of(weight, group, member, unit).abs().mean()) for unit in range(group.units)]
            for member, weight in weight_members(model, group, ("affine",))
            if isinstance(model.get_submodule(member.layer), nn.BatchNorm2d)
        ]
        if scales:
            found[group.id] = torch.tensor(
                [sum(column) / len(column) for column in zip(*scales, strict=True)], dtype=torch.float64
            )
    largest = max(float(value.max()) for value in found.values())
    without = [group for group in b.graph.groups if group.id not in found]
    found |= {group.id: torch.full((group.units,), largest, dtype=torch.float64) for group in without}
    assert_scores_close(tp.score(model, [], b.graph, tp.BNScale()).values, found, tolerances.EXACT)
    assert bool(without) == (name in ("grouped", "depthwise", "concat"))


def test_groups_without_a_batch_norm_are_named_and_go_last(caplog: pytest.LogCaptureFixture) -> None:
    b = built("grouped")
    with caplog.at_level(logging.WARNING, "tpvprune"):
        scores = tp.score(b.model, [], b.graph, tp.BNScale())
    assert [record.getMessage() for record in caplog.records] == [
        "bnscale: grouped, last have no batch norm and go last"
    ]
    largest = float(scores.values["conv1"].max())
    assert scores.values["grouped"].tolist() == [largest] * 3
    assert scores.values["last"].tolist() == [largest] * 5


def test_bnscale_needs_a_batch_norm() -> None:
    for name in ("mlp", "vit", "groupnorm", "layernorm_stream", "transposed"):  # other norms are none
        b = built(name)
        with pytest.raises(tp.ModelError, match="bnscale needs batch norms, and no group of this model has one"):
            tp.score(b.model, [], b.graph, tp.BNScale())


@pytest.mark.parametrize("criterion", [tp.FPGM(), tp.WHC(), tp.BNScale()], ids=lambda c: type(c).__name__)
def test_criteria_of_channels_refuse_single_weights(conv_bn: Built, criterion: Any) -> None:
    with pytest.raises(tp.ModelError, match=r"does not score single weights \('conv1.weight'\)"):
        tp.score(conv_bn.model, [], tp.weight_graph(conv_bn.model), criterion)


def test_random_scores_repeat_with_the_seed_and_differ_without(residual: Built) -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        return dict(tp.score(residual.model, [], residual.graph, tp.Random(seed)).values)

    torch.manual_seed(5)
    first = drawn(0)
    torch.manual_seed(6)
    assert_scores_close(drawn(0), first, 0)
    assert tp.score(residual.model, [], residual.graph, tp.Random(3)).seed == 3
    for seed in (1, 2, 3):
        assert all(not torch.equal(value, first[name]) for name, value in drawn(seed).items())


def test_random_scores_of_a_group_have_nothing_to_do_with_those_of_another() -> None:
    names = [f"stages.{i}.blocks.{j}.conv" for i in range(4) for j in range(4)]
    net = nn.ModuleDict({name.replace(".", "_"): nn.Linear(5, 5) for name in names})
    graph = tp.weight_graph(net)
    drawn = [tuple(v.tolist()) for v in tp.score(net, [], graph, tp.Random()).values.values()]
    assert len(set(drawn)) == len(names)
    # A group's numbers are its own: they stay when others leave the graph.
    alone = tp.score(net, [], tp.weight_graph(net, layers=["stages_2_blocks_1_conv"]), tp.Random()).values
    ((name, value),) = alone.items()
    assert tuple(value.tolist()) == drawn[[group.id for group in graph.groups].index(name)]


def test_random_scores_are_uniform() -> None:
    net = nn.Linear(100, 100)
    value = tp.score(net, [], tp.weight_graph(net), tp.Random()).values["weight"]
    count = value.numel()
    assert float(value.min()) >= 0
    assert float(value.max()) < 1
    assert abs(float(value.mean()) - 1 / 2) < tolerances.STDERRS * (1 / 12 / count) ** 0.5
    for edge in (0.1, 0.25, 0.5, 0.9):
        share = float((value < edge).double().mean())
        assert abs(share - edge) < tolerances.STDERRS * (edge * (1 - edge) / count) ** 0.5


class Unreadable:
    def __iter__(self) -> Any:
        raise AssertionError("batches were read")


@pytest.mark.parametrize("criterion", EVERY, ids=lambda c: type(c).__name__)
def test_the_criterion_promise_is_kept_and_no_batch_is_read(conv_bn: Built, criterion: Any) -> None:
    check_criterion(criterion, conv_bn.model, Unreadable(), conv_bn.graph)
    told: list[tuple[str, int, int | None]] = []
    scores = tp.score(conv_bn.model, Unreadable(), conv_bn.graph, criterion, progress=lambda *what: told.append(what))
    assert told == [("score", 1, 2), ("score", 2, 2)]
    assert (scores.samples, scores.probes) == (0, 0)
    assert all(value.dtype == torch.float64 for value in scores.values.values())


@pytest.mark.parametrize("criterion", EVERY[1:], ids=lambda c: type(c).__name__)
def test_scores_of_float32_weights_are_taken_in_float64(conv_bn: Built, criterion: Any) -> None:
    narrow = copy.deepcopy(conv_bn.model).float()
    found = tp.score(narrow, [], conv_bn.graph, criterion).values
    wide = tp.score(copy.deepcopy(narrow).double(), [], conv_bn.graph, criterion).values
    assert_scores_close(found, wide, tolerances.EXACT)


@pytest.mark.parametrize("criterion", EVERY, ids=lambda c: type(c).__name__)
def test_another_models_graph_is_refused(conv_bn: Built, criterion: Any) -> None:
    with pytest.raises(tp.PlanError, match="traced from another"):
        tp.score(built("residual").model, [], conv_bn.graph, criterion)
