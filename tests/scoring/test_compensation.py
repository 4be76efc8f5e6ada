"""Compensated scores against plain least squares and dense Jacobians."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import example, randomise
from tests.helpers import Built, assert_scores_close, built
from tpvprune.scoring import compensation, tpv
from tpvprune.scoring.compensation import _in_turn, _Reads, left_later, residuals
from tpvprune.scoring.tpv import RIDGES


def left_over(inputs: np.ndarray, own: list[int], others: list[int], numbers: np.ndarray) -> np.ndarray:
    """Residuals of some columns after least squares on others and a constant, fitted to the rows of the other half."""
    read = np.column_stack([inputs[:, others], np.ones(len(inputs))])
    found = np.empty((len(inputs), len(own)))
    for half in (0, 1):
        here, there = numbers % 2 == half, numbers % 2 != half
        found[here] = inputs[here][:, own] - read[here] @ np.linalg.lstsq(read[there], inputs[there][:, own])[0]
    return found


def many(b: Built, count: int) -> Tensor:
    shape = (count, *b.inputs.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def seen_by(b: Built, layer: str, inputs: Tensor) -> Tensor:
    """Input of a layer, `(rows, channels)`, with the channels last."""
    held: list[Tensor] = []
    module = b.model.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, args: held.append(args[0]))
    with torch.no_grad():
        b.model(inputs)
    handle.remove()
    value = held[0]
    axis = 1 if isinstance(module, torch.nn.Conv2d) else -1
    return value.movedim(axis, -1)


def test_compensated_scores_are_those_of_the_residuals(mlp: Built, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tpv, "RIDGES", (0.0,))
    inputs = many(mlp, 60)
    scores = tp.score(mlp.model, [inputs], mlp.graph, tp.TPV(compensated="alone", probes="exact"))
    plain = tp.score(mlp.model, [inputs], mlp.graph, tp.TPV(probes="exact"))
    with torch.no_grad():
        metric = reference.metric(mlp.model(inputs), "softmax")
    for name, reader in (("0", 2), ("2", 4)):
        read = seen_by(mlp, str(reader), inputs)
        jacobian = vmap(jacrev(lambda a, k=reader: mlp.model[k:](a)))(read)
        left = np.column_stack(
            [
                left_over(read.numpy(), [c], [o for o in range(read.shape[1]) if o != c], np.arange(60))[:, 0]
                for c in range(read.shape[1])
            ]
        )
        effect = jacobian * torch.from_numpy(left).unsqueeze(1)
        wanted = torch.einsum("nku,nkl,nlu->u", effect, metric, effect).detach() / len(inputs)
        assert not torch.allclose(scores.values[name], plain.values[name], rtol=0.2)
        assert float((scores.values[name] - wanted).abs().max()) < tolerances.UNDAMPED * float(plain.values[name].max())


def test_scores_follow_from_the_map_exactly(residual: Built):
    inputs = many(residual, 12)
    maps = residuals(residual.model, [inputs], residual.graph, RIDGES)
    got = tp.score(residual.model, [inputs], residual.graph, tp.TPV(compensated="alone", probes="exact", head="logits"))
    wanted = {}
    outputs = residual.model(inputs[:1]).shape[1]
    for group in residual.graph.groups:
        total = torch.zeros(len(inputs), outputs, group.units, dtype=torch.float64)
        for member in group.of_role("consume"):
            held: list[Tensor] = []
            module = residual.model.get_submodule(member.layer)

            def keep(_: object, args: tuple[Tensor], held: list[Tensor] = held) -> tuple[Tensor]:
                held.append(args[0].detach().requires_grad_(True))
                return (held[0],)

            handle = module.register_forward_pre_hook(keep)
            out = residual.model(inputs)
            handle.remove()
            axis = 1 if isinstance(module, torch.nn.Conv2d) else -1
            left = maps[member.layer](held[0].detach(), axis, range(12))
            for k in range(outputs):
                (slope,) = torch.autograd.grad(out[:, k].sum(), held[0], retain_graph=True)
                sums = (slope * left).movedim(axis, -1).flatten(1, -2).sum(1) if left.ndim > 2 else slope * left
                total[:, k] += sums[:, member.entries(group.units)].sum(2)
        wanted[group.id] = total.square().sum(1).mean(0)
    assert_scores_close(got.values, wanted, tolerances.EXACT)


@pytest.mark.parametrize("compensated", ["alone", True])
def test_what_a_layer_of_too_many_inputs_is_given_counts_whole(
    compensated: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    b = built("flatten")  # its first linear layer reads 36 channels, 9 a unit, the second one 6
    given: dict[str, Any] = {"probes": "exact", "head": "logits"}
    plain = tp.score(b.model, [many(b, 12)], b.graph, tp.TPV(**given))
    before = tp.score(b.model, [many(b, 12)], b.graph, tp.TPV(compensated=compensated, **given))
    assert not caplog.records
    monkeypatch.setattr(compensation, "WIDEST", 35)
    with caplog.at_level(logging.WARNING, "tpvprune"):
        found = tp.score(b.model, [many(b, 12)], b.graph, tp.TPV(compensated=compensated, **given))
    assert [record.message for record in caplog.records] == [
        "3: too many inputs to ask what makes up for each; it counts whole there"
    ]
    for group, wanted in (("0", plain), ("3", before)):
        torch.testing.assert_close(found.values[group], wanted.values[group])
        assert not torch.allclose(plain.values[group], before.values[group], rtol=0.01)
    monkeypatch.setattr(compensation, "WIDEST", 36)
    again = tp.score(b.model, [many(b, 12)], b.graph, tp.TPV(compensated=compensated, **given))
    assert_scores_close(again.values, before.values, 1e-12)


def test_units_that_a_layer_of_too_many_inputs_reads_cost_what_each_costs_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Two(torch.nn.Module):
        """The same channels are read by a layer of 4 inputs and by one of 36."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.narrow = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 1)
            self.wide, self.last = torch.nn.Linear(36, 3), torch.nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).relu()
            return self.last((self.narrow(x).mean((2, 3)) + self.wide(x.flatten(1))).relu())

    model = randomise(Two())
    inputs = example(12, 2, 3, 3)
    graph = tp.trace(model, inputs[:1])
    given: dict[str, Any] = {"probes": "exact", "head": "logits"}

    def scored(compensated: Any) -> Tensor:
        return tp.score(model, [inputs], graph, tp.TPV(compensated=compensated, **given)).values["conv"]

    in_turn = scored(True)
    monkeypatch.setattr(compensation, "WIDEST", 35)
    torch.testing.assert_close(scored(True), scored("alone"))
    assert not torch.allclose(scored(True), in_turn, rtol=0.01)


