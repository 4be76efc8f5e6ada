"""Masked weights stay zero through training and refits, and what is left of them is trained as it should be."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import tpvprune as tp
from tests import tolerances
from tests.cases import example, randomise
from tests.helpers import assert_same_state, built, gap, outputs, plan_without, random_gone
from tests.reference import ridge_refit
from tpvprune.plan import plan_of
from tpvprune.recovery.masks import solve_free


def sparse(model: nn.Module, share: float = 0.5, seed: int = 0) -> tp.Plan:
    graph = tp.weight_graph(model)
    scores = tp.score(model, [], graph, tp.Random(seed=seed))
    return tp.sparsify(scores, graph, share)


def masked(name: str = "conv_bn") -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """(dense, cut and masked, batches) in float32."""
    b = built(name)
    generator = torch.Generator().manual_seed(2)
    batches = [torch.randn(16, *b.inputs.shape[1:], generator=generator) for _ in range(4)]
    dense = tp.reestimate_batchnorm(copy.deepcopy(b.model).float(), batches)
    small = tp.apply(dense, plan_without(b.graph, random_gone(b.graph, 1, 0.3)))
    return dense, tp.apply(small, sparse(small)), batches


OPTIMISERS = {
    "momentum": tp.Finetune(epochs=3, lr=0.05, optimizer="momentum", weight_decay=0.01),
    "sgd with nesterov momentum": tp.Finetune(epochs=3, lr=0.05, optimizer="sgd", weight_decay=0.01),
    "adamw": tp.Finetune(epochs=3, lr=0.01, optimizer="adamw", weight_decay=0.1),
    "accumulated": tp.Finetune(epochs=3, lr=0.01, optimizer="adamw", weight_decay=0.1, accumulate=2),
    "bf16": tp.Finetune(epochs=3, lr=0.01, precision="bf16"),
}


@pytest.mark.parametrize("how", OPTIMISERS)
@pytest.mark.parametrize("name", ["mlp", "conv_bn", "vit"])
def test_masked_weights_are_exactly_zero_after_training(name: str, how: str) -> None:
    dense, small, batches = masked(name)
    found = tp.finetune(small, batches, dense, OPTIMISERS[how])
    masks = plan_of(small).weight_masks()
    assert masks
    for key, mask in masks.items():
        weight = found.get_parameter(key)
        assert not bool((weight[~mask] != 0).any()), key
        assert bool((weight[mask] != small.get_parameter(key)[mask]).any()), key
    assert sum(int((p == 0).sum()) for p in found.parameters()) == plan_of(found).zeros
    assert list(found.state_dict()) == list(small.state_dict())
    assert plan_of(found).diff(plan_of(small)) == {}


def test_masked_gradients_do_not_count_for_clipping_or_moments() -> None:
    # The same training, written out: masks times weights in the forward pass, so that no masked weight has a gradient.
    dense, small, batches = masked("mlp")
    how = tp.Finetune(epochs=2, lr=0.05, optimizer="momentum", weight_decay=0.0, warmup=0.0, clip=0.05)
    found = tp.finetune(small, batches, dense, how)
    masks = plan_of(small).weight_masks()
    free = {name: p.detach().clone().requires_grad_(True) for name, p in small.named_parameters()}
    optimiser = torch.optim.SGD(free.values(), lr=how.lr, momentum=0.9)
    steps = how.epochs * len(batches)
    for step in range(steps):
        x = batches[step % len(batches)]
        effective = {name: p * masks[name] if name in masks else p for name, p in free.items()}
        output = torch.func.functional_call(small, effective, (x,))
        p = F.log_softmax(outputs(dense, x) / 2, 1)
        (F.kl_div(F.log_softmax(output / 2, 1), p, reduction="batchmean", log_target=True) * 4).backward()
        torch.nn.utils.clip_grad_norm_(free.values(), how.clip)
        optimiser.param_groups[0]["lr"] = how.lr * (1 + np.cos(np.pi * step / steps)) / 2
        optimiser.step()
        optimiser.zero_grad()
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, free[name], rtol=0, atol=1e-6)


def test_a_loop_of_ones_own_holds_masks_too() -> None:
    _, small, batches = masked()
    plan = plan_of(small)
    optimiser = torch.optim.AdamW(small.parameters(), lr=0.01, weight_decay=0.5)
    masks = tp.Masks(small)
    for x in batches:
        small(x).square().mean().backward()
        masks.gradients()
        for name, mask in plan.weight_masks().items():
            assert not bool((small.get_parameter(name).grad[~mask] != 0).any())
            assert bool((small.get_parameter(name).grad[mask] != 0).any())
        optimiser.step()
        masks.weights()
    assert sum(int((p == 0).sum()) for p in small.parameters()) == plan.zeros


WRAPPERS = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "of timm's average": ModelEmaV3,
    "a part": lambda model: nn.Sequential(nn.Identity(), model),
    "wrapped twice": lambda model: nn.Sequential(nn.DataParallel(model)),
}


@pytest.mark.parametrize("how", WRAPPERS)
def test_masks_are_held_inside_of_what_wraps_a_model(how: str) -> None:
    _, small, batches = masked("mlp")
    plan, wrapped = plan_of(small), WRAPPERS[how](small)
    held = [module for module in wrapped.modules() if plan_of(module) is not None]
    assert len(held) == 1
    wrapped.requires_grad_(True)
    optimiser = torch.optim.AdamW(wrapped.parameters(), lr=0.01, weight_decay=0.5)
    masks = tp.Masks(wrapped)
    for x in batches:
        held[0](x).square().mean().backward()
        masks.gradients()
        optimiser.step()
        masks.weights()
    for name, mask in plan.weight_masks().items():
        weight = held[0].get_parameter(name)
        assert not bool((weight[~mask] != 0).any())
        assert bool((weight[mask] != masked("mlp")[1].get_parameter(name)[mask]).any())
    assert sum(int((p == 0).sum()) for p in held[0].parameters()) == plan.zeros > 0


def test_every_plan_inside_is_held() -> None:
    one, two = masked("mlp")[1], tp.apply(masked("conv_bn")[0], sparse(masked("conv_bn")[0], seed=3))
    both = nn.ModuleDict({"one": one, "two": two})
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.add_(1.0)
    tp.Masks(both).weights()
    for model in (one, two):
        assert sum(int((p == 0).sum()) for p in model.parameters()) == plan_of(model).zeros > 0


def test_zeros_of_a_part_stay_zero_in_training() -> None:
    dense, small, batches = masked("mlp")
    found = tp.finetune(nn.Sequential(nn.Identity(), small), batches, dense, tp.Finetune(epochs=1, lr=0.05))
    assert sum(int((p == 0).sum()) for p in found.parameters()) == plan_of(small).zeros
    assert gap(found[1].get_parameter("2.weight"), small.get_parameter("2.weight")) > 0


@pytest.mark.parametrize("silenced", [False, True])
def test_zeros_of_a_part_are_cut_with_it_and_stay_zero(silenced: bool) -> None:
    b = built("mlp")
    plan = plan_without(b.graph, {"0": [2, 5]}) if silenced else sparse(b.model, seed=3)
    part = tp.mask(b.model, plan)
    whole = nn.Sequential(nn.Identity(), part, nn.Linear(4, 3).double()).eval()
    # Twins in place of the weights: which entries are zero, and where each entry comes from.
    graph = tp.trace(whole, b.inputs[:1])
    later = plan_without(graph, {graph.groups[0].id: [0, 3]})
    small = tp.apply(whole, later)
    assert plan_of(small[1]) is None
    assert plan_of(whole[1]) is not None
    wanted = {name: later.cut(name, p.detach()) == 0 for name, p in whole.named_parameters()}
    assert sum(int(zero.sum()) for zero in wanted.values()) == plan_of(small).zeros > 0
    batches = list(example(24, *b.inputs.shape[1:], seed=1).split(8))
    found = tp.recover(small, batches, teacher=whole, finetune_with=tp.Finetune(epochs=1, lr=0.05))
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter == 0, wanted[name]), name
        assert gap(parameter, small.get_parameter(name)) > 0


def test_where_no_plan_is_found_masks_are_refused(mlp) -> None:
    with pytest.raises(tp.InputError, match=r"neither this Sequential nor a module in it carries a plan.*apply\(\)"):
        tp.Masks(copy.deepcopy(mlp.model))
    with pytest.raises(tp.InputError, match="neither this DataParallel"):
        tp.Masks(nn.DataParallel(mlp.model))


def test_masks_of_weights_that_are_not_there_any_more_are_refused() -> None:
    small = masked("mlp")[1]
    key = next(iter(plan_of(small).weight_masks()))
    name = key.rpartition(".")[0]
    setattr(small, name, nn.Identity())
    with pytest.raises(tp.PlanError, match=rf"the plan of 'module' masks '{key}' of shape .* and the model has none"):
        tp.Masks(nn.DataParallel(small))
    setattr(small, name, nn.Linear(2, 2))
    with pytest.raises(tp.PlanError, match=r"the plan of 'the model' masks .* the model has \(2, 2\)"):
        tp.Masks(small)


def test_a_plan_without_masks_holds_nothing(mlp) -> None:
    model = tp.apply(mlp.model, plan_without(mlp.graph, {"0": [1]}))
    state = copy.deepcopy(model.state_dict())
    model(mlp.inputs).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    for masks in (tp.Masks(model), tp.Masks(nn.DataParallel(model))):
        masks.gradients()
        masks.weights()
    assert_same_state(model.state_dict(), state)
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True))


def test_batch_norm_and_recover_leave_masks_alone() -> None:
    dense, small, batches = masked()
    found = tp.recover(small, batches, teacher=dense, batchnorm=True, finetune_with=tp.Finetune(epochs=1))
    assert sum(int((p == 0).sum()) for p in found.parameters()) == plan_of(found).zeros == plan_of(small).zeros


@pytest.mark.parametrize("groups", [1, 3])
def test_free_entries_solve_their_own_normal_equations(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    root = torch.randn(groups, 20, 12, generator=generator, dtype=torch.float64)
    a, b = root.mT @ root, torch.randn(groups, 12, 5, generator=generator, dtype=torch.float64)
    free = torch.rand(groups, 12, 5, generator=generator) < 0.6
    free[0, :, 0] = False  # nothing to solve
    b[0, :, 1] = 0
    x = solve_free(a, b, free)
    assert not bool((x[~free] != 0).any())
    for g in range(groups):
        for c in range(5):
            own = free[g, :, c]
            wanted = np.linalg.solve(a[g][own][:, own].numpy(), b[g, own, c].numpy())
            torch.testing.assert_close(x[g, own, c], torch.from_numpy(wanted), rtol=0, atol=tolerances.SOLVE)


@pytest.mark.parametrize("ridge", [1e-2, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_each_output_is_refitted_over_its_own_weights(ridge: float, bias: bool) -> None:
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4, bias=bias)))
    generator = torch.Generator().manual_seed(8)
    batches = [torch.randn(30, 5, generator=generator, dtype=torch.float64) + 0.7 for _ in range(3)]
    mask = torch.rand(4, 8, generator=generator) < 0.5
    small = tp.apply(model, tp.Plan({}, tp.weight_graph(model), {}, {"2.weight": mask}))
    found = tp.reconstruct(small, batches, model, tp.Reconstruct(ridge=ridge))
    assert not bool((found[2].weight[~mask] != 0).any())
    assert_same_state(found[0].state_dict(), small[0].state_dict())
    x = np.concatenate([outputs(small[:2], b).numpy() for b in batches])
    y = np.concatenate([outputs(model, b).numpy() for b in batches])
    middle = x.mean(0) if bias else np.zeros(8)
    variance = ((x - middle) ** 2).mean(0).mean()
    for row in range(4):
        own = mask[row].numpy()
        # The pull is a share of the mean variance of all inputs, also of those that this output lost.
        pull = ridge * variance / ((x - middle)[:, own] ** 2).mean(0).mean()
        old = small[2].bias.detach().numpy()[[row]] if bias else None
        weight = small[2].weight.detach().numpy()[[row]][:, own]
        wanted, shift = ridge_refit(x[:, own], y[:, [row]], weight, old, pull, bias)
        torch.testing.assert_close(
            found[2].weight[row, mask[row]].detach(), torch.from_numpy(wanted[0]), rtol=0, atol=tolerances.SOLVE
        )
        if bias:
            assert float(found[2].bias[row].detach()) == pytest.approx(float(shift[0]), abs=tolerances.SOLVE)


@pytest.mark.parametrize("name", ["conv_bn", "grouped", "vit", "residual"])
def test_a_refit_around_masks_comes_closer(name: str) -> None:
    b = built(name)
    small = tp.apply(b.model, sparse(b.model, 0.3))
    x = torch.randn(64, *b.inputs.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = tp.reconstruct(small, [x], b.model)
    plan = plan_of(found)
    assert sum(int((p == 0).sum()) for p in found.parameters()) == plan.zeros > 0
    wanted = outputs(b.model, x)
    errors = [float((outputs(m, x) - wanted).square().mean()) for m in (found, small)]
    assert errors[0] < 0.5 * errors[1]
    assert gap(found.get_parameter(next(iter(plan.weights))), small.get_parameter(next(iter(plan.weights)))) > 0


def test_zeros_that_had_grown_back_are_zero_again() -> None:
    dense, small, batches = masked("mlp")
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1)
    found = tp.finetune(small, batches, dense, tp.Finetune(epochs=1))
    assert sum(int((p == 0).sum()) for p in found.parameters()) == plan_of(found).zeros > 0
