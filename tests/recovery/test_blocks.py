"""Refitting behind skipped blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests import tolerances
from tests.block_cases import NAMES, built, gone_with
from tests.cases import example
from tests.helpers import assert_same_state, gap, outputs, plan_without
from tests.reference import ridge_refit

FREE = tp.Reconstruct(ridge=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_refit_brings_outputs_back(name: str) -> None:
    b = built(name)
    many = torch.randn(64, *b.inputs.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for gone in ({b.blocks[0]: [0]}, {b.blocks[-1]: [0]}, gone_with(b, b.blocks[:1], 1)):
        small = tp.apply(b.model, plan_without(b.graph, gone))
        again = tp.reconstruct(small, [many[:40], many[40:]], b.model)
        wanted = outputs(b.model, many)
        before, after = ((outputs(m, many) - wanted).square().mean() for m in (small, again))
        assert float(after) < 0.7 * float(before)


def test_only_what_lies_behind_the_block_is_refitted() -> None:
    b = built("stages")
    small = tp.apply(b.model, plan_without(b.graph, {"stage1.1": [0]}))
    again = tp.reconstruct(small, [b.inputs], b.model)
    for (name, old), new in zip(small.state_dict().items(), again.state_dict().values(), strict=True):
        before = name.startswith(("stem", "bn", "stage1"))
        moved = name.endswith(("conv1.weight", "conv2.weight", "down.weight", "fc.weight", "bias", "running_mean"))
        moved = moved and not name.endswith(("bn1.bias", "bn2.bias"))
        assert torch.equal(old, new) == (before or not moved), name


def test_the_first_layer_behind_a_block_is_fitted_to_what_it_gave() -> None:
    net = nn.Sequential()
    net.add_module("embed", nn.Linear(4, 5))
    net.add_module("block", built_residual())
    net.add_module("fc", nn.Linear(5, 3))
    net.double().eval()
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = tp.trace(net, x, depth=True)
    small = tp.apply(net, plan_without(graph, {"block": [0]}))
    again = tp.reconstruct(small, [x], net, tp.Reconstruct(ridge=0.03))
    with torch.no_grad():
        inputs, wanted = net.embed(x).numpy(), net(x).numpy()
    weight, bias = ridge_refit(inputs, wanted, *(p.detach().numpy() for p in net.fc.parameters()), 0.03, True)
    torch.testing.assert_close(again.fc.weight.detach(), torch.from_numpy(weight), rtol=0, atol=tolerances.SOLVE)
    torch.testing.assert_close(again.fc.bias.detach(), torch.from_numpy(bias), rtol=0, atol=tolerances.SOLVE)
    assert torch.equal(again.embed.weight, net.embed.weight)


def built_residual() -> nn.Module:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.body(x)

    return Branch()


def test_the_whole_way_with_blocks() -> None:
    b = built("stages")
    model = copy.deepcopy(b.model)
    batches = [example(8, *b.inputs.shape[1:], seed=seed) for seed in (2, 3)]
    scores = tp.score(model, batches, b.graph)
    plan = tp.allocate(scores, b.graph, tp.Budget(macs=0.25, round_to=1))
    assert [name for name in b.blocks if not plan.mask(name).any()]
    small = tp.recover(tp.apply(model, plan), batches, teacher=model, batchnorm=True, finetune_with=None)
    assert outputs(small, b.inputs).shape == (3, 4)
    assert_same_state(model.state_dict(), b.model.state_dict())
    assert gap(outputs(small, b.inputs), outputs(model, b.inputs)) > 0


def test_prune_skips_blocks_if_asked() -> None:
    b = built("stages")
    batches = [example(8, *b.inputs.shape[1:], seed=seed) for seed in (2, 3)]
    budget, criterion = tp.Budget(macs=0.25, round_to=1), tp.TPV()
    whole, flat = (tp.prune(b.model, batches, budget, criterion=criterion, depth=yes) for yes in (True, False))
    skipped = [name for name in b.blocks if not whole.plan.mask(name).any()]
    assert skipped
    assert not [g for g in flat.plan.graph.groups if g.kind == "block"]
    assert all(isinstance(whole.model.get_submodule(name), nn.Identity) for name in skipped)
    assert whole.report.got["macs"]["value"] == whole.plan.macs <= 0.25 * b.graph.macs()
    assert whole.report.pruned.params == sum(p.numel() for p in whole.model.parameters())
    assert whole.report.recovered.metrics["kl"] < whole.report.pruned.metrics["kl"]
