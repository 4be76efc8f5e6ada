"""Energies of single weights against dense Jacobians; spending of a budget against enumeration."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import example, randomise
from tpvprune import analysis
from tpvprune.analysis.rounder import FLOAT
from tpvprune.report import compare

BITS = (6, 4, 3, 2)


def net() -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 4)))


@pytest.fixture(scope="module")
def told():
    model = net()
    batches = [example(64, 6, seed=seed) for seed in range(4)]
    graph = tp.trace(model, batches[0][:1])
    found = analysis.advise(model, batches, graph, 0.02, bits=BITS)
    return model, batches, graph, found


def test_energies_are_the_diagonal_of_dense_jacobians(mlp) -> None:
    names = ["0.weight", "2.weight"]
    jacobian = reference.jacobians(mlp.model, mlp.inputs, names)
    m = reference.metric(mlp.model(mlp.inputs).detach(), "softmax")
    found = analysis.weight_energies(mlp.model, [mlp.inputs] * 600, names)
    assert found.samples == 600 * len(mlp.inputs)
    for name, j in jacobian.items():
        wanted = torch.einsum("bkp,bkl,blp->p", j.flatten(2), m, j.flatten(2)) / len(mlp.inputs)
        assert found.relative[name] < 0.1
        gap = abs(float(found.values[name].sum() / wanted.sum()) - 1)
        assert gap < tolerances.STDERRS * found.relative[name]
        near = torch.corrcoef(torch.stack([found.values[name].flatten(), wanted]))[0, 1]
        assert float(near) > 0.95


def test_too_few_samples_to_tell_of_others_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = net(), example(4, 6)
    graph = tp.trace(model, inputs[:1])
    for count, said in ((3, 1), (4, 0)):
        caplog.clear()
        analysis.advise(model, [inputs[:count]], graph, 0.02, bits=BITS)
        assert sum("may be more on others" in record.message for record in caplog.records) == said


def test_what_rounding_one_layer_costs_is_half_its_trace(told) -> None:
    model, batches, _, found = told
    for one in found.layers:
        for bits, kl in one.kl_at_bits.items():
            change = tp.Rounding(bits, "channel")
            trace = analysis.tpv(model, batches, change, rtol=None, parameters=[one.name])
            error = trace.stderr + trace.value * one.relative_error
            assert abs(kl - trace.value / 2) < tolerances.STDERRS * error / 2
    for bits, total in found.rounding_totals.items():
        assert total == pytest.approx(sum(one.kl_at_bits[bits] for one in found.layers), rel=tolerances.EXACT)


def test_the_mix_keeps_to_the_budget_and_is_no_dearer_than_either_alone(told) -> None:
    _, _, graph, found = told
    assert found.mixed.total <= 0.02 + tolerances.EXACT
    assert found.mixed.cost <= min(mix.cost for mix in found.alone.values())
    assert found.mixed.pruning == pytest.approx(found.plan.made_by.get("predicted_kl", 0.0))
    assert found.mixed.rounding == pytest.approx(sum(one.kl for one in found.layers), rel=tolerances.EXACT)
    left = graph.sizes(found.plan.keep)
    held = sum(FLOAT * shape.numel() for name, shape in _shapes(left).items() if len(shape) == 1)
    held += sum(one.bits * _shapes(left)[one.name].numel() for one in found.layers)
    assert found.mixed.cost == pytest.approx(held / (FLOAT * graph.params()), rel=tolerances.EXACT)
    assert found.alone["pruning"].rounding == 0
    assert found.alone["rounding"].pruning == 0


def _shapes(sizes):
    return {name: torch.Size(shape) for name, shape in sizes.items()}


def test_bits_are_spent_nearly_as_well_as_by_enumeration(told) -> None:
    _, _, graph, found = told
    others = sum(FLOAT * p for p in (8, 7, 4))
    best = min(
        sum(one.params * bits for one, bits in zip(found.layers, some, strict=True)) + others
        for some in itertools.product((FLOAT, *BITS), repeat=3)
        if sum(0 if b == FLOAT else one.kl_at_bits[b] for one, b in zip(found.layers, some, strict=True)) <= 0.02
    )
    assert best <= found.alone["rounding"].cost * FLOAT * graph.params() <= 1.15 * best


@pytest.mark.parametrize("cost", ["bytes", "bitops"])
def test_the_advice_can_be_followed(cost: str, told) -> None:
    model, batches, graph, _ = told
    before = copy.deepcopy(model.state_dict())
    found = analysis.advise(model, batches, graph, 0.3, bits=BITS, cost=cost)
    assert found.plan.removed > 0
    small = analysis.quantise(tp.apply(model, found.plan), found.bits, per="channel")
    held_out = [example(256, 6, seed=77)]
    measured = compare({"": small}, model, held_out)[0][""]["kl"]
    assert 0 < measured < 3 * found.mixed.total
    for name, count in found.bits.items():
        assert all(len(row.unique()) <= 2**count for row in small.get_parameter(name).detach())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if cost == "bitops":
        sizes = graph.sizes(found.plan.keep)
        spent = sum(graph.reuse[one.name] * torch.Size(sizes[one.name]).numel() * one.bits for one in found.layers)
        assert found.mixed.cost == pytest.approx(spent / (FLOAT * graph.macs()), rel=tolerances.EXACT)
    json.dumps(found.to_json())


def test_what_cutting_one_group_costs_is_half_its_tpv(told) -> None:
    model, batches, graph, found = told
    assert [one.id for one in found.groups] == [group.id for group in graph.groups]
    for one in found.groups:
        assert set(one.kl_at_share) == {0.75, 0.5}
        assert one.kept == int(found.plan.mask(one.id).sum())
        curve = tp.sensitivity(model, batches, graph, shares=(0.5,))[one.id]
        gone = {one.id: list(curve.gone(curve.points[0].kept))}
        wanted = reference.plan_tpv(model, torch.cat(batches), graph, gone, "softmax") / 2
        assert abs(one.kl_at_share[0.5] - wanted) < tolerances.STDERRS * curve.points[0].stderr
        left = graph.macs({one.id: curve.keep(curve.points[0].kept)}) / graph.macs()
        assert one.saved_at_share[0.5] == pytest.approx(1 - left, rel=tolerances.EXACT)


def test_of_few_samples_pruning_is_counted_on_others() -> None:
    model, batches, seen = net(), [example(12, 6, seed=11)], list[tuple[str, int, int | None]]()
    graph = tp.trace(model, batches[0][:1])
    scores = tp.score(model, batches, graph)

    def progress(stage: str, done: int, total: int | None) -> None:
        seen.append((stage, done, total))

    found = analysis.advise(model, batches, graph, 0.02, bits=BITS, scores=scores, progress=progress)
    assert seen[-1] == ("advise", 11, 11)
    for mix in (found.mixed, *found.alone.values()):
        assert mix.total <= 0.02 + tolerances.EXACT
    for share, kl in found.pruning_totals.items():
        plan = tp.allocate(scores, graph, tp.Budget(macs=share), cross_validated=True)
        assert kl == plan.made_by["predicted_kl"]
        counted = tp.allocate(scores, graph, tp.Budget(macs=share)).made_by["predicted_kl"]
        assert kl != counted


def test_errors_name_what_is_wrong(told) -> None:
    model, batches, graph, _ = told
    with pytest.raises(tp.InputError, match="drift=0"):
        analysis.advise(model, batches, graph, 0)
    with pytest.raises(tp.InputError, match="bits=99"):
        analysis.advise(model, batches, graph, 0.1, bits=(99,))
    with pytest.raises(tp.InputError, match="bits= is empty"):
        analysis.advise(model, batches, graph, 0.1, bits=())
    with pytest.raises(tp.InputError, match="cost='speed'"):
        analysis.advise(model, batches, graph, 0.1, cost="speed")
    with pytest.raises(tp.DataError, match="read once only"):
        analysis.advise(model, iter(batches), graph, 0.1)