@pytest.mark.parametrize("name", ["vit", "grouped"])
def test_units_of_several_channels_are_predicted_from_the_rest(name: str):
    b = built(name)
    inputs = many(b, 80)
    maps = residuals(b.model, [inputs], b.graph, (0.0,))
    looked = 0
    for group in b.graph.groups:
        for member in group.of_role("consume"):
            if member.width() == 1:
                continue
            layer = b.model.get_submodule(member.layer)
            read = seen_by(b, member.layer, inputs)
            left = maps[member.layer](read, -1, range(80)).reshape(-1, read.shape[-1])
            rows = read.reshape(-1, read.shape[-1]).numpy()
            width = rows.shape[1] // getattr(layer, "groups", 1)
            for unit in member.entries(group.units).tolist():
                for first in range(0, rows.shape[1], width):  # an output reads its own group of channels alone
                    own = [e for e in unit if first <= e < first + width]
                    if not own or len(own) == width:
                        continue
                    others = [c for c in range(first, first + width) if c not in own]
                    numbers = np.repeat(np.arange(80), len(rows) // 80)
                    wanted = torch.from_numpy(left_over(rows, own, others, numbers))
                    torch.testing.assert_close(left[:, own], wanted, rtol=0, atol=tolerances.UNDAMPED)
                    looked += 1
    assert looked


def test_a_copy_of_a_channel_costs_nothing_when_it_can_be_made_up_for():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    with torch.no_grad():
        net[0].weight[5], net[0].bias[5] = net[0].weight[0], net[0].bias[0]
    inputs = torch.randn(200, 4, dtype=torch.float64)
    graph = tp.trace(net, inputs[:1])
    plain = tp.score(net, [inputs], graph, tp.TPV(head="logits")).values["0"]
    alone = tp.score(net, [inputs], graph, tp.TPV(head="logits", compensated="alone")).values["0"]
    assert float((alone / plain)[[0, 5]].max()) < 1e-3
    assert float((alone / plain)[1:5].min()) > 1e-3
    left = tp.score(net, [inputs], graph, tp.TPV(head="logits", compensated=True)).values["0"]
    one, other = sorted((left / plain)[[0, 5]].tolist())
    assert one < 1e-3 < 0.1 < other  # as soon as one has left, nothing makes up for the other


@pytest.mark.parametrize("heads", [1, 2])
def test_of_two_copies_that_leave_in_one_step_one_is_free(heads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compensation, "AT_ONCE", 4)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 3)).double()
    with torch.no_grad():
        net[0].weight[5 * heads : 6 * heads] = net[0].weight[:heads]
        net[0].bias[5 * heads : 6 * heads] = net[0].bias[:heads]
        net[2].weight.fill_(1.0)
    inputs = torch.randn(400, 16, dtype=torch.float64)
    maps = residuals(net, [inputs], tp.trace(net, inputs[:1]), (1e-8,))
    units = torch.arange(24).reshape(-1, heads)
    member = tp.Member("2.weight", 1, units if heads > 1 else None, "consume")
    reads = _Reads(net, member, len(units), *maps["2"].precisions[0])
    costs = _in_turn(reads.energy(torch.arange(len(units))), [reads])
    one, other = sorted(costs[[0, 5]].tolist())
    assert one < 1e-6 < 1e-2 < other


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_units_in_order_cost_what_they_cost_when_those_before_have_left(name: str):
    b = built(name)
    maps = residuals(b.model, [many(b, 80)], b.graph, (1e-2,))
    for group in b.graph.groups:
        member = group.of_role("consume")[0]
        together, one_by_one = (
            _Reads(b.model, member, group.units, *maps[member.layer].precisions[0]) for _ in range(2)
        )
        units = torch.arange(group.units).flip(0)[: max(1, group.units - 1)]
        costs = together.in_order(units)
        for unit, cost in zip(units.tolist(), costs.tolist(), strict=True):
            assert cost == pytest.approx(float(one_by_one.energy(torch.tensor([unit]))), rel=1e-6, abs=1e-12)
            if unit != units[-1]:
                one_by_one.remove(torch.tensor([unit]))


