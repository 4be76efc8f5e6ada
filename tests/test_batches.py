from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tpvprune as tp
from tests import tolerances
from tests.helpers import assert_scores_close, built
from tpvprune.batches import (
    device_of,
    evaluation_mode,
    finite_output,
    finite_outputs,
    inputs_of,
    labels_of,
    length_of,
    model_inputs,
    repeatable,
    select_output,
    single_tensor,
)

X, Y = torch.ones(3, 2), torch.tensor([0, 1, 2])


@pytest.mark.parametrize("batch", [X, (X,), (X, Y), [X, Y], {"image": X, "label": Y}])
def test_inputs_come_first(batch: object) -> None:
    assert inputs_of(batch) is X


def test_inputs_may_be_named() -> None:
    assert inputs_of({"label": Y, "image": X}, "image") is X
    with pytest.raises(tp.DataError, match="no item 'x'; it has 'label'"):
        inputs_of({"label": Y}, "x")


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], {"image": X, "label": Y}])
def test_labels_come_second(batch: object) -> None:
    assert labels_of(batch) is Y


@pytest.mark.parametrize("batch", [X, (X,), {"image": X}, (X, "cat"), (X, None)])
def test_batches_without_labels(batch: object) -> None:
    assert labels_of(batch) is None


def test_length_is_told_where_it_is_known() -> None:
    assert length_of([X, X]) == 2
    assert length_of(DataLoader(TensorDataset(X), batch_size=2)) == 2
    assert length_of(iter([X])) is None


def test_one_shot_iterators_are_told_from_the_rest() -> None:
    repeatable([X], "why")
    repeatable(DataLoader(TensorDataset(X)), "why")
    for one_shot in (iter([X]), (x for x in [X]), map(abs, [X])):
        with pytest.raises(tp.DataError, match="once only, and why"):
            repeatable(one_shot, "why")


def test_an_empty_iterable_is_refused_at_its_end() -> None:
    with pytest.raises(tp.DataError, match="stage: there is no batch"):
        list(model_inputs(nn.Linear(2, 2), [], "stage"))


def test_the_device_is_that_of_the_first_tensor() -> None:
    assert device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")


@dataclass
class Answer:
    logits: Tensor
    features: tuple[Tensor, ...]
    count: int = 3


class Pair(NamedTuple):
    logits: Tensor
    state: Tensor


NESTED = {"head": {"out": X}, "list": [Y, X], 0: X + 1, "answer": Answer(X, (X + 2, X)), "a.b": X + 3}


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (None, "a NoneType"),
        ((X,), "a tuple of 1"),
        ([X, Y], "a list of 2"),
        (Y, r"a Tensor of torch.int64 and shape \(3,\)"),
        (torch.tensor(1.0), r"a Tensor of torch.float32 and shape \(\)"),
        ({"logits": X, "count": Y}, "a dict with 'logits', 'count'"),
        ({}, "a dict with nothing in it"),
        (Answer(X, ()), "a Answer with 'logits', 'features', 'count'"),
    ],
)
def test_what_is_no_output_is_named(output: object, told: str) -> None:
    for read in (lambda o: single_tensor(o, nn.ReLU()), lambda o: select_output(o, None, nn.ReLU())):
        with pytest.raises(tp.ModelError, match=f"ReLU returns {told}, .*output='key', output=0 or a .*wrap the model"):
            read(output)


def test_outputs_are_one_floating_tensor_or_several_by_name() -> None:
    assert single_tensor(X, nn.ReLU()) is X
    assert select_output(X, None, nn.ReLU()) is X
    several = {"logits": X, 1: X + 1}
    assert list(select_output(several, None, nn.ReLU())) == ["logits", "1"]
    with pytest.raises(tp.ModelError, match=r"ReLU returns a dict with 'logits', '1'; name the one .* output='key'"):
        single_tensor(several, nn.ReLU())


@pytest.mark.parametrize(
    ("output", "select", "wanted"),
    [
        (NESTED, "head.out", X),
        (NESTED, "head", {"out": X}),
        (NESTED, "list.1", X),
        (NESTED, "list.-1", X),
        (NESTED, 0, X + 1),
        (NESTED, "0", X + 1),
        (NESTED, "answer.logits", X),
        (NESTED, "answer.features.0", X + 2),
        (NESTED, lambda o: o["list"][1] * 2, X * 2),
        (NESTED, lambda o: {"x": o[0]}, {"x": X + 1}),
        ((X, Y), 0, X),
        ([Y, X], -1, X),
        (Answer(X, ()), "logits", X),
        (Pair(X, Y), "logits", X),
        (Pair(X, Y), 0, X),
    ],
)
def test_the_part_that_counts_is_found(output: object, select: Any, wanted: Any) -> None:
    found = select_output(output, select, nn.ReLU())
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
    pairs = zip(found.values(), wanted.values(), strict=True) if isinstance(wanted, dict) else [(found, wanted)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("output", "select", "match"),
    [
        ({"a": X}, "b", "returns a dict with 'a', in which output='b' finds no 'b'"),
        ({"a": {"x": X}}, "a.y", "returns a dict with 'x', in which output='a.y' finds no 'y'"),
        ((X, Y), 2, "returns a tuple of 2, in which output=2 finds no '2'"),
        ((X, Y), "logits", "returns a tuple of 2, in which output='logits' finds no 'logits'"),
        (Answer(X, ()), "logit", "a Answer with 'logits', 'features', 'count', in which output='logit' finds no"),
        (X, "logits", r"a Tensor of torch.float32 and shape \(3, 2\), in which output='logits'"),
        ((X, Y), 1, "returns a Tensor of torch.int64"),
        (Answer(X, ()), "count", "returns a int, not one floating tensor"),
        (X, lambda o: o.sum(), r"returns a Tensor of torch.float32 and shape \(\), not one"),
    ],
)
def test_a_part_that_is_not_there_is_refused(output: object, select: Any, match: str) -> None:
    with pytest.raises(tp.ModelError, match=match):
        select_output(output, select, nn.ReLU())


