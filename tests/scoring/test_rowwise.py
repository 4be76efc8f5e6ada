"""Compensated scores of single weights against refits by brute force."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import built, gap
from tpvprune.patches import some_of
from tpvprune.scoring import rowwise
from tpvprune.scoring.moments import Moments

RIDGE = 0.01


def reads(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """What each weight of a layer meets at each position, `(rows, outputs, *weight)`: the Jacobian of its outputs."""
    module, held = model.get_submodule(layer), list[Tensor]()
    handle = module.register_forward_pre_hook(lambda _, args: held.append(args[0].detach()))
    with torch.no_grad():
        model(inputs)
    handle.remove()
    rest = {name: p.detach() for name, p in module.named_parameters() if name != "weight"}

    def outputs(weight: Tensor, x: Tensor) -> Tensor:
        found = functional_call(module, {**rest, "weight": weight}, (x.unsqueeze(0),)).squeeze(0)
        return found.flatten(1).T if isinstance(module, nn.modules.conv._ConvNd) else found.reshape(-1, found.shape[-1])

    weight = module.weight.detach()
    return torch.cat([jacrev(outputs)(weight, x) for value in held for x in value])


def left_by(support: Sequence[int], weight: Tensor, damped: Tensor) -> float:
    """What refitting some of a row's weights leaves of the row's outputs, ridge included."""
    gone = [i for i in range(len(weight)) if i not in support]
    if not gone:
        return 0.0
    change = torch.zeros_like(weight)
    change[gone] = -weight[gone]
    if len(support):
        here = damped[support][:, support]
        change[list(support)] = torch.linalg.solve(here, -damped[support][:, gone] @ change[gone])
    return float(change @ damped @ change)


def by_brute_force(
    weight: Tensor,
    damped: Tensor,
    units: Sequence[Sequence[int]],
    turns: bool,
    places: Sequence[int] = (),
    room: int = 0,
) -> Tensor:
    """What each unit of some rows costs, `(units,)`: whatever adds least when it leaves goes first.

    Args:
        weight: `(rows, inputs)`.
        damped: covariance of the inputs with the ridge.
        units: inputs of each.
        turns: whether the others are those that are left.
        places: of each unit; `room` of each leave before any more do.
        room: see `places`.
    """
    rooms = dict.fromkeys(places, room)
    found, left, reached = torch.zeros(len(units), dtype=weight.dtype), list(range(len(units))), 0.0

    def lost(kept: Sequence[int]) -> float:
        support = sorted(i for unit in kept for i in units[unit])
        return sum(left_by(support, row, damped) for row in weight)

    if not turns:
        return torch.tensor([lost([u for u in left if u != unit]) for unit in left], dtype=weight.dtype)
    while left:
        before = lost(left)
        costs = {unit: lost([u for u in left if u != unit]) - before for unit in left}
        free = [unit for unit in left if places and rooms[places[unit]]] or left
        cheapest = min(free, key=lambda unit: costs[unit])
        if any(rooms.values()):
            rooms[places[cheapest]] -= 1
        reached = max(reached, costs[cheapest])
        found[cheapest] = reached
        left.remove(cheapest)
    return found


def wanted(
    model: nn.Module,
    inputs: Tensor,
    group: tp.Group,
    alone: Tensor,
    turns: bool,
    block: tuple[int, int],
    chosen: tuple[Sequence[int], int] = ((), 0),
) -> Tensor:
    """Scores of a weight, `(rows / high, inputs / wide)`."""
    layer = group.members[0].layer
    module = model.get_submodule(layer)
    weight = module.weight.detach().flatten(1)
    jacobian = reads(model, layer, inputs)
    high, wide = block
    units = [list(range(first, first + wide)) for first in range(0, weight.shape[1], wide)]
    result = torch.zeros(len(weight) // high, len(units), dtype=weight.dtype)
    alone = alone.reshape(result.shape)
    for stripe in range(len(result)):
        row = stripe * high
        seen = jacobian[:, row, row].flatten(1)  # what a row reads is the same for all rows of its group
        damped = seen.T.cov(correction=0)
        damped = damped + RIDGE * damped.diagonal().mean() * torch.eye(len(damped), dtype=damped.dtype)
        own = weight[row : row + high]
        damping = float((damped - seen.T.cov(correction=0)).diagonal()[0]) * float(own.square().sum())
        moved = damping + sum(float((own[:, unit] @ seen[:, unit].T).square().mean(1).sum()) for unit in units)
        result[stripe] = by_brute_force(own, damped, units, turns, *chosen) * alone[stripe].sum() / moved
    return result


class Strided(nn.Module):
    """Convolutions with padding, a stride and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, (1, 2), stride=2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).mean((2, 3)))