def test_what_compensated_scores_refuse(mlp: Built, tmp_path):
    with pytest.raises(tp.InputError, match="compensated=True"):
        tp.TPV(compensated=True, over="all")
    with pytest.raises(tp.DataError, match="read once only"):
        tp.score(mlp.model, iter([mlp.inputs]), mlp.graph, tp.TPV(compensated=True))
    first = tp.score(mlp.model, [mlp.inputs], mlp.graph, tp.TPV(compensated=True))
    with pytest.raises(tp.InputError, match="cannot be added"):
        tp.score(mlp.model, [mlp.inputs], mlp.graph, tp.TPV(compensated=True), start=first)
    saved = tp.score(mlp.model, [mlp.inputs] * 2, mlp.graph, tp.TPV(compensated=True), save=tmp_path / "s.safetensors")
    again = tp.score(mlp.model, [mlp.inputs] * 2, mlp.graph, tp.TPV(compensated=True), save=tmp_path / "s.safetensors")
    assert_scores_close(again.values, saved.values, 1e-15)


def test_a_fit_to_fewer_samples_than_channels_predicts_nothing():
    # Independent channels cannot make up for each other, however well few samples of them are fitted.
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(64))
        net[1].bias.fill_(10.0)
    inputs = torch.randn(40, 64)
    graph = tp.trace(net, inputs[:1])
    left = tp.score(net, [inputs], graph, tp.TPV(head="logits", probes="exact", compensated="alone")).values["1"]
    # What is left of a channel is what varies of it: its squared weights.
    wanted = net[3].weight.detach().square().sum(0).double()
    assert 0.7 < float((left / wanted).mean()) < 1.5


