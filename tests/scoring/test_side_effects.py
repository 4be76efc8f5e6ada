"""Scoring leaves no trace in the model, in its batches or in the random state."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tpvprune as tp
from tests.helpers import assert_same_state, assert_scores_close, built
from tpvprune.scoring.registry import CRITERIA, LABELLED
from tpvprune.scoring.tpv import ENGINES

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
        "other rng": (random.getstate(), np.random.get_state()[1].tolist()),
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


# All of the registry, and `TPV` with all of its engines and settings.
EVERY: dict[str, Callable[[], Any]] = {
    **CRITERIA,
    "jbr": lambda: tp.JBR(confidence=0.0),  # so that no sample is left out
    "jbr, reference": lambda: tp.JBR(confidence=0.0, reference=prepared("conv_bn")),
    "jacobian, consume": lambda: tp.Jacobian(over="consume"),
    **{f"tpv, {engine}": partial(tp.TPV, engine=engine, probes=2) for engine in ENGINES},
    **{f"tpv, {engine}, exact": partial(tp.TPV, engine=engine, probes="exact") for engine in ENGINES},
    "tpv, rounding": lambda: tp.TPV(perturbation="rounding"),
    "tpv, isotropic": lambda: tp.TPV(perturbation="isotropic"),
    "tpv, all": lambda: tp.TPV(over="all", probes=2),
    "tpv, all, exact": lambda: tp.TPV(over="all", probes="exact"),
    "tpv, all, batched": lambda: tp.TPV(over="all", engine="batched"),
    "tpv, compensated": lambda: tp.TPV(compensated=True),
    "tpv, reference": lambda: tp.TPV(reference=prepared("conv_bn")),
}
FROM_WEIGHTS = ("random", "l1", "l2", "lamp", "fpgm", "whc", "bnscale")
READING = [which for which in EVERY if which not in FROM_WEIGHTS]  # the batches


def graph_for(name: str, which: str) -> tp.Graph:
    return tp.weight_graph(built(name).model) if "factored" in which else built(name).graph


def labelled(name: str) -> tuple[Tensor, Tensor]:
    x = built(name).inputs
    return x, torch.arange(len(x)) % 4


ON_CASES = [("conv_bn", which) for which in EVERY] + [
    (name, which)
    for name in ("vit", "depthwise")
    for which in EVERY
    if "reference" not in which and (name, which) != ("vit", "bnscale")  # which has no batch norm
]


@pytest.mark.parametrize(("name", "which"), ON_CASES)
def test_scoring_leaves_everything_as_it_was(name: str, which: str) -> None:
    criterion, model, (x, y) = EVERY[which](), prepared(name), labelled(name)
    models = [m for m in (model, getattr(criterion, "reference", None)) if m is not None]
    before, held = [fingerprint(m) for m in models], (x.clone(), y.clone())
    tp.score(model, [(x, y), (x[:2], y[:2])], graph_for(name, which), criterion)
    for m, old in zip(models, before, strict=True):
        assert_unchanged(m, old)
    assert torch.equal(x, held[0])
    assert torch.equal(y, held[1])
    assert not x.requires_grad
    assert x.grad is None


class Fails(Exception):
    pass


@pytest.mark.parametrize("which", READING)
@pytest.mark.parametrize("where", ["bn1", "conv2", "fc"])
def test_scoring_leaves_the_model_as_it_was_when_its_forward_raises(where: str, which: str) -> None:
    model = prepared("conv_bn")

    def fail(*_: object) -> None:
        raise Fails

    model.get_submodule(where).register_forward_hook(fail)
    before = fingerprint(model)
    with pytest.raises(Fails):
        tp.score(model, [labelled("conv_bn")], graph_for("conv_bn", which), EVERY[which]())
    assert_unchanged(model, before)


@pytest.mark.parametrize("which", READING)
def test_scoring_leaves_the_model_as_it_was_when_its_batches_raise(which: str) -> None:
    class Batches:
        def __iter__(self) -> Any:
            yield labelled("conv_bn")
            raise Fails

    model = prepared("conv_bn")
    before = fingerprint(model)
    with pytest.raises(Fails):
        tp.score(model, Batches(), graph_for("conv_bn", which), EVERY[which]())
    assert_unchanged(model, before)


@pytest.mark.parametrize("which", READING)
def test_between_batches_the_model_is_as_it_was(which: str) -> None:
    # A loader may use the model itself; it must not meet it with taps on.
    model = prepared("conv_bn")
    before = fingerprint(model)

    class Batches:
        def __iter__(self) -> Any:
            for _ in range(2):
                assert_unchanged(model, before)
                yield labelled("conv_bn")

    tp.score(model, Batches(), graph_for("conv_bn", which), EVERY[which]())


@pytest.mark.parametrize("which", EVERY)
def test_scores_do_not_depend_on_the_state_the_model_is_in(which: str) -> None:
    # Train mode, frozen parameters, gradients that are there, hooks and the global random state.
    criterion, graph = EVERY[which](), graph_for("conv_bn", which)
    plain = tp.score(built("conv_bn").model, [labelled("conv_bn")], graph, criterion)
    torch.manual_seed(99)
    found = tp.score(prepared("conv_bn"), [labelled("conv_bn")], graph, criterion)
    assert_scores_close(found.values, plain.values, 0)


@pytest.mark.parametrize("which", EVERY)
def test_scoring_works_under_no_grad(which: str) -> None:
    model, graph, criterion = built("conv_bn").model, graph_for("conv_bn", which), EVERY[which]()
    plain = tp.score(model, [labelled("conv_bn")], graph, criterion)
    with torch.no_grad():
        inside = tp.score(model, [labelled("conv_bn")], graph, criterion)
        assert not torch.is_grad_enabled()
    assert_scores_close(inside.values, plain.values, 0)
    assert all(not value.requires_grad for value in plain.values.values())


def _remembered(refs: list[Any], module: nn.Module, args: Any, output: Tensor) -> None:
    if len(output) == len(labelled("conv_bn")[0]):  # of few, it is only seen where they lie
        refs.append(weakref.ref(output))


def test_no_activation_outlives_the_call() -> None:
    alive: dict[str, list[Any]] = {which: [] for which in READING}
    for which, refs in alive.items():
        model, graph = copy.deepcopy(built("conv_bn").model), graph_for("conv_bn", which)
        model.bn1.register_forward_hook(partial(_remembered, refs))
        tp.score(model, [labelled("conv_bn")] * 2, graph, EVERY[which]())
    gc.collect()
    for which, refs in alive.items():
        assert len(refs) == (4 if "compensated" in which else 2), which  # compensation takes a pass more
        assert all(ref() is None for ref in refs), which


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


@pytest.mark.parametrize("which", [which for which in EVERY if which.split(",")[0] not in LABELLED])
def test_labels_are_looked_at_by_none_but_those_that_need_them(which: str) -> None:
    x, model = labelled("conv_bn")[0], built("conv_bn").model
    graph, criterion = graph_for("conv_bn", which), EVERY[which]()
    plain = tp.score(model, [x], graph, criterion)
    for batch in ((x, Untouchable()), [x, Untouchable()], {"image": x, "y": Untouchable()}):
        assert_scores_close(tp.score(model, [batch], graph, criterion).values, plain.values, 0)


@pytest.mark.parametrize("which", LABELLED)
def test_those_that_need_labels_say_so(mlp, which: str) -> None:
    with pytest.raises(tp.DataError, match=f"criterion {which} needs labels"):
        tp.score(mlp.model, [mlp.inputs], mlp.graph, EVERY[which]())


def test_recovery_without_labels_never_looks_at_them(mlp) -> None:
    plain = tp.score(mlp.model, [mlp.inputs], mlp.graph)
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