def test_every_output_has_a_row_a_sample_and_is_finite() -> None:
    class Returns(nn.Module):
        def __init__(self, output: Any) -> None:
            super().__init__()
            self.output = output

        def forward(self, x: Tensor) -> Any:
            return self.output

    both = {"a": X, "b": torch.ones(3, 4, 5)}
    assert finite_outputs(Returns(both), X) == both
    assert finite_output(Returns(both), X, "b") is both["b"]
    with pytest.raises(tp.ModelError, match="gives 2 outputs for 3 inputs"):
        finite_outputs(Returns({"a": X, "b": X[:2]}), X)
    with pytest.raises(tp.NonFiniteError, match="outside any module"):
        finite_outputs(Returns({"a": X, "b": X / 0}), X)
    assert finite_outputs(Returns((X, X / 0)), X, 0) is X
    with pytest.raises(tp.ModelError, match="name the one that counts"):
        finite_output(Returns(both), X)


class Dressed(nn.Module):
    """A model that returns more than its outputs."""

    def __init__(self, inner: nn.Module, dress: Any) -> None:
        super().__init__()
        self.inner, self.dress = inner, dress

    def forward(self, x: Tensor) -> Any:
        return self.dress(self.inner(x), x)


DRESSES = {
    "bare": (lambda y, x: y, None),
    "tuple": (lambda y, x: (y, x.mean()), 0),
    "list": (lambda y, x: [x, y], -1),
    "dict": (lambda y, x: {"out": y, "extra": x}, "out"),
    "dict of one": (lambda y, x: {"out": y}, "out"),
    "nested": (lambda y, x: {"head": [x, {"y": y}]}, "head.1.y"),
    "dataclass": (lambda y, x: Answer(y, (x,)), "logits"),
    "named tuple": (lambda y, x: Pair(y, x), "logits"),
    "function": (lambda y, x: (y, x), lambda pair: pair[0]),
}


@pytest.mark.parametrize("which", DRESSES)
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_what_a_model_wraps_its_outputs_in_does_not_matter(name: str, which: str) -> None:
    dress, select = DRESSES[which]
    b = built(name)
    model = Dressed(b.model, dress)
    graph = tp.trace(model, b.inputs)
    assert [(g.id.removeprefix("inner."), g.units, g.exact_mask) for g in graph.groups] == [
        (g.id, g.units, g.exact_mask) for g in b.graph.groups
    ]
    assert {layer.removeprefix("inner.") for layer in graph.skipped} == set(b.graph.skipped)
    assert (graph.macs(), graph.params()) == (b.graph.macs(), b.graph.params())
    for engine in ("auto", "batched"):
        here = tp.score(model, [b.inputs], graph, tp.TPV(output=select, probes=2, engine=engine))
        bare = tp.score(b.model, [b.inputs], b.graph, tp.TPV(probes=2, engine=engine))
        assert_scores_close({n.removeprefix("inner."): v for n, v in here.values.items()}, bare.values, 0)


@pytest.mark.parametrize("engine", ["auto", "batched", "per_sample"])
def test_several_outputs_drift_together(engine: str) -> None:
    b = built("mlp")
    model = Dressed(b.model, lambda y, x: {"a": y[:, :3], "b": y[:, 1:].tanh()})
    graph = tp.trace(model, b.inputs)

    def scored(head: Any, output: Any = None) -> Any:
        one = [x.unsqueeze(0) for x in b.inputs]  # products of different samples are no matter then
        return tp.score(model, one, graph, tp.TPV(head=head, probes="exact", output=output, engine=engine)).values

    both = scored(tp.Several({"a": "softmax", "b": "cosine"}))
    a, c = scored("softmax", "a"), scored(tp.Cosine(), "b")
    assert_scores_close(both, {name: a[name] + c[name] for name in a}, tolerances.EXACT)
    assert_scores_close(scored("logits", lambda o: torch.cat([*o.values()], 1)), scored(ALL), tolerances.EXACT)
    with pytest.raises(tp.ModelError, match="returns 'a', 'b'; name the one that counts with output='key'"):
        scored("softmax")


ALL = tp.Several({"a": "logits", "b": "features"})


def test_modes_come_back_module_by_module() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[1].eval()

    def fails() -> None:
        with evaluation_mode(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [m.training for m in model.modules()] == [True, True, False]


class Captioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        x = self.first(x).relu()
        return self.last(x if mask is None else x * mask)


def test_a_dict_whose_input_is_not_first_is_refused() -> None:
    model, x = Captioned().eval(), torch.randn(2, 4)
    graph = tp.trace(model, x)
    with pytest.raises(tp.DataError, match="here 'mask', and Captioned takes 'x' first; wrap the Captioned"):
        tp.score(model, [{"mask": torch.ones(2, 1), "x": x}], graph, tp.TPV(head="logits"))


def test_items_that_a_model_takes_and_does_not_get_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Captioned().eval(), torch.randn(2, 4)
    graph = tp.trace(model, x)
    first = tp.score(model, [{"x": x, "labels": torch.zeros(2), "name": torch.ones(2)}], graph, tp.TPV(head="logits"))
    assert not caplog.records
    second = tp.score(model, [{"x": x, "mask": torch.ones(2, 1)}] * 2, graph, tp.TPV(head="logits"))
    assert [r.getMessage()[:44] for r in caplog.records] == ["batches hold 'mask', which Captioned takes a"]
    assert first.values.keys() == second.values.keys()