@pytest.mark.parametrize(("ridges", "chosen"), [((1e-6, 1.0), 1e-6), ((1e-6, 1e-3, 3.0), 3.0)])
def test_the_ridge_is_the_one_that_leaves_least_of_the_other_half(ridges: tuple[float, ...], chosen: float):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)).double()
    # Many samples of five factors ask for a small ridge, few of independent channels for a large one.
    many_of_few = torch.randn(400, 5, dtype=torch.float64) @ torch.randn(5, 20, dtype=torch.float64)
    inputs = many_of_few if chosen < 1 else torch.randn(44, 20, dtype=torch.float64)
    with torch.no_grad():
        net[0].weight.copy_(1e-3 * torch.eye(20))  # where tanh is a straight line
    assert residuals(net, [inputs], tp.trace(net, inputs[:1]), ridges)["2"].ridge == chosen


@pytest.mark.parametrize("sizes", [(13, 7, 1, 9), (1,) * 6, (1,)])
def test_halves_are_dealt_by_the_number_of_batch_and_sample(sizes: tuple[int, ...], mlp: Built):
    inputs = many(mlp, sum(sizes))
    batches = list(inputs.split(list(sizes)))
    numbers = np.concatenate([np.arange(k, k + size) for k, size in enumerate(sizes)])
    found = residuals(mlp.model, batches, mlp.graph, (0.5,))["2"]
    read = seen_by(mlp, "2", inputs).numpy()
    for half in (0, 1):
        rows = read[numbers % 2 != half] if (numbers % 2 != half).any() else read
        np.testing.assert_allclose(found.means[half].numpy(), rows.mean(0), atol=tolerances.EXACT)
        covariance = np.cov(rows.T, bias=True)
        damped = covariance + max(0.5 * np.trace(covariance) / len(covariance), 1e-30) * np.eye(len(covariance))
        precision = np.linalg.inv(damped)
        wanted = precision / np.diag(precision)
        np.testing.assert_allclose(found.matrices[half].numpy(), wanted, rtol=1e-6, atol=tolerances.EXACT)


def refitted_error(rows: np.ndarray, weight: np.ndarray, kept: list[int]) -> float:
    """Mean squared error of `rows @ weight.T` after least squares on some of the columns and a constant."""
    wanted = rows @ weight.T
    read = np.column_stack([rows[:, kept], np.ones(len(rows))])
    return float(((wanted - read @ np.linalg.lstsq(read, wanted)[0]) ** 2).sum(1).mean())


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_costs_in_turn_are_growths_of_the_error_of_a_refit(name: str, monkeypatch: pytest.MonkeyPatch):
    """Taking units away one after the other, with weights that make up for them, against least squares anew."""
    monkeypatch.setattr(compensation, "AT_ONCE", 10**9)
    b = built(name)
    inputs = many(b, 80)
    maps = residuals(b.model, [inputs], b.graph, (0.0,))
    looked = 0
    for group in b.graph.groups:
        members = group.of_role("consume")
        layer = b.model.get_submodule(members[0].layer)
        if len(members) != 1 or not isinstance(layer, torch.nn.Linear):
            continue
        rows = seen_by(b, members[0].layer, inputs).reshape(-1, layer.in_features).numpy()
        weight, entries = layer.weight.detach().numpy(), members[0].entries(group.units).tolist()
        # A score that is the variance itself makes each cost the growth of the error.
        reads = _Reads(b.model, members[0], group.units, *maps[members[0].layer].precisions[0])
        costs = _in_turn(reads.energy(torch.arange(group.units)), [reads])
        left, gone, before, reached = set(range(group.units)), set[int](), 0.0, 0.0
        while len(left) > 1:
            errors = {}
            for unit in left:
                kept = [c for c in range(rows.shape[1]) if c not in gone | set(entries[unit])]
                errors[unit] = refitted_error(rows, weight, kept)
            unit = min(errors, key=errors.__getitem__)
            reached = max(reached, errors[unit] - before)  # costs never fall
            assert float(costs[unit]) == pytest.approx(reached, rel=1e-4, abs=1e-9)
            before = errors[unit]
            left.discard(unit)
            gone |= set(entries[unit])
            looked += 1
    assert looked > 4


