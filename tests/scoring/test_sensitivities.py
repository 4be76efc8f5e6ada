"""Sensitivities against dense Jacobians: rows, products, plans, and the part that is linear in what leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import reference, tolerances
from tests.helpers import built, random_gone
from tpvprune.scoring.engine import stream

ROUNDED = 1e-6
"""Relative to a column's largest entry: rows are kept in float32."""

NAMES = ("mlp", "residual", "grouped", "vit")
HEADS = ("logits", "softmax")


def changes(name: str) -> Tensor:
    """First-order change of the outputs when each unit leaves, `(batch, outputs, units of all groups)`."""
    b = built(name)
    consumers = {m.param for g in b.graph.groups for m in g.of_role("consume")}
    jacobian = reference.jacobians(b.model, b.inputs, consumers)
    found = [reference.effects(b.model, jacobian, g, "consume")["", "consume"] for g in b.graph.groups]
    return torch.cat(found, 2)


def scored(name: str, batches: list[Tensor] | None = None, **kwargs: object) -> tp.Sensitivities:
    b = built(name)
    held = tp.score(b.model, [b.inputs] if batches is None else batches, b.graph, tp.TPV(**kwargs)).sensitivities
    assert held is not None
    return held


def output(name: str) -> Tensor:
    with torch.no_grad():
        return built(name).model(built(name).inputs)


