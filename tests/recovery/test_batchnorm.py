from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests import tolerances
from tests.helpers import assert_same_state, built, outputs, plan_without, random_gone


def test_statistics_are_the_plain_average_over_batches(conv_bn) -> None:
    model = copy.deepcopy(conv_bn.model)
    batches = [
        torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(3)
    ]
    found = tp.reestimate_batchnorm(model, batches)
    seen = [outputs(model.conv1, b) for b in batches]
    means = torch.stack([s.mean((0, 2, 3)) for s in seen]).mean(0)
    variances = torch.stack([s.var((0, 2, 3)) for s in seen]).mean(0)
    torch.testing.assert_close(found.bn1.running_mean, means, rtol=tolerances.EXACT, atol=1e-12)
    torch.testing.assert_close(found.bn1.running_var, variances, rtol=tolerances.EXACT, atol=0)
    # The second norm sees what the first makes of each batch with the batch's own statistics.
    second = []
    for s in seen:
        first = nn.functional.batch_norm(s, None, None, model.bn1.weight, model.bn1.bias, training=True).relu()
        second.append(outputs(model.conv2, first.detach()).mean((0, 2, 3)))
    torch.testing.assert_close(found.bn2.running_mean, torch.stack(second).mean(0), rtol=tolerances.EXACT, atol=1e-12)


def test_everything_but_the_statistics_stays(conv_bn) -> None:
    small = tp.apply(conv_bn.model, plan_without(conv_bn.graph, random_gone(conv_bn.graph, 0))).train()
    state = copy.deepcopy(small.state_dict())
    found = tp.reestimate_batchnorm(small, [conv_bn.inputs])
    assert_same_state(small.state_dict(), state)
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, state[name])
    assert [m.momentum for m in found.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1, 0.1]
    assert all(m.training for m in found.modules())


def test_dropout_stays_off() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).eval()
    batches = [torch.randn(50, 3)]
    a, b = (tp.reestimate_batchnorm(model, batches)[2].running_mean for _ in range(2))
    assert torch.equal(a, b)
    torch.testing.assert_close(a, outputs(model[0], batches[0]).mean(0))


def test_a_model_without_batch_norm_comes_back_as_it_is(mlp) -> None:
    found = tp.reestimate_batchnorm(mlp.model, [mlp.inputs])
    assert found is not mlp.model
    assert_same_state(found.state_dict(), mlp.model.state_dict())


def test_no_batch_is_an_error(conv_bn) -> None:
    with pytest.raises(tp.DataError, match="there is no batch"):
        tp.reestimate_batchnorm(conv_bn.model, [])


def test_the_plan_stays_with_the_model() -> None:
    b = built("conv_bn")
    small = tp.apply(b.model, plan_without(b.graph, {"conv1": [0]}))
    again = tp.reconstruct(tp.reestimate_batchnorm(small, [b.inputs]), [b.inputs], b.model)
    assert again.conv1.out_channels == 5
