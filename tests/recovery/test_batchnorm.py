from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests import tolerances
from tests.cases import randomise
from tests.helpers import assert_same_state, built, gap, outputs, plan_without, random_gone
from tests.recovery.test_reconstruct import Convs, close, cut, data, refit_conv
from tests.reference import ridge_refit


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


def test_statistics_that_are_not_finite_are_told_with_the_norm(conv_bn) -> None:
    bad = conv_bn.inputs.clone()
    bad[1, 0, 2, 2] = torch.nan
    with pytest.raises(tp.NonFiniteError, match="layer 'bn1' is given NaN"):
        tp.reestimate_batchnorm(conv_bn.model, [conv_bn.inputs, bad])


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


def normed() -> tuple[nn.Module, nn.Module, list[torch.Tensor]]:
    """A model, what a cut leaves of it, and batches; its second convolution hands its shift to the norm behind it."""
    model = randomise(Convs(norm=True, kernel_size=3, padding=1))
    batches = data(6, 3, 8, 7)
    return model, cut(model, batches[0], {"first": [0, 2], "conv": [1]}), batches


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_a_shift_that_the_running_mean_holds_already_is_not_taken_off_twice(inputs: Any) -> None:
    model, small, batches = normed()
    settings = tp.Reconstruct(ridge=0.1, inputs=inputs)
    once = tp.reconstruct(small, batches, model, settings)
    twice = tp.reconstruct(once, batches, model, settings)
    rows = [0, 2, 3, 4, 5]
    assert gap(once.norm.running_mean, small.norm.running_mean) > 1e-2
    with torch.no_grad():
        kept = [1, 3, 4, 5, 6, 7]
        seen = [small.read(b) if inputs == "pruned" else model.read(b)[:, kept] for b in batches]
        # The same layer with that shift as a bias of its own.
        biased = nn.Conv2d(6, 5, 3, padding=1).double()
        biased.weight.copy_(once.conv.weight)
        biased.bias.copy_(small.norm.running_mean - once.norm.running_mean)
        wanted = [model.conv(model.read(b))[:, rows] for b in batches]
    weight, bias = refit_conv(biased, seen, wanted, 0.1, free_bias=True)
    close(twice.conv.weight, weight)
    close(small.norm.running_mean - twice.norm.running_mean, bias)


def test_a_mean_that_was_folded_is_not_folded_again_and_folding_changes_nothing_of_the_closed_form() -> None:
    model, small, batches = normed()
    folded = tp.fold_means(small, batches, model)
    assert gap(folded.norm.running_mean, small.norm.running_mean) > 1e-2
    again = tp.fold_means(folded, batches, model)
    assert gap(again.norm.running_mean, folded.norm.running_mean) < tolerances.SAME_FUNCTION
    plain, after = (tp.reconstruct(m, batches, model) for m in (small, folded))
    for found, wanted in zip(after.state_dict().values(), plain.state_dict().values(), strict=True):
        close(found, wanted)


@pytest.mark.parametrize("bias", [False, True])
def test_behind_a_norm_that_has_changed_the_dense_norms_outputs_are_aimed_at(bias: bool) -> None:
    model = randomise(Convs(norm=True, kernel_size=3, padding=1))
    if bias:
        model.conv.bias = nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    batches = data(6, 3, 8, 7)
    small = cut(model, batches[0], {"first": [0, 2], "conv": [1]})
    small.norm.load_state_dict(randomise(nn.BatchNorm2d(5), seed=5).state_dict())
    with torch.no_grad():
        small.norm.weight[3] = 1e-12  # whatever is given to it, nothing comes out
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=0.1))
    with torch.no_grad():
        gain = small.norm.weight / (small.norm.running_var + small.norm.eps).sqrt()
        mean, shift = (t.reshape(-1, 1, 1) for t in (small.norm.running_mean, small.norm.bias))
        seen = [small.read(b) for b in batches]
        through = [model.norm(model.conv(model.read(b)))[:, [0, 2, 3, 4, 5]] for b in batches]
        wanted = [(t - shift) / gain.reshape(-1, 1, 1) + mean for t in through]
    weight, moved = refit_conv(small.conv, seen, wanted, 0.1, free_bias=True)
    usable = [0, 1, 2, 4]
    close(found.conv.weight[usable], weight[usable])
    close(
        found.conv.bias[usable] if bias else (small.norm.running_mean - found.norm.running_mean)[usable], moved[usable]
    )
    assert all(bool(torch.isfinite(t).all()) for t in found.state_dict().values())
    assert gap(found.conv.weight[3], small.conv.weight[3]) < 10


