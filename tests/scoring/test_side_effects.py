"""Scoring leaves no trace in the model, in its batches or in the random state."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tpvprune as tp
from tests.helpers import assert_same_state, assert_scores_close, built

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "ids": {n: id(p) for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {(n, h): list(getattr(m, h)) for n, m in model.named_modules() for h in HOOKS},
        "own": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = fingerprint(model)
    assert_same_state(after.pop("state"), before["state"])
    for name, grad in after.pop("grads").items():
        old = before["grads"][name]
        assert (grad is None) == (old is None), name
        assert grad is None or torch.equal(grad, old), name
    assert torch.equal(after.pop("rng"), before["rng"])
    for key, value in after.items():
        assert value == before[key], key


def prepared(name: str) -> nn.Module:
    """A copy with gradients, frozen parameters, mixed modes and a hook of its owner's."""
    model = copy.deepcopy(built(name).model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first, *_, last = model.parameters()
    first.requires_grad_(False)
    last.grad = None
    model.train()
    list(model.modules())[-1].eval()
    list(model.modules())[1].register_forward_hook(lambda *_: None)
    list(model.modules())[1].register_full_backward_pre_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("over", ["consume", "all"])
@pytest.mark.parametrize("probes", [2, "exact"])
@pytest.mark.parametrize("name", ["conv_bn", "vit", "depthwise"])
def test_scoring_leaves_the_model_as_it_was(name: str, over: str, probes: int | str) -> None:
    model, before = prepared(name), None
    before = fingerprint(model)
    tp.score(model, [built(name).inputs], built(name).graph, tp.TPV(over=over, probes=probes))
    assert_unchanged(model, before)


class Fails(Exception):
    pass


@pytest.mark.parametrize("over", ["consume", "all"])
@pytest.mark.parametrize("where", ["bn1", "conv2", "fc"])
def test_scoring_leaves_the_model_as_it_was_when_its_forward_raises(where: str, over: str) -> None:
    b, model = built("conv_bn"), prepared("conv_bn")

    def fail(*_: object) -> None:
        raise Fails

    model.get_submodule(where).register_forward_hook(fail)
    before = fingerprint(model)
    with pytest.raises(Fails):
        tp.score(model, [b.inputs], b.graph, tp.TPV(over=over))
    assert_unchanged(model, before)


def test_scoring_leaves_the_model_as_it_was_when_its_batches_raise(conv_bn) -> None:
    def batches() -> Any:
        yield conv_bn.inputs
        raise Fails

    model = prepared("conv_bn")
    before = fingerprint(model)
    with pytest.raises(Fails):
        tp.score(model, batches(), conv_bn.graph)
    assert_unchanged(model, before)


def test_between_batches_the_model_is_as_it_was(conv_bn) -> None:
    # A loader may use the model itself; it must not meet it with taps on.
    model = prepared("conv_bn")
    before = fingerprint(model)

    def batches() -> Any:
        for _ in range(2):
            assert_unchanged(model, before)
            yield conv_bn.inputs

    tp.score(model, batches(), conv_bn.graph)


def test_scoring_works_under_no_grad(mlp) -> None:
    plain = tp.score(mlp.model, [mlp.inputs], mlp.graph)
    with torch.no_grad():
        inside = tp.score(mlp.model, [mlp.inputs], mlp.graph)
        assert not torch.is_grad_enabled()
    assert_scores_close(inside.values, plain.values, 0)


def test_no_activation_outlives_the_call() -> None:
    b, alive = built("conv_bn"), []
    model = copy.deepcopy(b.model)
    model.bn1.register_forward_hook(lambda m, a, output: alive.append(weakref.ref(output)))
    tp.score(model, [b.inputs] * 2, b.graph, tp.TPV(over="all"))
    gc.collect()
    assert len(alive) == 2
    assert all(ref() is None for ref in alive)


class Untouchable:
    """A label that cannot be looked at."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"a label was looked at: {name}")

    def __len__(self) -> int:
        raise AssertionError("a label was measured")

    def __iter__(self) -> Any:
        raise AssertionError("a label was read")

    def __getitem__(self, item: object) -> Any:
        raise AssertionError("a label was indexed")


def test_labels_are_never_looked_at(mlp) -> None:
    plain = tp.score(mlp.model, [mlp.inputs], mlp.graph)
    for batch in ((mlp.inputs, Untouchable()), [mlp.inputs, Untouchable()], {"image": mlp.inputs, "y": Untouchable()}):
        assert_scores_close(tp.score(mlp.model, [batch], mlp.graph).values, plain.values, 0)
    small = tp.apply(mlp.model, tp.allocate(plain, mlp.graph, tp.Budget(macs=0.6)))
    batches = [(mlp.inputs, Untouchable())]
    tp.reconstruct(small, batches, mlp.model)
    tp.reestimate_batchnorm(small, batches)
    tp.finetune(small, batches, mlp.model, tp.Finetune(epochs=1))


def test_batches_of_any_kind_give_the_same_scores(mlp) -> None:
    x, y = mlp.inputs, torch.zeros(len(mlp.inputs))
    halves = [x[:2], x[2:4]]
    kinds = {
        "tensors": halves,
        "tuples": [(half, None) for half in halves],
        "lists": [[half, 3] for half in halves],
        "dicts": [{"x": half, "y": 1} for half in halves],
        "loader": DataLoader(TensorDataset(x[:4], y[:4]), batch_size=2),
        "generator": (half for half in halves),
    }
    found = {kind: tp.score(mlp.model, batches, mlp.graph, tp.TPV(probes=2)) for kind, batches in kinds.items()}
    for kind, scores in found.items():
        assert_scores_close(scores.values, found["tensors"].values, 0)
        assert scores.samples == 4, kind


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "there is no batch"),
        ([()], "empty sequence"),
        ([{}], "no item None"),
        (["picture"], "input is a str"),
        ([torch.tensor(1.0)], "batch along its first dimension"),
        ([(None, torch.ones(2))], "input is a NoneType"),
    ],
)
def test_what_is_no_batch_is_refused(mlp, batches: list[Any], match: str) -> None:
    with pytest.raises(tp.DataError, match=match):
        tp.score(mlp.model, batches, mlp.graph)


def test_progress_counts_batches(mlp) -> None:
    told: list[tuple[str, int, int | None]] = []
    batches = [mlp.inputs] * 3
    tp.score(mlp.model, batches, mlp.graph, progress=lambda *what: told.append(what))
    assert told == [("score", n, 3) for n in (1, 2, 3)]
    told.clear()
    tp.score(mlp.model, iter(batches), mlp.graph, progress=lambda *what: told.append(what))
    assert told == [("score", n, None) for n in (1, 2, 3)]


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x - x)


def test_nan_names_the_first_module(mlp) -> None:
    layers = list(mlp.model)
    model = nn.Sequential(*layers[:3], Broken(), nn.GELU(), layers[4])
    graph = tp.trace(nn.Sequential(*layers[:3], nn.Identity(), nn.GELU(), layers[4]), mlp.inputs)
    with pytest.raises(tp.NonFiniteError, match=r"first in module 3 \(Broken\)"):
        tp.score(model, [mlp.inputs], graph)


def test_nan_in_the_input_is_told_from_nan_of_the_model(mlp) -> None:
    bad = mlp.inputs.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(tp.NonFiniteError, match="the input batch holds NaN"):
        tp.score(mlp.model, [bad], mlp.graph)


def test_nan_outside_any_module_is_told() -> None:
    class Divides(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.inner, self.by = built("mlp").model, by

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) / self.by

    graph = tp.trace(Divides(1.0), built("mlp").inputs)
    with pytest.raises(tp.NonFiniteError, match="outside any module"):
        tp.score(Divides(0.0), [built("mlp").inputs], graph)


@pytest.mark.parametrize(
    ("after", "match"),
    [
        (lambda y: (y, y), "returns a tuple"),
        (lambda y: y.argmax(1), r"returns a Tensor of torch.int64 and shape \(5,\), not one floating tensor"),
        (lambda y: y.sum(), r"returns a Tensor of torch.float64 and shape \(\), not one floating tensor"),
        (lambda y: y[:2], "gives 2 outputs for 5 inputs"),
        (lambda y: torch.ones_like(y), "no layer of the graph is on the way"),
    ],
)
def test_outputs_that_cannot_be_scored_are_refused(mlp, after: Any, match: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self, change: Any) -> None:
            super().__init__()
            self.inner, self.change = mlp.model, change

        def forward(self, x: Tensor) -> Any:
            return self.change(self.inner(x))

    graph = tp.trace(Wrapped(lambda y: y), mlp.inputs)
    with pytest.raises(tp.ModelError, match=match):
        tp.score(Wrapped(after), [mlp.inputs], graph)


def test_a_layout_without_samples_outermost_is_refused() -> None:
    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.fc = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.up(x.transpose(0, 1)).relu()).mean(0)

    model, x = SequenceFirst(), torch.randn(4, 3, 5)
    with pytest.raises(tp.ModelError, match="samples outermost"):
        tp.score(model, [x], tp.trace(model, x), tp.TPV(head="logits"))
