"""Scores of blocks against forward-mode derivatives along the way from the block to the identity."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

import tpvprune as tp
from tests import reference, tolerances
from tests.block_cases import NAMES, BuiltBlocks, built, gone_with, skipping
from tests.helpers import assert_same_state, assert_scores_close, plan_without
from tpvprune.scoring.registry import CRITERIA

HEADS = ("logits", "softmax", "margin")


def metric_of(b: BuiltBlocks, head: str) -> Tensor:
    with torch.no_grad():
        return reference.metric(b.model(b.inputs), head)


@pytest.mark.parametrize("over", ["consume", "all"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", NAMES)
def test_exact_scores_are_those_of_the_derivative(name: str, head: str, over: str) -> None:
    b = built(name)
    scores = tp.score(b.model, [b.inputs], b.graph, tp.TPV(head=head, probes="exact", over=over))
    m = metric_of(b, head)
    for block in b.blocks:
        effect = reference.block_effect(b.model, b.inputs, block)
        each = torch.einsum("bk,bkl,bl->b", effect, m, effect)
        assert float(each.mean()) > 0
        assert float(scores.values[block]) == pytest.approx(float(each.mean()), rel=tolerances.EXACT)
        error = float(each.std() / len(each) ** 0.5)
        assert float(scores.stderr[block]) == pytest.approx(error, rel=tolerances.EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_channels_are_the_same_with_blocks_and_without(name: str) -> None:
    b = built(name)
    flat = tp.trace(b.model, b.inputs)
    if not flat.groups:
        return
    deep, alone = (tp.score(b.model, [b.inputs], g, tp.TPV(probes="exact")).values for g in (b.graph, flat))
    assert_scores_close({n: deep[n] for n in alone}, alone, tolerances.EXACT)


@pytest.mark.parametrize("name", ["stages", "vit"])
def test_probes_estimate_the_exact_score(name: str) -> None:
    b = built(name)
    one = b.inputs[:1]
    exact = tp.score(b.model, [one], b.graph, tp.TPV(probes="exact")).values
    many = [one.expand(250, *one.shape[1:])] * 4
    found = tp.score(b.model, many, b.graph, tp.TPV(probes=4, seed=5))
    for block in b.blocks:
        distance = float((found.values[block] - exact[block]).abs() / found.stderr[block])
        assert distance < tolerances.STDERRS
        assert float(found.stderr[block]) < 0.2 * float(exact[block])


@pytest.mark.parametrize("name", NAMES)
def test_what_a_small_branch_does_is_what_skipping_it_does(name: str) -> None:
    # First order is all there is where the branch is small. It is scaled by its last weights.
    b, small = built(name), 1e-4
    block = b.blocks[-1]
    model = copy.deepcopy(b.model)
    inside = dict(model.get_submodule(block).named_parameters())
    last = {"stages": ("bn2.weight", "bn2.bias"), "inverted": ("project.weight",), "mixing": ("out.weight", "out.bias")}
    if name not in last:
        last[name] = tuple(n for n in inside if n.startswith(("attn.proj", "mlp.fc2")) or n == "gamma")
    with torch.no_grad():
        for parameter in last[name]:
            inside[parameter] *= small
        moved = skipping(model, [block])(b.inputs) - model(b.inputs)
    scores = tp.score(model, [b.inputs], b.graph, tp.TPV(head="logits", probes="exact"))
    wanted = float(moved.square().sum(1).mean())
    assert float(scores.values[block]) == pytest.approx(wanted, rel=100 * small)


def outside_effect(b: BuiltBlocks, plan: tp.Plan, units: dict[str, list[int]]) -> Tensor:
    """What zeroing the units does through layers that stay, `(batch, outputs)`."""
    gone = [f"{block}." for block in b.blocks if not plan.mask(block).any()]
    parameters = dict(b.model.named_parameters())
    stay = [m.param for name in units for m in b.graph[name].of_role("consume")]
    stay = [name for name in stay if not name.startswith(tuple(gone))]
    jacobian = reference.jacobians(b.model, b.inputs, stay)
    total = torch.zeros(())
    for name, some in units.items():
        for member in b.graph[name].of_role("consume"):
            if member.param in stay:
                masks = reference.unit_masks(b.graph[name], member, parameters[member.param].detach())[some].sum(0)
                change = -masks * parameters[member.param].detach()
                total = total + jacobian[member.param].flatten(2) @ change.flatten()
    return total


@pytest.mark.parametrize("head", ["logits", "softmax"])
@pytest.mark.parametrize("name", ["stages", "inverted", "vit"])
def test_drift_of_a_plan_counts_only_what_is_still_there(name: str, head: str) -> None:
    b = built(name)
    gone = gone_with(b, b.blocks[:1], 2)
    plan = plan_without(b.graph, gone)
    value, _ = tp.TPV(head=head, probes="exact").drift(b.model, [b.inputs], plan)
    effect = reference.block_effect(b.model, b.inputs, b.blocks[0])
    effect = effect + outside_effect(b, plan, {n: units for n, units in gone.items() if n not in b.blocks})
    m = metric_of(b, head)
    wanted = float(torch.einsum("bk,bkl,bl->b", effect, m, effect).mean())
    assert value == pytest.approx(wanted, rel=tolerances.EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_drift_of_one_block_is_its_score_and_what_lies_in_it_adds_nothing(name: str) -> None:
    b = built(name)
    scores = tp.score(b.model, [b.inputs], b.graph, tp.TPV(probes="exact"))
    for block, inner in b.case.blocks.items():
        plan = plan_without(b.graph, {block: [0]})
        asked = plan_without(b.graph, {block: [0]} | {n: [0, 1] for n in inner})
        for one in (plan, asked):
            value = tp.TPV(probes="exact").drift(b.model, [b.inputs], one)[0]
            assert value == pytest.approx(float(scores.values[block]), rel=tolerances.EXACT)
            kept = scores.sensitivities.drift(one.keep)[0]
            assert kept == pytest.approx(float(scores.values[block]), rel=tolerances.FLOAT32)


def test_the_linear_part_is_the_slope_of_the_drift_along_the_way() -> None:
    b = built("stages")
    dense = skipping(b.model, ["stage1.1"])
    scores = tp.score(b.model, [b.inputs], b.graph, tp.TPV(probes="exact", reference=dense))
    place = sum(
        units for name, units in scores.sensitivities.groups[: [g.id for g in b.graph.groups].index("stage1.0")]
    )
    effect = reference.block_effect(b.model, b.inputs, "stage1.0")
    with torch.no_grad():
        slope = b.model(b.inputs).softmax(1) - dense(b.inputs).softmax(1)
    # Twice over, as half of the value is nats.
    wanted = 2 * float((slope * effect).sum(1).mean())
    assert float(scores.sensitivities.linear[place]) == pytest.approx(wanted, rel=tolerances.EXACT)


def test_blocks_alone_are_scored_too() -> None:
    # Without a tap further in, the backward pass ends at the first block.
    b = built("stages")
    alone = dataclasses.replace(b.graph, groups=tuple(g for g in b.graph.groups if g.kind == "block"))
    found = tp.score(b.model, [b.inputs], alone, tp.TPV(probes="exact")).values
    whole = tp.score(b.model, [b.inputs], b.graph, tp.TPV(probes="exact")).values
    assert_scores_close(found, {name: whole[name] for name in b.blocks}, tolerances.EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_compensated_scores_leave_blocks_as_they_are(name: str) -> None:
    b = built(name)
    plain, compensated = (
        tp.score(b.model, [b.inputs], b.graph, tp.TPV(probes="exact", compensated=yes)).values for yes in (False, True)
    )
    for group in b.graph.groups:
        same = torch.allclose(plain[group.id], compensated[group.id], rtol=tolerances.EXACT)
        assert same == (group.kind == "block")


@pytest.mark.parametrize("engine", ["batched", "per_sample", "factored"])
def test_engines_over_weights_refuse_blocks(engine: str) -> None:
    b = built("stages")
    with pytest.raises(tp.InputError, match="trace without depth=True"):
        tp.score(b.model, [b.inputs], b.graph, tp.TPV(engine=engine))
    with pytest.raises(tp.InputError, match="trace without depth=True"):
        tp.score(b.model, [b.inputs], b.graph, tp.TPV(perturbation="rounding"))


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_other_criteria_score_blocks_or_say_that_they_cannot(name: str) -> None:
    b = built("stages")
    batches = [(b.inputs, torch.tensor([0, 1, 2]))]
    if name in ("tpv", "random", "jacobian"):
        scores = tp.score(b.model, batches, b.graph, CRITERIA[name]())
        assert all(float(scores.values[block]) > 0 for block in b.blocks)
        return
    with pytest.raises(tp.InputError, match=r"block 'stage1\.0' leaves as a whole; trace without depth=True"):
        tp.score(b.model, batches, b.graph, CRITERIA[name]())


def test_jacobian_is_the_squared_slope_of_each_sample_s_loss() -> None:
    b = built("stages")
    labels = torch.tensor([2, 0, 3])
    scores = tp.score(b.model, [(b.inputs, labels)], b.graph, tp.Jacobian())
    with torch.no_grad():
        outputs = b.model(b.inputs)
    slopes = torch.stack([jacrev(lambda o, y=y: -o.log_softmax(0)[y])(o) for o, y in zip(outputs, labels, strict=True)])
    effect = reference.block_effect(b.model, b.inputs, "stage1.0")
    wanted = float((slopes * effect).sum(1).square().mean())
    assert float(scores.values["stage1.0"]) == pytest.approx(wanted, rel=tolerances.EXACT)


def test_scoring_leaves_the_model_as_it_was_and_makes_no_weight_gradient() -> None:
    b = built("vit")
    model = copy.deepcopy(b.model).train()
    state = copy.deepcopy(model.state_dict())
    tp.score(model, [b.inputs], b.graph)
    assert_same_state(model.state_dict(), state)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


def test_half_precision_is_summed_in_float32() -> None:
    b = built("stages")
    exact = tp.score(b.model, [b.inputs], b.graph, tp.TPV(probes="exact")).values
    for dtype, relative in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        model = copy.deepcopy(b.model).to(dtype)
        found = tp.score(model, [b.inputs.to(dtype)], b.graph, tp.TPV(probes="exact")).values
        for block in b.blocks:
            assert float(found[block]) == pytest.approx(float(exact[block]), rel=relative)


def test_scores_and_sensitivities_of_blocks_are_saved(tmp_path) -> None:
    b = built("stages")
    scores = tp.score(b.model, [b.inputs], b.graph)
    scores.save(tmp_path / "scores.safetensors")
    again = tp.Scores.load(tmp_path / "scores.safetensors")
    budget = tp.Budget(macs=0.6, round_to=1)
    assert tp.allocate(again, b.graph, budget).diff(tp.allocate(scores, b.graph, budget)) == {}


def test_a_graph_with_blocks_of_another_model_is_refused() -> None:
    b = built("stages")
    small = tp.apply(b.model, plan_without(b.graph, {"stage1.0": [0]}))
    with pytest.raises(tp.PlanError, match="traced from another"):
        tp.score(small, [b.inputs], b.graph)
    assert isinstance(small.stage1[0], nn.Identity)
