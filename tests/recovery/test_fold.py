"""Mean folding, against the mean of what is lost, position by position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import tolerances
from tests.cases import randomise
from tests.helpers import NAMES, assert_same_state, built, gap, outputs, plan_without, random_gone
from tests.recovery.test_reconstruct import CONVOLUTIONS, Convs, cut, data


def zeroed(layer: nn.Module, channels: list[int]) -> nn.Module:
    with torch.no_grad():
        layer.weight[:, channels] = 0
    return layer


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", [k for k in CONVOLUTIONS if k != "grouped"])
def test_the_mean_of_what_a_convolution_lost_goes_to_its_bias_or_norm(kind: str, norm: bool) -> None:
    model = randomise(Convs(norm, **CONVOLUTIONS[kind]))
    batches = data(6, 3, 8, 7)
    small = cut(model, batches[0], {"first": [0, 2]})
    found = tp.fold_means(small, [batches[0], torch.cat(batches[1:])], model)
    with torch.no_grad():
        x = model.read(torch.cat(batches))
        silent = randomise(Convs(norm, **CONVOLUTIONS[kind]))
        silent.load_state_dict(model.state_dict())
        lost = (model.conv(x) - zeroed(silent.conv, [0, 2])(x)).mean((0, 2, 3))
    if norm:
        torch.testing.assert_close(small.norm.running_mean - found.norm.running_mean, lost)
        assert torch.equal(found.norm.running_var, small.norm.running_var)
    else:
        torch.testing.assert_close((found.conv.bias - small.conv.bias).detach(), lost)
    assert torch.equal(found.conv.weight, small.conv.weight)
    assert float(lost.abs().max()) > 1e-3
    assert_same_state(found.fc.state_dict(), small.fc.state_dict())


@pytest.mark.parametrize("tokens", [False, True])
def test_a_linear_layer_gets_the_mean_too(tokens: bool) -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)))
    batches = data(30, 7, 5) if tokens else data(30, 5)
    small = cut(model, batches[0], {"0": [1, 4, 6]})
    found = tp.fold_means(small, batches, model)
    middle = outputs(model[:2], torch.cat(batches)).flatten(0, -2).mean(0)
    lost = model[2].weight.detach()[:, [1, 4, 6]] @ middle[[1, 4, 6]]
    torch.testing.assert_close((found[2].bias - small[2].bias).detach(), lost)


def test_masked_weights_count_as_lost() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)))
    batches = data(30, 5)
    graph = tp.weight_graph(model)
    small = tp.apply(model, tp.sparsify(tp.score(model, batches, graph, tp.L1()), graph, 0.5))
    found = tp.fold_means(small, batches, model)
    read = outputs(model[:2], torch.cat(batches)).mean(0)
    lost = (model[2].weight - small[2].weight).detach() @ read
    assert float(lost.abs().max()) > 1e-3
    torch.testing.assert_close((found[2].bias - small[2].bias).detach(), lost)
    assert torch.equal(found[2].weight, small[2].weight)


def test_a_layer_without_a_bias_and_a_norm_is_left_alone() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4, bias=False)))
    batches = data(30, 5)
    small = cut(model, batches[0], {"0": [1]})
    assert_same_state(tp.fold_means(small, batches, model).state_dict(), small.state_dict())


@pytest.mark.parametrize("name", [n for n in NAMES if n != "shared"])
def test_it_runs_on_every_case_and_leaves_models_as_they_were(name: str) -> None:
    b = built(name)
    small = tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 1)))
    before = {k: v.clone() for k, v in small.state_dict().items()}
    found = tp.fold_means(small, [b.inputs], b.model)
    assert_same_state(small.state_dict(), before)
    assert outputs(found, b.inputs).shape == outputs(b.model, b.inputs).shape


def test_constant_inputs_are_brought_back_exactly() -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)))
    x: Tensor = torch.full((6, 5), 0.3, dtype=torch.float64)
    small = cut(model, x, {"0": [1, 4, 6]})
    assert gap(outputs(small, x), outputs(model, x)) > tolerances.OTHER_FUNCTION
    assert gap(outputs(tp.fold_means(small, [x], model), x), outputs(model, x)) < tolerances.SAME_FUNCTION


def test_recover_folds_if_asked_and_bad_input_is_refused(mlp) -> None:
    small = tp.apply(mlp.model, plan_without(mlp.graph, {"0": [1]}))
    by_hand = tp.fold_means(small, [mlp.inputs], mlp.model)
    found = tp.recover(small, [mlp.inputs], teacher=mlp.model, fold=True, reconstruct_with=None, finetune_with=None)
    assert_same_state(found.state_dict(), by_hand.state_dict())
    with pytest.raises(tp.PlanError, match="fold_means needs a model that apply"):
        tp.fold_means(mlp.model, [mlp.inputs], mlp.model)
    with pytest.raises(tp.DataError, match="there is no batch"):
        tp.fold_means(small, [], mlp.model)