@pytest.mark.parametrize("turns", [True, "alone"])
@pytest.mark.parametrize("block", [(1, 1), (2, 1), (1, 2)])
def test_scores_are_what_refits_of_each_row_leave(block: tuple[int, int], turns: bool | str):
    model, inputs = randomise(Strided()), example(12, 2, 4, 5)
    layers = ("first", "second") if block[1] == 2 or block == (2, 1) else ("*",)
    graph = tp.weight_graph(model, block, layers)
    engine = "factored" if block == (1, 1) else "batched"
    plain = tp.score(model, [inputs], graph, tp.TPV(engine=engine))
    found = tp.score(model, [inputs], graph, tp.TPV(compensated=turns))
    for group in graph.groups:
        expected = wanted(model, inputs, group, plain.values[group.id], turns is True, block).flatten()
        assert gap(found.values[group.id], expected) < tolerances.UNDAMPED * float(expected.max()), group.id
        assert not torch.allclose(expected, plain.values[group.id], rtol=0.1)


def test_what_a_pattern_takes_leaves_first():
    model, inputs = randomise(Strided()), example(12, 2, 4, 5)
    graph = tp.weight_graph(model)
    plain = tp.score(model, [inputs], graph, tp.TPV(engine="factored"))
    found = tp.score(model, [inputs], graph, tp.TPV(compensated="1:2"))
    places = {"first": [k for _ in range(2) for k in range(9)], "second": [0, 1, 0, 1], "head": [0, 0, 1, 1]}
    for group in graph.groups:
        layer = group.members[0].layer
        chosen = (places[layer], 1)
        expected = wanted(model, inputs, group, plain.values[group.id], True, (1, 1), chosen).flatten()
        assert gap(found.values[group.id], expected) < tolerances.UNDAMPED * float(expected.max()), layer
    turns = tp.score(model, [inputs], graph, tp.TPV(compensated=True))
    assert not torch.allclose(found.values["first.weight"], turns.values["first.weight"], rtol=0.1)


@pytest.mark.parametrize("work", [10**12, 12 * 40 * 100])
def test_a_pattern_takes_exactly_what_left_first(work: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rowwise, "WORK", work)
    model, inputs = randomise(nn.Sequential(nn.Linear(40, 12))), example(60, 40)
    with torch.no_grad():
        model[0].weight[:3] = 0  # ties
    graph = tp.weight_graph(model)
    scores = tp.score(model, [inputs], graph, tp.TPV(compensated="2:4"))
    plan = tp.sparsify(scores, graph, pattern="2:4")
    gone = ~plan.weights["0.weight"]
    values = scores.values["0.weight"].reshape(12, 40)
    assert bool((gone.reshape(12, 10, 4).sum(2) == 2).all())
    if work == 10**12:  # one part: what is gone left before all that stays
        assert bool((values.masked_fill(~gone, 0).amax(1) <= values.masked_fill(gone, torch.inf).amin(1)).all())


