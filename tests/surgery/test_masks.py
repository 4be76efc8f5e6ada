"""Applying masks of weights: exact zeros, composition, files, tied and strided weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import CASES
from tests.helpers import NAMES, assert_same_state, built, gap, outputs, plan_without, random_gone
from tpvprune.plan import plan_of
from tpvprune.zoo.models import create_model

STATE = dict[str, Tensor]


def sparse(model: nn.Module, seed: int = 0, share: float = 0.5, **kwargs: object) -> tp.Plan:
    """A plan of weights from random scores of this model."""
    graph = tp.weight_graph(model)
    generator = torch.Generator().manual_seed(seed)
    values = {g.id: torch.rand(g.units, generator=generator) for g in graph.groups}
    scores = tp.Scores(values, None, "random", 1, 1, seed, graph.model_id)
    return tp.sparsify(scores, graph, **({"sparsity": share} | kwargs))


def zeroed(state: STATE, plan: tp.Plan) -> STATE:
    """Brute force: entry after entry of each masked tensor."""
    out = copy.deepcopy(state)
    for name, mask in plan.weights.items():
        flat = out[name].view(-1)
        for i, keep in enumerate(mask.flatten().tolist()):
            if not keep:
                flat[i] = 0.0
    return out


def tied(state: STATE) -> STATE:
    """The second name of a shared weight."""
    return state | ({"tied2.weight": state["tied1.weight"]} if "tied2.weight" in state else {})


@pytest.mark.parametrize("verb", [tp.apply, tp.mask])
@pytest.mark.parametrize("name", NAMES)
def test_masked_weights_are_zero_and_nothing_else_changes(name: str, verb) -> None:
    b = built(name)
    plan = sparse(b.model)
    before = copy.deepcopy(b.model.state_dict())
    masked = verb(b.model, plan)
    assert_same_state(masked.state_dict(), tied(zeroed(before, plan)))
    assert_same_state(b.model.state_dict(), before)
    assert plan_of(masked).diff(plan) == {}
    assert sum(int((p == 0).sum()) for p in masked.parameters()) == plan.zeros > 0
    assert gap(outputs(masked, b.inputs), outputs(b.model, b.inputs)) > tolerances.OTHER_FUNCTION


@pytest.mark.parametrize("name", NAMES)
def test_channels_and_weights_leave_together(name: str) -> None:
    b = built(name)
    gone = random_gone(b.graph, 0, 0.3)
    weights = sparse(b.model, 1).weights
    plan = tp.Plan(plan_without(b.graph, gone).keep, b.graph, {}, weights)
    small = tp.apply(b.model, plan)
    cut = zeroed(reference.sliced(b.model, b.graph, gone), tp.Plan({}, tp.weight_graph(small), {}, plan.weight_masks()))
    assert_same_state(small.state_dict(), tied(cut))
    assert sum(p.numel() for p in small.parameters()) == plan.params
    assert sum(int((p == 0).sum()) for p in small.parameters()) == plan.zeros
    silent = tp.mask(b.model, plan)
    masks = tp.Plan({}, b.graph, {}, plan.weights)
    zero = zeroed(reference.zeroed(b.model, b.graph, gone).state_dict(), masks)
    assert_same_state(silent.state_dict(), tied(zero))
    if all(group.exact_mask for group in b.graph.groups):
        assert gap(outputs(silent, b.inputs), outputs(small, b.inputs)) < tolerances.SAME_FUNCTION


def ways(name: str) -> list[tuple[str, tp.Plan, tp.Plan]]:
    """Two plans in turn, of every kind."""
    b = built(name)
    channels = plan_without(b.graph, random_gone(b.graph, 5, 0.3))
    small = tp.apply(b.model, channels)
    weights = sparse(b.model, 2)
    thin = tp.apply(b.model, weights)
    both = channels.compose(sparse(small, 3, 0.3))
    left = tp.trace(tp.apply(b.model, both), b.inputs)
    cuttable = {n: units for n, units in random_gone(left, 6, 0.3).items() if len(units) < left[n].units}
    return [
        ("channels, weights", channels, sparse(small, 4)),
        ("weights, weights", weights, sparse(thin, 5)),
        ("weights, channels", weights, plan_without(tp.trace(thin, b.inputs), random_gone(b.graph, 7, 0.3))),
        ("both, channels", both, plan_without(left, cuttable)),
        ("both, weights", both, sparse(tp.apply(b.model, both), 8, 0.6)),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_two_plans_in_turn_equal_their_composition(name: str) -> None:
    b = built(name)
    for what, p, q in ways(name):
        in_turn = tp.apply(tp.apply(b.model, p), q)
        both = p.compose(q)
        assert_same_state(in_turn.state_dict(), tp.apply(b.model, both).state_dict())
        carried = plan_of(in_turn)
        assert carried.diff(both) == {}, what
        assert carried.params == sum(x.numel() for x in in_turn.parameters()), what
        assert carried.zeros == sum(int((x == 0).sum()) for x in in_turn.parameters()), what
        if "channels" in what:
            assert carried.macs == tp.trace(in_turn, b.inputs).macs(), what


@pytest.mark.parametrize("verb", [tp.apply, tp.mask])
@pytest.mark.parametrize("name", ["conv_bn", "shared", "grouped", "vit"])
def test_masks_survive_files(name: str, verb, tmp_path: Path) -> None:
    b = built(name)
    plan = plan_without(b.graph, random_gone(b.graph, 0, 0.3))
    plan = plan.compose(sparse(tp.apply(b.model, plan), 1))
    masked = verb(b.model, plan)
    tp.save(masked, tmp_path)
    bones = CASES[name]().model
    with torch.no_grad():
        for parameter in bones.parameters():
            parameter.add_(1)
    back = tp.load(tmp_path, skeleton=bones)
    assert_same_state(back.state_dict(), masked.state_dict())
    assert plan_of(back).diff(plan_of(masked)) == {}
    assert plan_of(back).zeros == sum(int((p == 0).sum()) for p in back.parameters())


def test_masks_of_a_model_known_by_name_survive_files(tmp_path: Path) -> None:
    model = create_model("cifar_resnet20", args={"num_classes": 4})
    masked = tp.apply(model, sparse(model, pattern="2:4", sparsity=None))
    tp.save(masked, tmp_path)
    back = tp.load(tmp_path)
    assert_same_state(back.state_dict(), masked.state_dict())
    assert plan_of(back).sparsity == 0.5


def test_weights_that_grew_back_are_not_saved(tmp_path: Path, mlp) -> None:
    masked = tp.apply(mlp.model, sparse(mlp.model))
    with torch.no_grad():
        masked[0].weight += 1
    with pytest.raises(tp.CheckpointError, match=r"weights of '0.weight' are not zero.*Masks\(model\)"):
        tp.save(masked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    tp.Masks(masked).weights()
    tp.save(masked, tmp_path / "out")


def test_weights_that_lie_otherwise_in_memory_are_masked_too(conv_bn) -> None:
    model = copy.deepcopy(conv_bn.model).to(memory_format=torch.channels_last)
    plan = sparse(conv_bn.model)
    for verb in (tp.apply, tp.mask):
        assert_same_state(verb(model, plan).state_dict(), verb(conv_bn.model, plan).state_dict())


def test_nothing_lives_on_in_a_masked_weight(mlp) -> None:
    model = copy.deepcopy(mlp.model)
    plan = sparse(model)
    with torch.no_grad():
        model[0].weight[~plan.weights["0.weight"]] = torch.nan
    assert bool(torch.isfinite(outputs(tp.apply(model, plan), mlp.inputs)).all())


def test_other_models_are_refused(mlp, conv_bn) -> None:
    with pytest.raises(tp.PlanError, match="does not fit"):
        tp.apply(conv_bn.model, sparse(mlp.model))


def test_sparse_tensors_need_a_device_that_has_them(mlp) -> None:
    masked = tp.apply(mlp.model, sparse(mlp.model))
    with pytest.raises(tp.ModelError, match=r"on cpu.*compute capability 8\.0 or more \(Ampere\).*model\.cuda\(\)"):
        tp.to_semi_structured(masked)
    with pytest.raises(tp.ModelError, match="on cpu"):
        tp.to_semi_structured(nn.Identity())