def assert_rows(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert bool(((got - wanted).abs() <= ROUNDED * wanted.abs().amax(0)).all())


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_effects_on_each_cotangent(name: str) -> None:
    change, out = changes(name), output(name)
    kept = scored(name, head="logits", probes="exact")  # cotangents are the unit vectors, in order
    assert_rows(kept.rows, -change.flatten(0, 1))
    assert kept.samples == len(out)
    assert not kept.linear.any()
    p = out.softmax(1)
    u = torch.stack([(torch.eye(len(q), dtype=q.dtype) - q) * q.sqrt().unsqueeze(1) for q in p])  # (batch, class, k)
    assert_rows(scored(name, probes="exact").rows, -(u @ change).flatten(0, 1))


@pytest.mark.parametrize("head", HEADS)
def test_rows_of_random_probes_are_those_of_their_streams(head: str) -> None:
    out, change = output("mlp"), changes("mlp")
    batches, seed, rows = [built("mlp").inputs[:2], built("mlp").inputs[2:]], 6, []
    for number, part in enumerate((slice(0, 2), slice(2, 5))):
        drawn = [tp.scoring.heads.head_named(head).cotangent(out[part], stream(seed, number, k)) for k in range(3)]
        rows.append(-(torch.stack(drawn, 1) @ change[part]).flatten(0, 1) / 3**0.5)
    assert_rows(scored("mlp", batches, head=head, probes=3, seed=seed).rows, torch.cat(rows))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_products_of_columns_are_covariances_in_the_metric(name: str, head: str) -> None:
    rows = scored(name, head=head, probes="exact").rows.double()
    m, change = reference.metric(output(name), head), changes(name)
    wanted = torch.einsum("bki,bkl,blj->ij", change, m, change) / len(change)
    scale = wanted.diagonal().sqrt()
    assert float(((rows.mT @ rows / len(change) - wanted).abs() / (scale.unsqueeze(1) * scale)).max()) < 10 * ROUNDED


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_the_drift_of_a_plan_is_that_of_dense_jacobians(name: str, head: str) -> None:
    b, held = built(name), scored(name, head=head, probes="exact")
    for seed in range(3):
        gone = random_gone(b.graph, seed, 0.4)
        if seed == 2:
            gone.popitem()  # groups that are not named stay whole
        keep = {n: torch.tensor([i not in units for i in range(b.graph[n].units)]) for n, units in gone.items()}
        value, error = held.drift(keep)
        wanted = reference.plan_tpv(b.model, b.inputs, b.graph, gone, head)
        assert value == pytest.approx(wanted, rel=10 * ROUNDED)
        direct = tp.TPV(head=head, probes="exact").drift(b.model, [b.inputs], tp.Plan(keep, b.graph))
        assert (value, error) == pytest.approx(direct, rel=10 * ROUNDED)
    assert held.drift({}) == (0, 0)


def test_columns_alone_are_the_scores(residual) -> None:
    for probes in (2, "exact"):
        scores = tp.score(residual.model, [residual.inputs] * 2, residual.graph, tp.TPV(probes=probes))
        held = scores.sensitivities
        squares = held.rows.double().square().sum(0) / held.samples
        torch.testing.assert_close(squares, torch.cat(list(scores.values.values())), rtol=10 * ROUNDED, atol=0)


# Another reference


def moved(model: nn.Module, by: float = 0.05) -> nn.Module:
    """A copy with other weights: what the model was before it was pruned, or tuned."""
    out, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return out


def slopes(name: str, dense: nn.Module, head: str) -> Tensor:
    """By autograd: the gradient of KL(dense || model), or of half the squared distance, in the model's outputs."""
    out = output(name).requires_grad_(True)
    with torch.no_grad():
        target = dense(built(name).inputs)
    if head == "softmax":
        q = target.softmax(1)
        loss = (q * (q.log() - out.log_softmax(1))).sum()
    else:
        loss = (out - target).square().sum() / 2
    return torch.autograd.grad(loss, out)[0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_the_linear_part_is_the_slope_of_the_drift(name: str, head: str) -> None:
    dense = moved(built(name).model)
    held = scored(name, head=head, reference=dense, probes=2)
    wanted = 2 * torch.einsum("bk,bku->u", slopes(name, dense, head), changes(name)) / len(built(name).inputs)
    torch.testing.assert_close(held.linear, wanted, rtol=tolerances.EXACT, atol=1e-12)
    assert_rows(held.rows, scored(name, head=head, probes=2).rows.double())  # the rest is as it was


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_the_linear_part_is_how_twice_the_kl_begins_to_grow(name: str) -> None:
    # By finite differences, without any formula: a unit leaves by a thousandth.
    b, dense, step = built(name), moved(built(name).model), 1e-4
    held = scored(name, reference=dense)
    with torch.no_grad():
        q = dense(b.inputs).softmax(1)

    def drift(group: tp.Group, unit: int, share: float) -> float:
        model = copy.deepcopy(b.model)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for member in group.of_role("consume"):
                for entry in reference.entries_of(group, member, unit):
                    parameters[member.param].select(member.dim, entry).mul_(1 - share)
            return float(2 * (q * (q.log() - model(b.inputs).log_softmax(1))).sum(1).mean())

    grown = [
        (drift(g, unit, step) - drift(g, unit, -step)) / (2 * step) for g in b.graph.groups for unit in range(g.units)
    ]
    torch.testing.assert_close(held.linear, torch.tensor(grown, dtype=torch.float64), rtol=1e-4, atol=1e-7)


def test_the_model_itself_as_reference_adds_nothing(mlp) -> None:
    held = scored("mlp", reference=copy.deepcopy(mlp.model))
    assert float(held.linear.abs().max()) < 1e-15


def test_the_growth_of_drift_is_what_a_plan_adds(mlp) -> None:
    # Near the model both terms are small: their sum is the growth of the drift to second order.
    model = copy.deepcopy(mlp.model)
    with torch.no_grad():
        for layer in (2, 4):
            model[layer].weight[:, :3] *= 1e-3  # units that hardly matter
    dense = moved(model, 1e-3)
    held = tp.score(model, [mlp.inputs], mlp.graph, tp.TPV(reference=dense, probes="exact")).sensitivities
    gone = {"0": [0, 2], "2": [1]}
    keep = {n: torch.tensor([i not in units for i in range(mlp.graph[n].units)]) for n, units in gone.items()}
    small = reference.zeroed(model, mlp.graph, gone)
    with torch.no_grad():
        q, before, after = (m(mlp.inputs).log_softmax(1) for m in (dense, model, small))
    kl = [(q.exp() * (q - p)).sum(1).mean() for p in (before, after)]
    value = held.drift(keep)[0]
    assert value == pytest.approx(float(2 * (kl[1] - kl[0])), rel=0.02)
    assert abs(value - dataclasses.replace(held, linear=held.linear * 0).drift(keep)[0]) > 0.1 * abs(value)


class Both(nn.Module):
    """Two outputs by name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.aside = inner, nn.Linear(7, 3).double()
        with torch.no_grad():
            self.aside.weight.copy_(torch.linspace(-1, 1, 21).reshape(3, 7))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.inner[:4](x)
        return {"classes": self.inner[4](x), "aside": self.aside(x)}


def test_several_outputs_add_up(mlp) -> None:
    model, dense = Both(mlp.model), Both(moved(mlp.model))
    graph = tp.trace(model, mlp.inputs)
    heads = tp.Several({"classes": "softmax", "aside": "logits"})
    held = tp.score(model, [mlp.inputs], graph, tp.TPV(head=heads, probes="exact", reference=dense)).sensitivities
    # A head that has no slope of its own takes the metric times the difference.
    consumers = {m.param for g in graph.groups for m in g.of_role("consume")}
    total, linear = torch.zeros(graph.units, graph.units, dtype=torch.float64), 0
    for name, head in (("classes", "softmax"), ("aside", "logits")):
        one, other = Named(model, name), Named(dense, name)
        jacobian = reference.jacobians(one, mlp.inputs, {f"both.{p}" for p in consumers})
        jacobian = {p.removeprefix("both."): j for p, j in jacobian.items()}
        change = torch.cat([reference.effects(model, jacobian, g, "consume")["", "consume"] for g in graph.groups], 2)
        with torch.no_grad():
            out, target = one(mlp.inputs), other(mlp.inputs)
        m = reference.metric(out, head)
        total += torch.einsum("bki,bkl,blj->ij", change, m, change) / len(out)
        linear += 2 * torch.einsum("bk,bkl,blu->u", out - target, m, change) / len(out)
    rows = held.rows.double()
    torch.testing.assert_close(rows.mT @ rows / held.samples, total, rtol=1e-5, atol=1e-6 * float(total.max()))
    torch.testing.assert_close(held.linear, linear, rtol=1e-8, atol=1e-12)


class Named(nn.Module):
    def __init__(self, both: Both, name: str) -> None:
        super().__init__()
        self.both, self.name = both, name

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)[self.name]


# How many


@pytest.mark.parametrize("probes", ["exact", 2])
def test_only_so_many_samples_are_kept(probes: int | str) -> None:
    inputs, dense = built("mlp").inputs, moved(built("mlp").model)
    batches = [inputs[:2], inputs[2:4], inputs[4:]]
    every = scored("mlp", batches, probes=probes, reference=dense)
    each = len(every.rows) // 5
    for cap in (1, 2, 3, 4, 5, 9):
        held = scored("mlp", batches, probes=probes, reference=dense, sensitivities=cap)
        assert held.samples == min(cap, 5)
        assert torch.equal(held.rows, every.rows[: held.samples * each])
        torch.testing.assert_close(held.linear, every.linear, rtol=1e-12, atol=0)  # of all samples


@pytest.mark.parametrize("name", ["mlp", "vit"])
def test_batches_of_any_size_give_the_same(name: str) -> None:
    inputs = built(name).inputs
    whole = scored(name, probes="exact", sensitivities=3)
    for sizes in ((1, len(inputs) - 1), (2, len(inputs) - 2), (1,) * len(inputs)):
        held = scored(name, list(inputs.split(sizes)), probes="exact", sensitivities=3)
        assert held.samples == whole.samples
        assert_rows(held.rows, whole.rows.double())


def kept(criterion: tp.TPV, graph: tp.Graph | None = None) -> tp.Sensitivities | None:
    b = built("mlp")
    return tp.score(b.model, [b.inputs], graph or b.graph, criterion).sensitivities


def test_they_are_kept_where_they_can_be() -> None:
    assert kept(tp.TPV()).samples == 5
    assert kept(tp.TPV(sensitivities=0)) is None
    assert kept(tp.TPV(over="all")) is None
    assert kept(tp.TPV(engine="batched")) is None
    assert kept(tp.TPV(perturbation="rounding")) is None
    assert kept(tp.TPV(), tp.weight_graph(built("mlp").model)) is None


@pytest.mark.parametrize(
    "settings", [{"over": "all"}, {"engine": "batched"}, {"engine": "factored"}, {"perturbation": "isotropic"}], ids=str
)
def test_where_they_cannot_be_kept_they_are_refused(settings: Mapping[str, str]) -> None:
    with pytest.raises(tp.InputError, match="sensitivities"):
        kept(tp.TPV(sensitivities=5, **settings))


def test_single_weights_have_none() -> None:
    with pytest.raises(tp.InputError, match="sensitivities"):
        kept(tp.TPV(sensitivities=5), tp.weight_graph(built("mlp").model))