def test_where_a_pattern_does_not_fit_the_cheapest_leave_first():
    model, inputs = randomise(nn.Sequential(nn.Linear(6, 3))), example(20, 6)
    graph = tp.weight_graph(model)
    one, other = (tp.score(model, [inputs], graph, tp.TPV(compensated=c)).values["0.weight"] for c in (True, "2:4"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("engine", ["batched", "per_sample"])
def test_any_engine_prices_the_rows(engine: str):
    b = built("mlp")
    graph = tp.weight_graph(b.model)
    plain = tp.score(b.model, [b.inputs], graph, tp.TPV(engine=engine))
    found = tp.score(b.model, [b.inputs], graph, tp.TPV(engine=engine, compensated=True))
    for group in graph.groups:
        expected = wanted(b.model, b.inputs, group, plain.values[group.id], True, (1, 1)).flatten()
        assert gap(found.values[group.id], expected) < tolerances.UNDAMPED * float(expected.max())


@pytest.mark.parametrize("width", [6, 80, 200])
def test_one_of_two_weights_that_read_the_same_is_free(width: int):
    """In wide rows too, of which many leave in one step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 5)).double()
    inputs = torch.randn(4 * width, width, dtype=torch.float64)
    inputs[:, 5] = inputs[:, 0]
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    scores = tp.score(net, [inputs], tp.weight_graph(net), tp.TPV(head="logits", compensated=True)).values["0.weight"]
    scores = scores.reshape(5, width)
    pair = scores[:, [0, 5]].sort(1).values
    assert bool((pair[:, 0] < 0.03 * pair[:, 1]).all())
    assert bool((pair[:, 1] > scores.median()).all())
    alone = tp.score(net, [inputs], tp.weight_graph(net), tp.TPV(head="logits", compensated="alone"))
    assert float(alone.values["0.weight"].reshape(5, width)[:, [0, 5]].max()) < 0.03 * float(pair.max())


def test_units_that_leave_together_cost_what_refits_one_after_the_other_leave(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rowwise, "AT_ONCE", 4)
    model, inputs = randomise(nn.Sequential(nn.Linear(12, 4))), example(40, 12)
    graph = tp.weight_graph(model)
    found = tp.score(model, [inputs], graph, tp.TPV(compensated=True)).values["0.weight"].reshape(4, 12)
    plain = tp.score(model, [inputs], graph, tp.TPV(engine="factored")).values["0.weight"].reshape(4, 12)
    damped = inputs.T.cov(correction=0)
    damping = RIDGE * damped.diagonal().mean()
    damped = damped + damping * torch.eye(12, dtype=damped.dtype)
    weight = model[0].weight.detach()
    for row in range(4):
        price = plain[row].sum() / (weight[row].square() * (inputs.square().mean(0) + damping)).sum()
        left, reached = list(range(12)), 0.0
        while left:
            before = left_by(left, weight[row], damped)
            costs = {i: left_by([j for j in left if j != i], weight[row], damped) - before for i in left}
            chosen = sorted(left, key=lambda i: costs[i])[: max(1, len(left) // 4)]
            floor = reached
            for i in chosen:
                left.remove(i)
                after = left_by(left, weight[row], damped)
                expected = float(price) * max(after - before, floor)
                assert float(found[row, i]) == pytest.approx(expected, rel=1e-6, abs=1e-12)
                before = after
            reached = max(reached, costs[chosen[-1]])


def test_inputs_that_are_dead_where_they_were_looked_at_are_scored_all_the_same():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    inputs = torch.rand(16, 4, 32, 32)
    flat = inputs.flatten(2)
    flat[:, 0, some_of(1024, rowwise.POSITIONS)] = 0
    scores = tp.score(net, [flat.reshape(inputs.shape)], tp.weight_graph(net), tp.TPV(compensated=True))
    assert all(bool(torch.isfinite(value).all()) for value in scores.values.values())
    assert float(scores.values["0.weight"][0]) > 0


@pytest.mark.parametrize(("others", "limit", "most"), [(True, "WORK", 30 * 4**2), ("alone", "WIDEST", 4)])
def test_parts_of_wide_rows_make_up_for_themselves_alone(
    others: bool | str, limit: str, most: int, monkeypatch: pytest.MonkeyPatch
):
    model, inputs = randomise(nn.Sequential(nn.Linear(10, 3))), example(40, 10)
    graph = tp.weight_graph(model)
    monkeypatch.setattr(rowwise, limit, most)
    monkeypatch.setattr(rowwise, "HELD", 30)  # rows in several chunks
    found = tp.score(model, [inputs], graph, tp.TPV(compensated=others)).values["0.weight"].reshape(3, 10)
    price = tp.score(model, [inputs], graph, tp.TPV(engine="factored")).values["0.weight"].reshape(3, 10).sum(1)
    weight = model[0].weight.detach()
    cuts = (slice(0, 3), slice(3, 6), slice(6, 10))
    ridge = torch.cat([RIDGE * inputs[:, cut].var(0, correction=0).mean().expand(cut.stop - cut.start) for cut in cuts])
    price = price / (weight.square() * (inputs.square().mean(0) + ridge)).sum(1)
    for part in cuts:
        damped = inputs[:, part].T.cov(correction=0)
        damped = damped + RIDGE * damped.diagonal().mean() * torch.eye(len(damped), dtype=damped.dtype)
        units = [[i] for i in range(len(damped))]
        for row in range(3):
            expected = price[row] * by_brute_force(weight[row : row + 1, part], damped, units, others is True)
            torch.testing.assert_close(found[row, part], expected, rtol=tolerances.UNDAMPED, atol=0)


def test_masks_made_for_a_refit_are_better_after_it():
    b = built("conv_bn")
    inputs = torch.randn(64, *b.inputs.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    graph = tp.weight_graph(b.model)
    left = {}
    for name, criterion in {"tpv": tp.TPV(compensated=True), "magnitude": tp.L1()}.items():
        plan = tp.sparsify(tp.score(b.model, [inputs], graph, criterion), graph, 0.6)
        sparse = tp.reconstruct(tp.apply(b.model, plan), [inputs], b.model)
        with torch.no_grad():
            p, q = (m(inputs).log_softmax(1) for m in (b.model, sparse))
        left[name] = float((p.exp() * (p - q)).sum(1).mean())
    assert left["tpv"] < 0.8 * left["magnitude"]


def test_dead_inputs_and_rows_of_zeros_cost_next_to_nothing():
    model, inputs = randomise(nn.Sequential(nn.Linear(5, 4))), example(30, 5)
    inputs[:, 2] = 0
    with torch.no_grad():
        model[0].weight[1] = 0
    scores = tp.score(model, [inputs], tp.weight_graph(model), tp.TPV(compensated=True)).values["0.weight"]
    scores = scores.reshape(4, 5)
    assert bool(torch.isfinite(scores).all())
    assert not bool(scores[1].any())
    assert float(scores[[0, 2, 3], 2].max()) < 0.1 * float(scores.max())


def test_what_compensated_scores_of_weights_refuse():
    b = built("mlp")
    graph = tp.weight_graph(b.model)
    with pytest.raises(tp.InputError, match="leave compensated out"):
        tp.score(b.model, [b.inputs], graph, tp.TPV(compensated=True, perturbation="rounding"))
    with pytest.raises(tp.InputError, match="leave compensated out"):
        tp.score(b.model, [b.inputs], b.graph, tp.TPV(compensated=True, engine="batched"))
    with pytest.raises(tp.DataError, match="read once only"):
        tp.score(b.model, iter([b.inputs]), graph, tp.TPV(compensated=True))
    first = tp.score(b.model, [b.inputs], graph, tp.TPV(compensated=True))
    with pytest.raises(tp.InputError, match="cannot be added"):
        tp.score(b.model, [b.inputs], graph, tp.TPV(compensated=True), start=first)
    with pytest.raises(tp.BudgetError, match="compensated='most' is no N:M"):
        tp.TPV(compensated="most")
    with pytest.raises(tp.InputError, match="'alone' or a pattern"):
        tp.TPV(compensated=1.5)
    tied = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6))
    tied[1].weight = tied[0].weight
    with pytest.raises(tp.ModelError, match="leave its layer out"):
        tp.score(tied, [torch.arange(6)], tp.weight_graph(tied), tp.TPV(compensated=True))
    with pytest.raises(tp.InputError, match="weight_graph"):
        tp.score(b.model, [b.inputs], b.graph, tp.TPV(compensated="2:4"))
    with pytest.raises(tp.InputError, match="single weights"):
        tp.score(b.model, [b.inputs], tp.weight_graph(b.model, (1, 2), ("2",)), tp.TPV(compensated="2:4"))
    depthwise = randomise(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten()))
    blocks = tp.weight_graph(depthwise, (2, 1))
    with pytest.raises(tp.InputError, match="fewer rows"):
        tp.score(depthwise, [example(3, 4, 3, 3)], blocks, tp.TPV(compensated=True))
    huge = nn.Sequential(nn.Linear(6, 2), nn.Sigmoid()).double()
    with pytest.raises(tp.NonFiniteError, match="'0'"):
        tp.score(huge, [1e200 * example(3, 6)], tp.weight_graph(huge), tp.TPV(compensated=True))


@pytest.mark.parametrize("mean", [0.0, 100.0, 3000.0])
def test_inputs_far_from_zero_keep_their_covariance(mean: float):
    torch.manual_seed(0)
    rows = (torch.randn(256, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) + mean).float()
    rows[:, 0] = mean + 1  # one that never varies
    near = torch.rand(40, 6)  # held about zero
    one, other, third = Moments(), Moments(), Moments()
    for part in rows.split(32):
        one.add(part[:20])
        other.add(part[20:])
    third.add(near)
    for whole, seen in ((one + other, rows), (third + one + other, torch.cat([near, rows]))):
        average, covariance = whole.covariance()
        torch.testing.assert_close(average, seen.double().mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(covariance, seen.double().T.cov(correction=0), rtol=1e-5, atol=1e-5)