@pytest.mark.parametrize("tokens", [4, 6])
def test_a_norm_along_tokens_takes_no_shift_of_a_linear_layers_channels(tokens: int) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Linear(5, 8), nn.Linear(8, 6, bias=False)
            self.norm, self.last = nn.BatchNorm1d(tokens), nn.Linear(6, 3)

        def read(self, x: torch.Tensor) -> torch.Tensor:
            return self.first(x).tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(self.layer(self.read(x))).tanh().mean(1))

    model = randomise(Tokens())
    batches = data(10, tokens, 5)
    small = cut(model, batches[0], {"first": [1, 4]})
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=0.1))
    assert_same_state(found.norm.state_dict(), small.norm.state_dict())
    x = torch.cat(batches)
    read, wanted = (outputs(f, x).flatten(0, 1).numpy() for f in (small.read, lambda x: model.layer(model.read(x))))
    close(found.layer.weight, ridge_refit(read, wanted, small.layer.weight.detach().numpy(), None, 0.1, False)[0])


def test_batches_count_by_their_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().eval()
    batches = [torch.randn(n, 3, dtype=torch.float64, generator=generator) * n for n in (12, 3, 5)]
    found = tp.reestimate_batchnorm(model, batches)[1]
    seen = [outputs(model[0], b) for b in batches]
    variance = sum(len(s) * s.var(0) for s in seen) / 20
    torch.testing.assert_close(found.running_mean, torch.cat(seen).mean(0), rtol=tolerances.EXACT, atol=0)
    torch.testing.assert_close(found.running_var, variance, rtol=tolerances.EXACT, atol=0)


def test_equal_batches_give_the_plain_average_to_the_bit(conv_bn) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(7)]
    plain = copy.deepcopy(conv_bn.model).float().eval()
    found = tp.reestimate_batchnorm(plain, batches)
    for norm in (m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        outputs(plain, batch)
    assert_same_state(found.state_dict(), plain.state_dict())


class Pooled(nn.Module):
    """One norm over a map and one over a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.map = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.vector, self.unused = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        nn.init.constant_(self.unused.running_mean, 7.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vector(self.map(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("first", [False, True])
def test_a_single_sample_counts_where_it_has_a_variance(first: bool) -> None:
    torch.manual_seed(0)
    model, batches = Pooled().eval(), [torch.randn(5, 3, 8, 8), torch.randn(1, 3, 8, 8)]
    found = tp.reestimate_batchnorm(model, batches[::-1] if first else batches)
    torch.testing.assert_close(found.map.running_mean, outputs(model.conv, torch.cat(batches)).mean((0, 2, 3)))
    alone = tp.reestimate_batchnorm(model, batches[:1])
    assert torch.equal(found.vector.running_mean, alone.vector.running_mean)
    assert torch.equal(found.vector.running_var, alone.vector.running_var)
    assert torch.equal(found.unused.running_mean, model.unused.running_mean)
    with pytest.raises(tp.DataError, match="'vector' is given one number a channel"):
        tp.reestimate_batchnorm(model, batches[1:])


def test_modes_of_norms_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)).eval()
    model[2].train()
    found = tp.reestimate_batchnorm(model, [torch.randn(5, 3)])
    assert [m.training for m in found.modules()] == [m.training for m in model.modules()]
