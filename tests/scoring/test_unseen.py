"""Models whose layers do not show, sample by sample, what units do: told, refused, or scored in another way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import example, randomise
from tests.helpers import assert_scores_close, gap

EXACT: dict[str, Any] = {"head": "logits", "probes": "exact"}


def linears(*sizes: tuple[int, int]) -> list[nn.Linear]:
    return [nn.Linear(*size) for size in sizes]


class Own(nn.Module):
    """Two weights of its own, of which the second reads what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linears((5, 6), (6, 4))
        self.one, self.two = (nn.Parameter(torch.zeros(6, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(F.gelu(F.gelu(self.first(x)) @ self.one) @ self.two))


class Inside(nn.Module):
    """As `Own`, in a module of its own, whose input is not what the second weight reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.zeros(6, 6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x @ self.one) @ self.two


class ByHand(nn.Module):
    """A product with a layer's weight that only a trace sees, alone or beside the layer's own."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.called = called
        self.first, self.middle, self.last = linears((5, 6), (6, 7), (7, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        by_hand = x.tanh() @ self.middle.weight.t()
        return self.last((self.middle(x) + by_hand if self.called else by_hand).tanh())


class Views(nn.Module):
    """Two views of each sample in one batch, one after all of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linears((5, 6), (6, 4))

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.last(torch.tanh(self.first(torch.cat([x, -x])))).chunk(2)
        return one + other


class Pointwise(nn.Linear):
    """A linear layer whose channels come before its positions, as no name tells."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight[:, :, None], self.bias)


class Across(nn.Module):
    """Twice as many positions as channels, which could be taken for two groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv1d(1, 6, 1), Pointwise(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x.sin(), x[:, :2].cos()], 1)
        return self.last(self.middle(self.first(x[:, None]).tanh()).tanh().mean(2))


UNSEEN = {
    "along another axis": Across,
    "root's own": Own,
    "a module's own": lambda: nn.Sequential(nn.Linear(5, 6), nn.GELU(), Inside(), nn.GELU(), nn.Linear(6, 4)),
    "by hand": lambda: ByHand(False),
    "by hand too": lambda: ByHand(True),
    "views": Views,
}


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_is_not_seen_is_scored_by_gradients_and_said(
    name: str, compensated: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = randomise(UNSEEN[name]()), example(12, 5)
    batches = [x[:5], x[5:8], x[8:]]
    graph = tp.trace(model, x[:1])
    wanted = tp.score(model, batches, graph, tp.TPV(engine="batched", **EXACT))
    with caplog.at_level(logging.WARNING):
        found = tp.score(
            model, iter(batches) if not compensated else batches, graph, tp.TPV(compensated=compensated, **EXACT)
        )
    assert "; scored by tpv(head=logits, over=consume, engine=batched)" in caplog.text
    assert found.criterion == wanted.criterion
    assert found.samples == 12
    assert found.sensitivities is None
    assert_scores_close(found.values, wanted.values, tolerances.EXACT)
    # One sample a batch is exact, signs or not.
    singly = tp.score(model, x.split(1), graph, tp.TPV(engine="batched", **EXACT))
    assert_scores_close(singly.values, reference.tpv(model, x, graph, "logits", "consume"), tolerances.EXACT)
    for refused in (tp.TPV(engine="activations"), tp.TPV(sensitivities=5)):
        with pytest.raises(tp.ModelError, match="engine='batched'"):
            tp.score(model, batches, graph, refused)


@pytest.mark.parametrize("compensated", [False, True])
def test_such_scores_are_gone_on_with(compensated: bool, tmp_path: Path) -> None:
    model, x = randomise(Views()), example(12, 5)
    graph, batches = tp.trace(model, x[:1]), [x[:5], x[5:8], x[8:]]
    criterion = tp.TPV(compensated=compensated, **EXACT)
    whole = tp.score(model, batches, graph, criterion, save=tmp_path / "s")
    assert whole.manifest["instead_of"] == criterion.label
    again = tp.score(model, batches, graph, criterion, save=tmp_path / "s")
    assert_scores_close(again.values, whole.values, tolerances.EXACT)
    first = tp.score(model, batches[:1], graph, criterion)
    # Of a batch of one sample nothing could tell.
    both = tp.score(model, [x[5:6], x[6:8], x[8:]], graph, criterion, start=first)
    parts = tp.score(model, [x[:5], x[5:6], x[6:8], x[8:]], graph, criterion)
    assert both.criterion == parts.criterion == whole.criterion
    assert_scores_close(both.values, parts.values, tolerances.EXACT)


class Looks(nn.Module):
    """Looks at a weight that it does not multiply with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = linears((5, 6), (6, 7), (7, 3))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.middle.weight
        x = self.first(x).tanh().reshape(-1, weight.shape[1]).reshape(-1, weight.size()[1]).to(weight).type_as(weight)
        x = self.middle(x) + weight.new_zeros(1) + torch.zeros_like(weight).sum()
        return self.last(x.tanh() if not bool(torch.isnan(weight).any()) else x)


@pytest.mark.parametrize("criterion", [tp.TPV(**EXACT), tp.Wanda()], ids=["tpv", "wanda"])
def test_looking_at_a_weight_is_not_multiplying_with_it(criterion: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, x = randomise(Looks()), example(9, 5)
    plain = nn.Sequential(model.first, nn.Tanh(), model.middle, nn.Tanh(), model.last)
    found, wanted = (tp.score(net, [x], tp.trace(net, x[:1]), criterion) for net in (model, plain))
    for got, expected in zip(found.values.values(), wanted.values.values(), strict=True):
        assert gap(got, expected) <= tolerances.EXACT * float(expected.max())
    assert not caplog.records
    tp.score(model, [x], tp.weight_graph(model), tp.TPV(engine="per_sample"))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.middle, self.shift, self.last = nn.Linear(8, 7, bias=False), nn.Parameter(torch.zeros(7)), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(F.linear(x, self.middle.weight, self.shift).tanh().mean(1))


def test_single_weights_used_by_hand_as_their_layer_would_are_scored() -> None:
    model, x = randomise(Attends()), example(6, 4, 5)
    graph = tp.weight_graph(model)
    assert "attention.out_proj.weight" in graph
    wanted = tp.score(model, x.split(1), graph, tp.TPV(engine="batched", **EXACT))
    found = tp.score(model, [x], graph, tp.TPV(engine="per_sample", **EXACT))
    assert_scores_close(found.values, wanted.values, tolerances.EXACT)
    tp.score(model, [x], graph, tp.TPV(compensated=True))


@pytest.mark.parametrize("name", UNSEEN)
def test_its_drift_is_not_predicted_and_it_is_pruned(name: str) -> None:
    model, x = randomise(UNSEEN[name]()), example(12, 5)
    pruned = tp.prune(model, [x], tp.Budget(macs=0.8))
    assert pruned.report.drift["predicted_kl"] is None
    assert pruned.plan.macs <= 0.8 * pruned.plan.graph.macs()


class Transposed(nn.Module):
    """A layer under another name, with its weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(6, 7)), nn.Parameter(torch.zeros(7))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_a_module_that_does_what_layers_do_is_seen() -> None:
    model, x = (
        randomise(nn.Sequential(nn.Linear(5, 6), nn.GELU(), Transposed(), nn.GELU(), nn.Linear(7, 4))),
        example(9, 5),
    )
    graph = tp.trace(model, x[:1])
    assert {group.id for group in graph.groups} == {"0", "2"}
    found = tp.score(model, [x], graph, tp.TPV(**EXACT))
    assert found.sensitivities is not None
    assert_scores_close(found.values, reference.tpv(model, x, graph, "logits", "consume"), tolerances.EXACT)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    whole = tp.score(model, [example(60, 5)], graph, tp.TPV(compensated=True))
    assert float(whole.values["2"].min()) >= 0


@pytest.mark.parametrize("name", ["root's own", "by hand", "by hand too"])
@pytest.mark.parametrize("criterion", [tp.Wanda(), tp.Variance()], ids=["wanda", "variance"])
def test_statistics_of_what_is_not_seen_are_refused(name: str, criterion: Any) -> None:
    model, x = randomise(UNSEEN[name]()), example(12, 5)
    with pytest.raises(tp.ModelError, match=r"is not seen; take a criterion of gradients"):
        tp.score(model, [x], tp.trace(model, x[:1]), criterion)


class TimeMajor(nn.Module):
    """Sequences with time before samples, as PyTorch's own modules have them unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.layer = nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(self.up(x.transpose(0, 1)).relu())).mean(0)


@pytest.mark.parametrize("time", [3, 4, 6, 8])
@pytest.mark.parametrize("batch", [1, 4])
def test_time_before_samples_is_told_from_them(time: int, batch: int) -> None:
    model, x = randomise(TimeMajor()), example(8, time, 5)
    graph = tp.trace(model, x[:1])
    wanted = tp.score(model, x.split(1), graph, tp.TPV(**EXACT))
    found = tp.score(model, x.split(batch), graph, tp.TPV(**EXACT))
    assert_scores_close(found.values, wanted.values, tolerances.EXACT)
    wanted, found = (tp.score(model, x.split(size), graph, tp.TPV(compensated=True, **EXACT)) for size in (1, 8))
    assert_scores_close(found.values, wanted.values, tolerances.EXACT)
    weights = tp.weight_graph(model, layers=("up", "layer.linear1", "layer.linear2"))
    for engine in ("per_sample", "factored"):
        criterion = tp.TPV(engine=engine, **EXACT)
        wanted, found = (tp.score(model, x.split(size), weights, criterion) for size in (1, batch))
        assert_scores_close(found.values, wanted.values, tolerances.EXACT)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = linears((5, 6), (6, 7), (7, 3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.gelu(self.middle(F.gelu(self.first(x))))
        return self.last(x)


@pytest.mark.parametrize(
    "criterion",
    [tp.TPV(), tp.TPV(engine="batched"), tp.TPV(compensated=True), tp.JBR(confidence=0.0), tp.Taylor(), tp.Jacobian()],
    ids=lambda criterion: criterion.label,
)
def test_a_part_without_gradients_is_refused(criterion: Any) -> None:
    model, x = randomise(Frozen()), example(6, 5)
    with pytest.raises(tp.ModelError, match=r"'(first|middle)' runs under torch.no_grad\(\) inside the model"):
        tp.score(model, [(x, torch.zeros(6, dtype=torch.int64))], tp.trace(model, x[:1]), criterion)
    with pytest.raises(tp.ModelError, match="'first' runs under"):
        tp.score(model, [x], tp.weight_graph(model), tp.TPV(engine="per_sample"))


@pytest.mark.parametrize("settings", [{"engine": "per_sample"}, {"engine": "factored"}, {"compensated": True}], ids=str)
def test_a_weight_that_is_normalised_first_is_refused_where_its_layer_is_taken_for_linear(settings: Any) -> None:
    model = randomise(nn.Sequential(StdConv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)))
    x, graph = example(3, 2, 4, 4), tp.weight_graph(model)
    with pytest.raises(tp.ModelError, match=r"weight of '0' goes into more than a product.*engine='batched'"):
        tp.score(model, [x], graph, tp.TPV(**settings))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linears((5, 6), (6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(input=self.first(input=x).tanh())


class Writes(nn.Module):
    """Writes into what a layer has read."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.first, self.middle, self.last = linears((5, 6), (6, 6), (6, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * self.first(x)
        more = self.middle(x)
        if self.in_place:
            x += more
        else:
            x = x + more
        return self.last(x.tanh())


@pytest.mark.parametrize("criterion", [tp.TPV(probes=2), tp.TPV(compensated=True), tp.Jacobian()], ids=str)
def test_what_layers_are_called_with_and_writing_in_place_change_nothing(criterion: Any) -> None:
    x, labels = example(12, 5), torch.arange(12) % 4
    plain = randomise(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)))
    words = Keywords()
    words.first, words.last = plain[0], plain[2]
    one, other = randomise(Writes(True)), randomise(Writes(False))
    for model, like in ((words, plain), (one, other)):
        found, wanted = (
            tp.score(net, [(x, labels), (x + 1, labels)], tp.trace(net, x[:1]), criterion) for net in (model, like)
        )
        for got, expected in zip(found.values.values(), wanted.values.values(), strict=True):
            assert gap(got, expected) <= tolerances.EXACT * float(expected.max())


class InPlace(nn.Module):
    """A module of its own that writes into what it is given before it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2.0) @ self.weight


def test_a_reader_may_write_into_what_it_reads() -> None:
    model, x = randomise(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), InPlace())), example(9, 5)
    graph = tp.trace(model, x[:1])
    found = tp.score(model, [x], graph, tp.TPV(**EXACT))
    plain = nn.Sequential(model[0], nn.Tanh(), nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        plain[2].weight = nn.Parameter(2 * model[2].weight.T)
    wanted = tp.score(plain, [x], tp.trace(plain, x[:1]), tp.TPV(**EXACT))
    assert gap(found.values["0"], wanted.values["0"]) <= tolerances.EXACT * float(wanted.values["0"].max())


def test_inputs_with_gradients_give_the_same() -> None:
    model, x = randomise(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))), example(12, 5)
    graph = tp.trace(model, x[:1])
    wanted, found = (tp.score(model, [given], graph) for given in (x, x.clone().requires_grad_()))
    assert torch.equal(wanted.values["0"], found.values["0"])


def test_compensated_scores_under_autocast_are_those_of_half_precision_passes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5))
    batches = list(torch.randn(640, 6).split(32))
    graph = tp.trace(model, batches[0][:1])
    wanted = tp.score(model, batches, graph, tp.TPV(compensated="alone"))
    with torch.autocast("cpu", torch.bfloat16):
        found = tp.score(model, batches, graph, tp.TPV(compensated="alone"))
    for name, value in wanted.values.items():
        assert bool(((found.values[name] / value).log().abs() < 0.5).all()), name


def standardised(kind: type[nn.Module]) -> nn.Module:
    inside = [nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), kind(5, 4, 3, padding=1), nn.Tanh()]
    return randomise(nn.Sequential(*inside, nn.Flatten(), nn.Linear(64, 3)))


@pytest.mark.parametrize(("kind", "over"), [(StdConv2d, "consume"), (StdConv2d, "all"), (ScaledStdConv2d, "consume")])
def test_convolutions_that_standardise_their_weight_are_scored_by_gradients(
    kind: type[nn.Module], over: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, inputs = standardised(kind), example(4, 2, 4, 4)
    graph = tp.trace(model, inputs[:1])
    scores = tp.score(model, list(inputs.split(1)), graph, tp.TPV(probes="exact", over=over))
    assert "engine=batched" in scores.criterion
    assert "'2' reads units of '0'" in caplog.text
    assert_scores_close(scores.values, reference.tpv(model, inputs, graph, "softmax", over), tolerances.EXACT)
    with pytest.raises(tp.ModelError, match=r"'2' reads units of '0'.*\(2.weight\).*engine='batched'"):
        tp.score(model, [inputs], graph, tp.TPV(sensitivities=8))


def test_what_a_standardised_weight_writes_is_seen_where_a_gain_scales_all_of_it() -> None:
    shapes = {StdConv2d: False, ScaledStdConv2d: True}
    for kind, seen in shapes.items():
        model, inputs = (
            randomise(nn.Sequential(kind(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 2), nn.Flatten())),
            example(3, 2, 4, 4),
        )
        graph = tp.trace(model, inputs[:1])
        scores = tp.score(model, list(inputs.split(1)), graph, tp.TPV(probes="exact", over="all"))
        assert ("engine=batched" not in scores.criterion) == seen
        close = tolerances.STANDARDISED if seen else tolerances.EXACT
        assert_scores_close(scores.values, reference.tpv(model, inputs, graph, "softmax", "all"), close)


def test_a_padded_convolution_of_its_own_class_is_seen() -> None:
    model, inputs = standardised(Conv2dSame), example(4, 2, 4, 4)
    graph = tp.trace(model, inputs[:1])
    scores = tp.score(model, [inputs], graph, tp.TPV(probes="exact"))
    assert "batched" not in scores.criterion
    assert_scores_close(scores.values, reference.tpv(model, inputs, graph, "softmax", "consume"), tolerances.EXACT)


@pytest.mark.parametrize("engine", ["auto", "per_sample"])
@pytest.mark.parametrize("over", ["consume", "all"])
def test_what_hooks_make_of_an_output_is_no_part_of_the_layer(engine: str, over: str) -> None:
    model = randomise(nn.Sequential(*linears((5, 6)), nn.Tanh(), *linears((6, 4)), nn.Tanh(), *linears((4, 3))))
    inputs = example(6, 5)
    for module in (model[0], model[2]):
        module.register_forward_hook(lambda module, args, output: output.sin() * 2)
        if engine == "per_sample" and over == "all":
            module.bias = None
    graph = tp.trace(model, inputs[:1])
    scores = tp.score(model, [inputs], graph, tp.TPV(probes="exact", engine=engine, over=over))
    assert_scores_close(scores.values, reference.tpv(model, inputs, graph, "softmax", over), tolerances.EXACT)


def test_a_batch_norm_without_running_statistics_mixes_samples(caplog: pytest.LogCaptureFixture) -> None:
    model = randomise(
        nn.Sequential(*linears((5, 6)), nn.Tanh(), *linears((6, 4)), nn.Identity(), nn.Tanh(), *linears((4, 3)))
    )
    model[3] = nn.BatchNorm1d(4, track_running_stats=False).double().eval()
    inputs = example(8, 5)
    graph = tp.trace(model, inputs[:2])
    scores = tp.score(model, [inputs], graph)
    assert "engine=batched" in scores.criterion
    assert "'3' has no running statistics and mixes the samples" in caplog.text
    with pytest.raises(tp.ModelError, match="'3' has no running statistics and mixes"):
        tp.score(model, [inputs], graph, tp.TPV(engine="per_sample"))


class OneByOne(nn.Module):
    """Runs its layers on each sample alone, `(time, channels)` at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linears((5, 6), (6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.last(self.first(one).tanh()).mean(0) for one in x])


@pytest.mark.parametrize("time", [3, 4, 8])
def test_calls_of_one_sample_each_are_not_taken_for_batches(time: int) -> None:
    model, inputs = randomise(OneByOne()), example(4, time, 5)
    graph = tp.trace(model, inputs[:1])
    scores = tp.score(model, [inputs], graph)
    assert "engine=batched" in scores.criterion
    with pytest.raises(tp.ModelError, match="has the samples of a batch in an order of its own"):
        tp.score(model, [inputs], graph, tp.TPV(engine="per_sample"))


class Halves(nn.Module):
    """Runs a batch two samples at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linears((5, 6), (6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.last(self.first(part).tanh()) for part in x.split(3)])


def test_batches_in_parts_are_scored_by_gradients() -> None:
    model, inputs = randomise(Halves()), example(4, 5)
    graph = tp.trace(model, inputs[:1])
    assert "engine=batched" in tp.score(model, [inputs], graph).criterion


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "backwards": lambda x: torch.arange(len(x)).flip(0),
    "on by one": lambda x: torch.arange(len(x)).roll(1),
    "back by one": lambda x: torch.arange(len(x)).roll(-1),
    "first two": lambda x: torch.cat([torch.tensor([1, 0]), torch.arange(2, len(x))]),
    "last two": lambda x: torch.cat([torch.arange(2, len(x)), torch.tensor([1, 0])]) if len(x) > 2 else torch.arange(2),
    "odd ones last": lambda x: torch.cat([torch.arange(0, len(x), 2), torch.arange(1, len(x), 2)]),
    "sorted": lambda x: x[:, 0].argsort(),
    "largest first": lambda x: x[:, 0].argsort(descending=True),
    "by sign": lambda x: (x[:, 0] > 0).long().argsort(stable=True),
    "by size": lambda x: (x[:, 0].abs() / 0.3).long().argsort(stable=True),
}


class Ordered(nn.Module):
    """Runs one of its branches on the samples in an order of its own, as for packed sequences."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = ORDERS[order]
        self.first, self.one, self.other, self.last = linears((5, 6), (6, 4), (6, 4), (4, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden, order = self.first(x).tanh(), self.order(x) if len(x) > 1 else torch.zeros(1, dtype=torch.long)
        return self.last(self.one(hidden[order]).tanh()[order.argsort()] + self.other(hidden).tanh())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [2, 3, 4, 7])
def test_no_order_of_samples_is_taken_for_theirs(batch: int, order: str) -> None:
    model = randomise(Ordered(order))
    graph, moved = tp.trace(model, example(1, 5)), 0
    for seed in range(8):
        inputs = example(batch, 5, seed=seed)
        if seed > 5 and batch > 3:
            inputs[1] = inputs[0]
        if torch.equal(inputs[model.order(inputs)], inputs):  # which the next batch need not be
            continue
        moved += 1
        assert "engine=batched" in tp.score(model, [inputs], graph).criterion
        for scored in ((graph, tp.Wanda()), (tp.weight_graph(model), tp.TPV(engine="per_sample"))):
            with pytest.raises(tp.ModelError, match="'one' has the samples of a batch in an order of its own"):
                tp.score(model, [inputs], *scored)
    assert moved or (batch, order) in ((2, "last two"), (2, "odd ones last"))
    alone = tp.score(model, example(batch, 5).split(1), graph, tp.TPV(probes="exact"))
    assert "batched" not in alone.criterion


class Fixed(nn.Module):
    """Knows how many samples a batch has."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, (self.first, self.last) = batch, linears((5, 6), (6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh()).reshape(self.batch, 3)


def test_models_of_one_size_of_batch_are_looked_at_as_they_are() -> None:
    model = randomise(Fixed(8))
    graph = tp.trace(model, example(8, 5))
    scores = tp.score(model, [example(8, 5)], graph, tp.TPV(probes="exact"))
    assert "batched" not in scores.criterion
    free = nn.Sequential(model.first, nn.Tanh(), model.last)
    wanted = tp.score(free, [example(8, 5)], tp.trace(free, example(1, 5)), tp.TPV(probes="exact"))
    assert torch.equal(scores.values["first"], wanted.values["0"])


class Routed(nn.Module):
    """Two experts; each token goes to one of them, and an expert without tokens is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linears((5, 6), (6, 3))
        one, two, three, four = linears((6, 7), (7, 6), (6, 7), (7, 6))
        self.one, self.other = nn.Sequential(one, nn.Tanh(), two), nn.Sequential(three, nn.Tanh(), four)

    def forward(self, x: Tensor) -> Tensor:
        hidden, chosen = self.first(x).tanh(), x[..., 0] > 0
        found = torch.zeros_like(hidden)
        for expert, mask in ((self.one, chosen), (self.other, ~chosen)):
            if bool(mask.any()):
                found[mask] = expert(hidden[mask])
        return self.last(found).mean(1)


def test_layers_that_a_sample_does_not_reach_do_nothing_to_it() -> None:
    model, inputs = randomise(Routed()), example(3, 4, 5)
    inputs[..., 0] = torch.tensor([[1.0] * 4, [-1.0] * 4, [1.0, 1.0, -1.0, -1.0]])
    graph = tp.trace(model, inputs[2:])
    single = [tp.score(model, [one], graph, tp.TPV(probes="exact")).values for one in inputs.split(1)]
    together = tp.score(model, inputs.split(1), graph, tp.TPV(probes="exact"))
    assert "batched" not in together.criterion
    for name, value in together.values.items():
        mean = torch.stack([values[name] for values in single]).mean(0)
        torch.testing.assert_close(value, mean, rtol=tolerances.EXACT, atol=1e-15)
    # The first sample reaches `one` alone: what its units do, by gates on them.
    assert not bool(single[0]["other.0"].any())
    jacobian = torch.autograd.functional.jacobian(lambda g: _gated(model, inputs[:1], g), torch.ones(7).double())
    p = model(inputs[:1])[0].softmax(0)
    wanted = (jacobian.T @ (p.diag() - p.outer(p)) @ jacobian).diagonal()
    torch.testing.assert_close(single[0]["one.0"], wanted, rtol=tolerances.EXACT, atol=1e-15)
    wanda = tp.score(model, inputs.split(1), graph, tp.Wanda())
    assert all(bool((value > 0).all()) for value in wanda.values.values())


def _gated(model: Routed, x: Tensor, gate: Tensor) -> Tensor:
    """Outputs `(classes,)` of one sample all of whose tokens go to `one`, with gates on its units."""
    units = model.one[1](model.one[0](model.first(x).tanh()))
    found: Tensor = model.last(model.one[2](units * gate)).mean(1)[0]
    return found


def test_tokens_that_are_routed_by_what_they_are_are_nobodys() -> None:
    model, inputs = randomise(Routed()), example(8, 4, 5)
    graph = tp.trace(model, inputs[:1])
    for criterion in (tp.TPV(compensated=True), tp.TPV()):
        assert "engine=batched" in tp.score(model, [inputs], graph, criterion).criterion
    with pytest.raises(tp.ModelError, match="has the samples of a batch in an order of its own"):
        tp.score(model, [inputs], graph, tp.Wanda())


def test_layers_that_work_for_a_group_are_no_part_of_it() -> None:
    # A mixer's tokens pass through layers of the width of its channels.
    model = randomise(
        MlpMixer(num_classes=3, embed_dim=8, num_blocks=1, img_size=16, patch_size=8, mlp_ratio=(2.0, 2.0))
    )
    inputs = example(3, 3, 16, 16)
    graph = tp.trace(model, inputs[:1])
    assert any(member.role == "work" for group in graph.groups for member in group.members)
    scores = tp.score(model, [inputs], graph, tp.TPV(probes="exact", over="all"))
    assert "batched" not in scores.criterion
    assert_scores_close(scores.values, reference.tpv(model, inputs, graph, "softmax", "all"), tolerances.EXACT)


class Checkpointed(nn.Module):
    def __init__(self, kept: bool = False) -> None:
        super().__init__()
        self.kept = kept
        self.first, self.middle, self.last = linears((5, 6), (6, 6), (6, 4))

    def forward(self, x: Tensor) -> Tensor:
        inside = lambda value: self.middle(value.tanh()).tanh()  # noqa: E731
        x = self.first(x)
        return self.last(inside(x) if self.kept else checkpoint(inside, x, use_reentrant=False))


@pytest.mark.parametrize("engine", ["auto", "per_sample"])
def test_what_a_checkpoint_runs_again_is_not_seen_twice(engine: str) -> None:
    model, inputs = randomise(Checkpointed()), example(6, 5)
    graph = tp.trace(model, inputs[:1])
    scores = tp.score(model, [inputs], graph, tp.TPV(probes="exact", engine=engine))
    wanted = reference.tpv(randomise(Checkpointed(kept=True)), inputs, graph, "softmax", "consume")
    assert_scores_close(scores.values, wanted, tolerances.EXACT)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linears((5, 6), (6, 4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = 0.9 * self.seen + x.mean(0).detach()
        return self.last(self.first(x).tanh())


def test_buffers_that_a_pass_changes_are_put_back_and_a_stopped_scoring_goes_on(tmp_path: Path) -> None:
    model, batches = randomise(Counts()), list(example(12, 5).split(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = tp.trace(model, batches[0][:1])

    def stop(stage: str, done: int, total: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tp.score(model, batches, graph, save=tmp_path / "s", progress=stop)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = tp.score(model, batches, graph, save=tmp_path / "s")
    whole = tp.score(model, batches, graph)
    assert all(torch.equal(again.values[name], value) for name, value in whole.values.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linears((5, 6), (6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.transpose(0, 1)).tanh()).mean(0)


@pytest.mark.parametrize("time", [4, 7, 8])
def test_statistics_of_models_with_time_first_are_of_samples(time: int) -> None:
    model, inputs = randomise(TimeFirst()), example(4, time, 5)
    graph = tp.trace(model, inputs[:1])
    read = model.first(inputs).tanh().detach()
    variance = tp.score(model, [inputs], graph, tp.Variance())
    torch.testing.assert_close(variance.values["first"], read.flatten(0, 1).var(0, correction=0))
    norm = read.square().sum((0, 1)).div(4).sqrt()
    wanda = tp.score(model, [inputs], graph, tp.Wanda())
    torch.testing.assert_close(wanda.values["first"], model.last.weight.detach().abs().sum(0) * norm)
    assert variance.halves is not None
    torch.testing.assert_close(variance.halves[0]["first"], read[::2].flatten(0, 1).var(0, correction=0))


def test_the_variance_of_channels_far_from_zero_keeps_its_digits() -> None:
    model = randomise(nn.Sequential(*linears((5, 6)), nn.Identity(), *linears((6, 4)))).float()
    with torch.no_grad():
        model[0].bias.fill_(1e4)
    inputs = example(64, 5).float()
    graph = tp.trace(model, inputs[:1])
    found = tp.score(model, [inputs], graph, tp.Variance()).values["0"]
    wanted = model[0](inputs).detach().double().var(0, correction=0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
