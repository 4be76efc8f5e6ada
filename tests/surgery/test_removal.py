"""Removing, masking and composing, against slices taken by hand."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests import reference, tolerances
from tests.cases import example, randomise
from tests.helpers import NAMES, assert_same_state, built, gap, outputs, plan_without, random_gone
from tpvprune.plan import plan_of

SEEDS = (0, 1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_removal_slices_what_the_members_say(name: str, seed: int) -> None:
    b = built(name)
    gone = random_gone(b.graph, seed)
    small = tp.apply(b.model, plan_without(b.graph, gone))
    assert_same_state(small.state_dict(), reference.sliced(b.model, b.graph, gone))
    assert outputs(small, b.inputs).shape == outputs(b.model, b.inputs).shape


@pytest.mark.parametrize("name", NAMES)
def test_masking_zeroes_what_reads_the_units(name: str) -> None:
    b = built(name)
    gone = random_gone(b.graph, 0)
    masked = tp.mask(b.model, plan_without(b.graph, gone))
    assert_same_state(masked.state_dict(), reference.zeroed(b.model, b.graph, gone).state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_mask_equals_removal_where_the_group_says_so_and_only_there(name: str) -> None:
    b = built(name)
    for group in b.graph.groups:
        gone = {group.id: random_gone(b.graph, 4)[group.id]}
        plan = plan_without(b.graph, gone)
        removed = outputs(tp.apply(b.model, plan), b.inputs)
        masked = outputs(tp.mask(b.model, plan), b.inputs)
        assert gap(removed, outputs(b.model, b.inputs)) > tolerances.OTHER_FUNCTION, group.id
        if group.exact_mask:
            assert gap(removed, masked) < tolerances.SAME_FUNCTION, group.id
        else:
            assert gap(removed, masked) > tolerances.OTHER_FUNCTION, group.id


@pytest.mark.parametrize("name", NAMES)
def test_every_single_unit_can_leave(name: str) -> None:
    b = built(name)
    for group in b.graph.groups:
        for unit in {0, group.units // 2, group.units - 1}:
            plan = plan_without(b.graph, {group.id: [unit]})
            small = tp.apply(b.model, plan)
            assert_same_state(small.state_dict(), reference.sliced(b.model, b.graph, {group.id: [unit]}))
            if group.exact_mask:
                masked = reference.zeroed(b.model, b.graph, {group.id: [unit]})
                assert gap(outputs(small, b.inputs), outputs(masked, b.inputs)) < tolerances.SAME_FUNCTION


@pytest.mark.parametrize("name", NAMES)
def test_groups_may_leave_in_any_order(name: str) -> None:
    b = built(name)
    gone = random_gone(b.graph, 2)
    at_once = tp.apply(b.model, plan_without(b.graph, gone))
    for order in (list(gone), list(gone)[::-1]):
        small = b.model
        for group in order:
            # A plan for what is left speaks of the model as it is now, so it is traced again.
            graph = tp.trace(small, b.inputs)
            small = tp.apply(small, plan_without(graph, {group: gone[group]}))
        assert_same_state(small.state_dict(), at_once.state_dict())
        carried = plan_of(small)
        assert carried.diff(plan_of(at_once)) == {}
        assert carried.graph.model_id == b.graph.model_id
        assert gap(outputs(small, b.inputs), outputs(at_once, b.inputs)) < tolerances.SAME_FUNCTION


def halves(name: str) -> tuple[tp.Plan, tp.Plan]:
    """A plan, and a second one for the model that the first leaves."""
    b = built(name)
    first = plan_without(b.graph, random_gone(b.graph, 5, 0.3))
    later = tp.trace(tp.apply(b.model, first), b.inputs)
    gone = {n: units for n, units in random_gone(later, 6, 0.3).items() if len(units) < later[n].units}
    return first, plan_without(later, gone)


@pytest.mark.parametrize("name", NAMES)
def test_two_plans_in_turn_equal_their_composition(name: str) -> None:
    b = built(name)
    p, q = halves(name)
    in_turn = tp.apply(tp.apply(b.model, p), q)
    at_once = tp.apply(b.model, p.compose(q))
    assert_same_state(in_turn.state_dict(), at_once.state_dict())
    assert plan_of(in_turn).diff(p.compose(q)) == {}
    assert gap(outputs(in_turn, b.inputs), outputs(at_once, b.inputs)) < tolerances.SAME_FUNCTION


@pytest.mark.parametrize("name", ["residual", "vit"])
def test_composition_is_associative(name: str) -> None:
    b = built(name)
    p, q = halves(name)
    third = tp.trace(tp.apply(tp.apply(b.model, p), q), b.inputs)
    r = plan_without(third, {third.groups[0].id: [0]})
    assert p.compose(q).compose(r).diff(p.compose(q.compose(r))) == {}


@pytest.mark.parametrize("verb", [tp.apply, tp.mask])
@pytest.mark.parametrize("name", ["conv_bn", "vit"])
def test_the_model_given_is_untouched(name: str, verb) -> None:
    b = built(name)
    model = copy.deepcopy(b.model).train()
    next(model.parameters()).requires_grad_(False)
    state, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    small = verb(model, plan_without(b.graph, random_gone(b.graph, 0)))
    assert_same_state(model.state_dict(), state)
    assert [p.requires_grad for p in model.parameters()] == flags == [p.requires_grad for p in small.parameters()]
    assert small.training
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert_same_state(model.state_dict(), state)
    assert plan_of(model) is None


@pytest.mark.parametrize("name", NAMES)
def test_layers_say_their_new_widths(name: str) -> None:
    b = built(name)
    small = tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 0)))
    for module in small.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.modules.conv._ConvNd):
            widths = (module.out_channels, module.in_channels // module.groups)
            turned = (module.in_channels, module.out_channels // module.groups)
            assert module.weight.shape[:2] == (turned if module.transposed else widths)
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            assert module.weight.shape == (module.num_features,)
        elif isinstance(module, nn.LayerNorm):
            assert module.weight.shape == module.normalized_shape
        elif isinstance(module, nn.GroupNorm):
            assert module.weight.shape == (module.num_channels,)
        elif isinstance(module, nn.PReLU):
            assert module.weight.shape == (module.num_parameters,)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_over_the_last_dimension_shrink(norm: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 6), norm(6), nn.Linear(6, 3)).eval()
    graph = tp.trace(model, torch.randn(2, 4))
    small = tp.apply(model, plan_without(graph, {"0": [1, 4]}))
    assert small[1].normalized_shape == (4,)
    assert small(torch.randn(2, 4)).shape == (2, 3)
    assert not graph["0"].exact_mask


def test_an_embedding_shrinks() -> None:
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3)).double()
    tokens = torch.tensor([[0, 3, 8], [1, 2, 2]])
    graph = tp.trace(model, tokens)
    plan = plan_without(graph, {"0": [0, 5]})
    small = tp.apply(model, plan)
    assert (small[0].embedding_dim, small[0].num_embeddings) == (4, 9)
    assert gap(outputs(small, tokens), outputs(tp.mask(model, plan), tokens)) < tolerances.SAME_FUNCTION


@pytest.mark.parametrize("verb", [tp.apply, tp.mask])
def test_a_plan_of_another_model_is_refused(mlp, conv_bn, verb) -> None:
    plan = plan_without(mlp.graph, {"0": [1]})
    with pytest.raises(tp.PlanError, match=r"'0.weight' should be \(8, 6\), it is missing"):
        verb(conv_bn.model, plan)
    with pytest.raises(tp.PlanError, match="does not know parameter"):
        verb(nn.Sequential(*mlp.model, nn.Linear(4, 4)), plan)
    with pytest.raises(tp.PlanError, match="use the model the plan was traced from"):
        verb(tp.apply(mlp.model, plan), plan)


def test_an_empty_plan_changes_nothing(residual) -> None:
    for keep in ({}, {g.id: torch.ones(g.units, dtype=torch.bool) for g in residual.graph.groups}):
        same = tp.apply(residual.model, tp.Plan(keep, residual.graph))
        assert_same_state(same.state_dict(), residual.model.state_dict())


def test_kept_entries_are_those_of_every_group_of_a_tensor() -> None:
    b = built("concat")
    for left, right in itertools.product(([0], [1, 3]), ([0], [2, 4])):
        plan = plan_without(b.graph, {"left": left, "right": right})
        wanted = [i for i in range(9) if i not in left and i - 4 not in right]
        assert plan.kept_entries("join.weight", 1).tolist() == wanted
        assert plan.kept_entries("join.weight", 0).tolist() == list(range(6))


class Remembers(nn.Linear):
    """Keeps something that follows from its width in a way of its own, and a number that does not count units."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3)
        self.damping, self.code = width**-0.5, f"width {width}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.damping


def test_layers_that_are_registered_are_set_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpvprune.layers._REGISTERED", {})
    model = randomise(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Remembers(8)))
    graph = tp.trace(model, example(2, 5))
    plan = plan_without(graph, {"0": [1, 2, 6]})
    assert (tp.apply(model, plan)[2].damping, tp.apply(model, plan)[2].code) == (8**-0.5, "width 8")

    def anew(layer: Remembers) -> None:
        layer.damping, layer.code = layer.in_features**-0.5, f"width {layer.in_features}"

    tp.register_layer(Remembers, anew)
    small = tp.apply(model, plan)
    assert (small[2].damping, small[2].code) == (5**-0.5, "width 5")
    assert model[2].damping == 8**-0.5
    with pytest.raises(tp.errors.InputError, match="give the class of the layer"):
        tp.register_layer(model[2], anew)  # type: ignore[arg-type]