def test_units_of_low_rank_are_not_all_cheap():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 12), torch.nn.Identity(), torch.nn.Linear(12, 4)).double()
    inputs = torch.randn(300, 3, dtype=torch.float64)
    graph = tp.trace(net, inputs[:1])
    alone = tp.score(net, [inputs], graph, tp.TPV(head="logits", compensated="alone"))
    scores = tp.score(net, [inputs], graph, tp.TPV(head="logits", compensated=True))
    plain = tp.score(net, [inputs], graph, tp.TPV(head="logits", sensitivities=0)).values["0"].mean()
    assert float(alone.values["0"].max()) < 0.02 * float(plain)
    ordered = scores.values["0"].sort().values
    assert float(ordered[6]) < 0.05 * float(plain) < 0.2 * float(plain) < float(ordered[-2])
    assert scores.criterion != alone.criterion


def test_what_is_told_of_precision_holds_for_other_samples():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.ReLU(), torch.nn.Linear(40, 5)).double()
    graph, criterion = tp.trace(net, torch.zeros(1, 8, dtype=torch.float64)), tp.TPV(head="logits", compensated=True)

    def scored(samples: int) -> tp.Scores:
        return tp.score(net, torch.randn(samples, 8, dtype=torch.float64).split(31), graph, criterion)

    whole = [scored(96) for _ in range(12)]
    told = [found.summary()["rank_correlation"] for found in whole]
    values = torch.stack([scored(48).values["0"] for _ in range(12)])
    apart = torch.corrcoef(values.argsort(1).argsort(1).double())[torch.triu(torch.ones(12, 12), 1) > 0]
    assert abs(sum(told) / len(told) - float(apart.mean())) < 0.2  # with one order for both halves: 0.4 too high
    spread = torch.stack([found.values["0"] for found in whole]).std(0).square().mean().sqrt()
    errors = torch.stack([found.stderr["0"] for found in whole]).square().mean().sqrt()
    assert 0.8 < float(errors / spread) < 2.0  # with the growth of the whole alone: a third
    # Half of what two halves are apart is the error of their mean, and the least that is told.
    least = [half_apart(found) for found in whole]
    grown = [float(found.stderr["0"].square().mean().sqrt()) for found in whole]
    assert all(one >= (1 - 1e-9) * other for one, other in zip(grown, least, strict=True))
    assert any(one == pytest.approx(other, rel=1e-9) for one, other in zip(grown, least, strict=True))


def half_apart(scores: tp.Scores) -> float:
    one, other = scores.halves
    return float((one["0"] - other["0"]).square().mean().sqrt()) / 2


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_is_taken_apart_by_its_own_covariance(half: int, mlp: Built):
    inputs = many(mlp, 60)
    batches = list(inputs.split([25, 35]))
    numbers = np.concatenate([np.arange(25), np.arange(1, 36)])
    alone = {group.id: torch.rand(group.units, dtype=torch.float64) for group in mlp.graph.groups}
    found = left_later(mlp.model, mlp.graph, residuals(mlp.model, batches, mlp.graph, (0.5,)), alone, half)
    own = residuals(mlp.model, [inputs[numbers % 2 == half]], mlp.graph, (0.5,))
    for name, wanted in left_later(mlp.model, mlp.graph, own, alone).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=0)


def test_of_compensated_weights_no_precision_is_told():
    b = built("mlp")
    scores = tp.score(b.model, [b.inputs], tp.weight_graph(b.model), tp.TPV(engine="batched", compensated=True))
    assert scores.stderr is None
    assert scores.halves is None
    assert scores.summary()["rank_correlation"] is None


def test_a_covariance_that_rounding_left_indefinite_gets_a_larger_ridge():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3)).double()
    covariance = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05], dtype=torch.float64))
    precision, damping = compensation._precision(net, "0", covariance, 1e-2)
    assert damping == pytest.approx(10 * 1e-2 * 2.95 / 4)
    torch.testing.assert_close(torch.linalg.inv(precision), covariance + damping * torch.eye(4, dtype=torch.float64))
    with pytest.raises(tp.NonFiniteError, match="'0' is given NaN"):
        compensation._precision(net, "0", covariance * float("nan"), 1e-2)
