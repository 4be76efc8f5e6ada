"""Models that cannot be copied are refused with the name of what holds it up, and what to do about it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm

import tpvprune as tp
from tests import tolerances
from tests.cases import example
from tests.helpers import built, gap, outputs
from tpvprune.copies import copied

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def net() -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    return layers.double().eval()


def pruned(*layers: int) -> nn.Sequential:
    model = net()
    for layer in layers:
        prune.random_unstructured(model[layer], "weight", 0.5)
    return model


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Sequential:
    model = net().train()
    norm(model[0])
    model(example(2, 3))
    return model.eval()


@pytest.mark.parametrize(
    ("make", "call", "undo"),
    [
        (
            lambda: pruned(0),
            "'weight' of '0' is computed; call torch.nn.utils.prune.remove(model.get_submodule('0'), 'weight')",
            lambda m: prune.remove(m[0], "weight"),
        ),
        (
            lambda: normed(weight_norm),
            "torch.nn.utils.remove_weight_norm(model.get_submodule('0'), 'weight')",
            lambda m: remove_weight_norm(m[0], "weight"),
        ),
        (
            lambda: normed(spectral_norm),
            "torch.nn.utils.remove_spectral_norm(model.get_submodule('0'), 'weight')",
            lambda m: remove_spectral_norm(m[0], "weight"),
        ),
    ],
    ids=["prune", "weight_norm", "spectral_norm"],
)
def test_what_computes_a_weight_is_named_and_the_advice_helps(
    make: Callable[[], nn.Module], call: str, undo: Callable[[nn.Module], object]
) -> None:
    model = make()
    with pytest.raises(tp.ModelError) as caught:
        tp.trace(model, example(2, 3))
    assert call in str(caught.value)
    before = outputs(model, example(2, 3))
    undo(model)
    graph = tp.trace(model, example(2, 3))
    assert [group.id for group in graph.groups] == ["0", "2"]
    assert gap(outputs(tp.apply(model, tp.Plan({}, graph)), example(2, 3)), before) < 1e-12


def test_layers_are_named_one_by_one_and_few_of_them() -> None:
    with pytest.raises(tp.ModelError, match=r"of '0' is.*get_submodule\('0'\).*of '4' is.*get_submodule\('4'\)") as two:
        tp.trace(pruned(0, 4), example(2, 3))
    assert "more" not in str(two.value)
    many = nn.Sequential(pruned(0, 2), pruned(2, 4))
    with pytest.raises(tp.ModelError, match=r"'0\.0'.*'0\.2'.*'1\.2'.*; and 1 more$"):
        tp.trace(many, example(2, 3))
    alone = nn.Linear(3, 2)
    prune.l1_unstructured(alone, "bias", 1)
    with pytest.raises(tp.ModelError, match=r"'bias' of the Linear itself.*prune\.remove\(model, 'bias'\)"):
        tp.trace(alone, torch.randn(2, 3))


class Holds(nn.Module):
    def __init__(self, what: object) -> None:
        super().__init__()
        self.fc, self.kept = nn.Linear(3, 2), what

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_other_things_that_cannot_be_copied_are_named() -> None:
    weight = torch.ones(3, requires_grad=True)
    model = nn.Sequential(Holds(weight * 2))
    model[0].register_buffer("scale", weight * 2)
    with pytest.raises(tp.ModelError, match=r"copied: 'scale' of '0' was computed with gradients; detach it[^;]*$"):
        tp.trace(model, torch.randn(2, 3))
    with pytest.raises(tp.ModelError, match=r"'kept' of '0' fails with TypeError \(.*lock.*\); take it off"):
        tp.trace(nn.Sequential(Holds(threading.Lock())), torch.randn(2, 3))
    tp.trace(nn.Sequential(Holds(weight.detach() * 2)), torch.randn(2, 3))


def test_what_a_pass_left_is_copied_without_its_graph() -> None:
    weight = torch.ones(3, requires_grad=True)
    left = [weight * 2, weight * 3]
    for what in (left[0], left, {"a": (1, left)}):
        model = nn.Sequential(Holds(what))
        twin = copied(model)
        found = twin[0].kept["a"][1] if isinstance(what, dict) else twin[0].kept
        for mine, its in zip(left, found if isinstance(found, list) else [found], strict=False):
            assert not its.requires_grad
            assert torch.equal(its, mine)
            assert its.data_ptr() != mine.data_ptr()
        assert model[0].kept is what
    assert all(tensor.grad_fn is not None for tensor in left)


def test_a_network_that_keeps_activations_is_pruned_and_recovered() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.levels = [torch.relu(self.a(x))]
            self.features = torch.relu(self.b(self.levels[0]))
            return self.c(self.features)

    torch.manual_seed(0)
    model, x = Keeps().eval(), torch.randn(8, 6)
    found = tp.prune(model, [x], tp.Budget(macs=0.6))
    assert found.model(x).shape == (8, 4)
    assert sum(p.numel() for p in found.model.parameters()) < sum(p.numel() for p in model.parameters())
    assert model(x).requires_grad  # a pass with gradients, before what copies
    cut, masked = (outputs(act(model, found.plan), x) for act in (tp.apply, tp.mask))
    assert gap(cut, masked) < tolerances.SAME_IN_FLOAT32
    tp.refine(found.model, [x], model, tp.GaussNewton(steps=1, iterations=1))
    tp.reestimate_batchnorm(model, [x])


def test_an_error_of_a_models_own_comes_through() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: object) -> Stubborn:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        tp.trace(Stubborn(3, 2), torch.randn(2, 3))


@pytest.mark.parametrize(
    "act",
    [
        lambda m, plan, x: tp.apply(m, plan),
        lambda m, plan, x: tp.mask(m, plan),
        lambda m, plan, x: tp.reconstruct(m, [x], m),
        lambda m, plan, x: tp.refine(m, [x], m),
        lambda m, plan, x: tp.reestimate_batchnorm(m, [x]),
        lambda m, plan, x: tp.finetune(m, [x], m, tp.Finetune(epochs=1)),
        lambda m, plan, x: tp.analysis.quantise(m, 4),
    ],
    ids=["apply", "mask", "reconstruct", "refine", "reestimate_batchnorm", "finetune", "quantise"],
)
def test_whatever_copies_a_model_says_so(act: Callable[[nn.Module, tp.Plan, Tensor], object]) -> None:
    mlp = built("mlp")
    model = tp.apply(copy.deepcopy(mlp.model), tp.Plan({}, mlp.graph))
    model.kept = threading.Lock()
    with pytest.raises(tp.ModelError, match=r"'kept' of the Sequential itself fails with TypeError"):
        act(model, tp.Plan({}, mlp.graph), mlp.inputs)
