"""Which blocks can be skipped, what that saves, and how they compete with channels."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tests.block_cases import NAMES, BuiltBlocks, built, gone_with
from tests.cases import example, randomise
from tests.helpers import assert_same_state, plan_without
from tests.planning.test_joint import drift, made_up, places, scores_of
from tests.planning.test_trace import macs_of, params_of
from tpvprune.planning import joint
from tpvprune.planning.greedy import Ladders
from tpvprune.planning.joint import Joint
from tpvprune.planning.latency import LatencyCost, LatencyTable
from tpvprune.planning.layertimes import LayerTimes
from tpvprune.planning.widths import Cost, check_reachable, floors_of


def blocks_of(graph: tp.Graph) -> list[str]:
    return [group.id for group in graph.groups if group.kind == "block"]


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_those_a_person_sees(name: str) -> None:
    b = built(name)
    assert blocks_of(b.graph) == list(b.case.blocks)
    parameters = dict(b.model.named_parameters())
    for block, inner in b.case.blocks.items():
        group = b.graph[block]
        assert (group.units, group.exact_mask) == (1, True)
        assert set(b.graph.within(block)) == set(inner)
        assert {m.param for m in group.of_role("inside")} == {n for n in parameters if n.startswith(f"{block}.")}


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_without_depth_is_the_same_less_the_blocks(name: str) -> None:
    b = built(name)
    flat = tp.trace(b.model, b.inputs).to_json()
    assert not [g for g in flat["groups"] if g["kind"] == "block"]
    deep = b.graph.to_json()
    assert [g for g in deep["groups"] if g["kind"] != "block"] == flat["groups"]
    assert deep["skipped"] == flat["skipped"]
    assert {name: deep["shapes"][name] for name in flat["shapes"] if name != "#rest"} == {
        name: shape for name, shape in flat["shapes"].items() if name != "#rest"
    }
    assert b.graph.params() == params_of(b.model)
    assert b.graph.macs() == macs_of(copy.deepcopy(b.model), b.inputs)


def test_tracing_blocks_leaves_the_model_as_it_was() -> None:
    model = copy.deepcopy(built("stages").model).train()
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    tp.trace(model, built("stages").inputs, depth=True)
    assert_same_state(model.state_dict(), state)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


class Wrapped(nn.Module):
    """A first layer, something in the middle, and a head."""

    def __init__(self, middle: nn.Module, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.middle = first or nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU()), middle
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self.first(x)).mean((2, 3)))


class Around(nn.Module):
    """`close(x + scale * branch(x))`, the branch given and the rest chosen."""

    def __init__(self, close: str = "", scale: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.branch, self.close, self.twice = nn.Conv2d(6, 6, 3, padding=1), close, twice
        self.body = nn.Sequential(self.branch)
        self.weight = nn.Parameter(torch.ones(1)) if scale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight * x + self.body(x)
        return getattr(F, self.close)(y) if self.close else y


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Around()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x)) * 2


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(6, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x += self.body(x)
        return x


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(6, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.body(x).sigmoid()


BARE = nn.Conv2d(3, 6, 1)  # its outputs lie on both sides of zero


@pytest.mark.parametrize(
    ("middle", "first", "found"),
    [
        (Around(), None, ["middle"]),
        (Around("relu"), None, ["middle"]),
        (Around("relu6"), nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU6()), ["middle"]),
        (Around("relu"), BARE, []),  # the identity would let through what the rectifier cuts off
        (Around("silu"), None, []),  # an activation that changes all it is given
        (Around("relu6"), nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Hardtanh(-1e9, 1e9)), ["middle"]),
        (Around(scale=True), None, []),  # the path around the branch is weighted
        (Gate(), None, []),
        (nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), None, []),
        (nn.Sequential(Around(), Around()), None, ["middle.0", "middle.1"]),
        (nn.Sequential(Around()), None, ["middle.0"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value)[:30],
)
def test_only_what_gives_back_its_input_is_a_block(middle: nn.Module, first: nn.Module | None, found: list) -> None:
    model = randomise(Wrapped(copy.deepcopy(middle), copy.deepcopy(first)))
    graph = tp.trace(model, example(2, 3, 5, 5), depth=True)
    assert blocks_of(graph) == found


def test_zeros_for_an_example_find_the_same_blocks() -> None:
    b = built("stages")
    assert blocks_of(tp.trace(b.model, torch.zeros_like(b.inputs), depth=True)) == list(b.blocks)


def test_inputs_above_zero_on_the_example_alone_do_not_deceive() -> None:
    first = nn.Conv2d(3, 6, 1)
    model = Wrapped(Around("relu"), first).double()
    nn.init.constant_(first.bias, 0.5)
    small = 0.01 * example(2, 3, 5, 5)
    assert bool((first(small) > 0).all())
    assert blocks_of(tp.trace(model, small, depth=True)) == []


def test_a_branch_whose_activations_are_zero_shows_nothing() -> None:
    gate = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), Gate())
    nn.init.zeros_(gate[1].weight)
    nn.init.zeros_(gate[1].bias)
    assert blocks_of(tp.trace(Wrapped(gate).double(), example(2, 3, 5, 5), depth=True)) == []


class Accessory(nn.Module):
    """A residual block that holds a small one."""

    def __init__(self) -> None:
        super().__init__()
        self.position = Around()
        self.body = nn.Sequential(nn.Conv2d(6, 60, 3, padding=1), nn.ReLU(), nn.Conv2d(60, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.position(x)
        return x + self.body(x)


def test_of_two_blocks_one_in_the_other_the_greater_part_decides() -> None:
    graph = tp.trace(Wrapped(Accessory()).double(), example(2, 3, 5, 5), depth=True)
    assert blocks_of(graph) == ["middle"]
    graph = tp.trace(Wrapped(nn.Sequential(Accessory(), Accessory())).double(), example(2, 3, 5, 5), depth=True)
    assert blocks_of(graph) == ["middle.0", "middle.1"]


class Reads(Wrapped):
    """A model that looks into its block."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.middle.branch.weight.sum()


class Asks(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        self.asked = self.middle.twice
        return super().forward(x)


class Told(nn.Module):
    """A block that is given more than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(6, 6, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + (self.body(x) if mask is None else mask * self.body(x))


class Tells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Told()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, mask=None) * 2


def tied() -> nn.Module:
    model = Wrapped(Around())
    model.extra = nn.Conv2d(6, 6, 3, padding=1)
    model.extra.weight = model.middle.branch.weight
    return model


@pytest.mark.parametrize(
    ("model", "block", "why"),
    [
        (lambda: Wrapped(Twice()), "middle.block", "runs 2 times"),
        (lambda: Wrapped(Tells()), "middle.block", "called with more than its input"),
        (lambda: Wrapped(InPlace()), "middle", "changes its input in place"),
        (tied, "middle", "shares a parameter with a layer outside it"),
        (lambda: Reads(Around()), "middle", "does not run the same with an identity in its place"),
        (lambda: Asks(Around()), "middle", "does not run the same with an identity in its place"),
    ],
    ids=["twice", "told", "written", "tied", "reads", "asks"],
)
def test_residual_blocks_that_must_stay_are_listed_with_the_reason(model, block: str, why: str) -> None:
    graph = tp.trace(model().double(), example(2, 3, 5, 5), depth=True)
    assert blocks_of(graph) == []
    assert why in graph.skipped[block]


def test_one_block_that_must_stay_does_not_hold_the_others() -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle = nn.Conv2d(3, 6, 1), nn.Sequential(Around(), Around(), Around())
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            assert not self.middle[1].twice
            return self.fc(self.middle(self.first(x)).mean((2, 3)))

    graph = tp.trace(Some().double(), example(2, 3, 5, 5), depth=True)
    assert blocks_of(graph) == ["middle.0", "middle.2"]
    assert "identity" in graph.skipped["middle.1"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_counted_cost_is_that_of_the_model_that_comes_out(name: str, seed: int) -> None:
    b = built(name)
    some = random.Random(seed).sample(b.blocks, 1 + seed % len(b.blocks))
    for gone in ({block: [0] for block in some}, gone_with(b, some, seed)):
        plan = plan_without(b.graph, gone)
        small = tp.apply(b.model, plan)
        assert plan.params == params_of(small) < b.graph.params()
        assert plan.macs == macs_of(copy.deepcopy(small), b.inputs) < b.graph.macs()
        tensors = (*small.parameters(), *small.buffers())
        assert b.graph.cost("bytes", plan.keep) == sum(tensor.nbytes for tensor in tensors)


TIMM = {"test_resnet": 160, "test_vit": 160, "test_convnext": 64, "test_mambaout": 64, "mobilenetv2_035": 64}
SLOW = {"test_coatnet": 160, "efficientnet_b0": 64, "swin_tiny_patch4_window7_224": 224, "regnetx_002": 64}


@pytest.mark.parametrize(
    ("name", "size"), [*TIMM.items(), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW.items())]
)
def test_timm_models_without_blocks_cost_what_the_graph_says(name: str, size: int) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=7).eval()
    inputs = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    graph = tp.trace(model, inputs, depth=True)
    blocks = blocks_of(graph)
    assert blocks
    for some in (blocks[:1], blocks[::2], blocks):
        b = BuiltBlocks(None, graph)  # type: ignore[arg-type]
        for gone in ({block: [0] for block in some}, gone_with(b, some, 0)):
            plan = plan_without(graph, gone)
            small = tp.apply(model, plan)
            assert plan.params == params_of(small)
            assert plan.macs == macs_of(small, inputs)


@pytest.mark.parametrize("quantity", ["macs", "params", "bytes", "units"])
@pytest.mark.parametrize("name", NAMES)
def test_cost_kept_on_the_way_is_that_of_the_plan(name: str, quantity: str) -> None:
    b = built(name)
    for seed in range(4):
        order = list(gone_with(b, b.blocks, seed).items())
        random.Random(seed).shuffle(order)
        cost, keep = Cost(b.graph, quantity), {}
        for group, units in order:
            mask = torch.ones(b.graph[group].units, dtype=torch.bool)
            mask[units] = False
            keep[group] = mask
            wanted, before = b.graph.cost(quantity, keep), cost.total
            assert cost.saving(b.graph[group], len(units)) == before - wanted
            cost.remove(b.graph[group], len(units))
            assert cost.total == wanted
        for group, units in order:  # and back, in the same order
            del keep[group]
            cost.remove(b.graph[group], -len(units))
            assert cost.total == b.graph.cost(quantity, keep)


def test_nothing_is_saved_within_a_skipped_block_and_less_around_it() -> None:
    b = built("stages")
    cost = Cost(b.graph, "macs")
    inner, stream = b.graph["stage1.0.conv1"], b.graph["stem"]
    assert cost.saving(inner, 2) > 0
    wide = cost.saving(stream, 1)
    cost.remove(b.graph["stage1.0"], 1)
    assert cost.saving(inner, 2) == 0
    # Per position a channel of the stream is read by 4 filters of 3x3 in the block, and written by as many.
    assert wide - cost.saving(stream, 1) == 64 * (4 * 9 + 4 * 9)
    cost.remove(b.graph["stage1.0"], -1)
    assert cost.saving(stream, 1) == wide


def all_ones(graph: tp.Graph, low: tuple[str, ...]) -> tp.Scores:
    values = {g.id: torch.full((g.units,), 1e-6 if g.id in low else 1.0, dtype=torch.float64) for g in graph.groups}
    return tp.Scores(values, None, "by hand", 0, 0, 0, graph.model_id)


def test_a_cheap_block_goes_first_and_what_lies_in_it_with_it() -> None:
    b = built("stages")
    plan = tp.allocate(all_ones(b.graph, ("stage1.1",)), b.graph, tp.Budget(macs=0.8))
    assert set(plan.keep) == {"stage1.1", "stage1.1.conv1"}
    assert not plan.mask("stage1.1.conv1").any()
    assert plan.macs <= 0.8 * b.graph.macs()


def test_what_lies_in_a_skipped_block_competes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    b = built("stages")
    keep = {block: torch.zeros(1, dtype=torch.bool) for block in b.blocks}
    taken: list[str] = []
    for steps in (Ladders, Joint):
        take = steps.take
        monkeypatch.setattr(steps, "take", lambda self, name, take=take: (taken.append(name), take(self, name))[1])
    scores = scores_of(b.graph, made_up(b.graph, 0))
    low = {block: torch.full((1,), 1e-9, dtype=torch.float64) for block in b.blocks}
    for allocator in ("joint", "global"):
        taken.clear()
        one = tp.Scores(
            {**scores.values, **low}, None, "x", 0, 0, 0, b.graph.model_id, sensitivities=scores.sensitivities
        )
        with pytest.raises(tp.BudgetError) as error:
            tp.allocate(one, b.graph, tp.Budget(macs=2), allocator=allocator)
        floor = int(str(error.value).split("the floor is ")[1].split(" ")[0].replace(",", ""))
        assert floor < b.graph.macs(keep)
        tp.allocate(one, b.graph, tp.Budget(macs=floor), allocator=allocator)
        for block in b.blocks:
            assert not set(b.graph.within(block)) & set(taken[taken.index(block) :])


@pytest.mark.parametrize("allocator", ["joint", "global"])
def test_blocks_that_stay_change_no_plan(allocator: str) -> None:
    b = built("stages")
    flat, blocks = tp.trace(b.model, b.inputs), tuple(b.blocks)
    inputs = [example(20, *b.inputs.shape[1:], seed=seed) for seed in (2, 3)]
    for share in (0.8, 0.5):
        budget = tp.Budget(macs=share, round_to=1)
        held = dataclasses.replace(budget, per_group=dict.fromkeys(blocks, budget.min_keep))
        deep, alone = (tp.score(b.model, inputs, graph) for graph in (b.graph, flat))
        plans = [
            tp.allocate(deep, b.graph, held, allocator=allocator),
            tp.allocate(alone, flat, dataclasses.replace(held, per_group={}), allocator=allocator),
        ]
        assert set(plans[0].keep) == set(plans[1].keep)
        assert all(torch.equal(mask, plans[1].mask(name)) for name, mask in plans[0].keep.items())


@pytest.mark.parametrize("pattern", ["stage1.1", "stage1.*", "stage1.1.conv1", "stage1.1.bn2", "re:stage1.*conv2"])
def test_what_protects_a_layer_protects_the_block_around_it(pattern: str) -> None:
    b = built("stages")
    budget = tp.Budget(macs=0.8, protect=(pattern,))
    assert floors_of(b.graph, budget)["stage1.1"] == 1
    plan = tp.allocate(all_ones(b.graph, ("stage1.1",)), b.graph, budget)
    assert plan.mask("stage1.1").all()
    assert floors_of(b.graph, tp.Budget(macs=0.8, protect=("stem", "fc")))["stage1.1"] == 0
    assert floors_of(b.graph, tp.Budget(macs=0.8, per_group={pattern: 0.5}))["stage1.1"] == 1


def test_the_floor_is_what_is_left_without_any_block() -> None:
    b = built("stages")
    budget = tp.Budget(params=2)
    with pytest.raises(tp.BudgetError) as error:
        check_reachable(b.graph, budget)
    flat = tp.trace(b.model, b.inputs)
    with pytest.raises(tp.BudgetError) as higher:
        check_reachable(flat, budget)
    floors = [int(str(e.value).split("the floor is ")[1].split(" ")[0].replace(",", "")) for e in (error, higher)]
    keep = {block: torch.zeros(1, dtype=torch.bool) for block in b.blocks}
    assert floors[0] < floors[1]
    assert floors[0] < b.graph.params(keep)


@pytest.mark.parametrize("allocator", ["joint", "global"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.25])
@pytest.mark.parametrize("name", ["stages", "inverted", "vit", "convnext"])
def test_plans_with_blocks_keep_the_budget(name: str, share: float, allocator: str) -> None:
    b = built(name)
    scores = scores_of(b.graph, made_up(b.graph, 3))
    for quantity in ("macs", "params", "units"):
        plan = tp.allocate(scores, b.graph, tp.Budget(**{quantity: share}), allocator=allocator)
        assert b.graph.cost(quantity, plan.keep) <= share * b.graph.cost(quantity)
        assert plan.macs == macs_of(tp.apply(b.model, plan), b.inputs)


@pytest.mark.parametrize("allocator", ["joint", "global"])
@pytest.mark.parametrize("name", ["stages", "vit"])
def test_the_drift_a_plan_says_is_that_of_what_is_still_there(name: str, allocator: str) -> None:
    b = built(name)
    scores = tp.score(b.model, [example(20, *b.inputs.shape[1:], seed=2)], b.graph)
    for share in (0.6, 0.4, 0.3):
        budget = tp.Budget(macs=share, round_to=1)
        plan = tp.allocate(scores, b.graph, budget, allocator=allocator, shrinkage=0.0)
        wanted = scores.sensitivities.drift(plan.keep)[0]
        if allocator == "global":
            lost = b.graph.lost({group: ~mask for group, mask in plan.keep.items()})
            left = {group: mask for group, mask in plan.keep.items() if group not in lost}
            wanted = sum(float(scores.values[group][~mask].sum()) for group, mask in left.items())
        assert plan.made_by["predicted_kl"] == pytest.approx(wanted / 2, rel=1e-3)
    within_bound = tp.allocate(scores, b.graph, tp.Budget(drift=wanted / 4, round_to=1), allocator=allocator)
    assert within_bound.made_by["predicted_kl"] <= wanted / 4


@pytest.mark.parametrize("allocator", ["uniform", "isomorphic"])
def test_shares_of_groups_are_no_way_to_choose_blocks(allocator: str) -> None:
    b = built("stages")
    scores = all_ones(b.graph, ())
    with pytest.raises(tp.BudgetError, match=r"block 'stage1\.0' goes whole or stays"):
        tp.allocate(scores, b.graph, tp.Budget(macs=0.7), allocator=allocator)
    budget = tp.Budget(macs=0.7, round_to=1, per_group=dict.fromkeys(b.blocks, 0.1))
    plan = tp.allocate(scores, b.graph, budget, allocator=allocator)
    assert all(plan.mask(block).all() for block in b.blocks)


def test_milliseconds_of_a_skipped_block_are_those_of_its_layers() -> None:
    b = built("stages")
    weights = [n for n, p in b.model.named_parameters() if p.ndim == 4]
    layers = {
        name.removesuffix(".weight"): LayerTimes(
            ((name, 0), (name, 1)), ((1, rows), (1, columns)), (1.0, 2.0 + place, 3.0 + place, 5.0 + 2 * place)
        )
        for place, name in enumerate(weights)
        for rows, columns in [b.graph.shapes[name][:2]]
    }
    table = LatencyTable(layers, 7.0, b.graph.model_id, {})
    cost, keep = LatencyCost(b.graph, table), dict[str, torch.Tensor]()
    order = list(gone_with(b, b.blocks, 0).items())
    random.Random(4).shuffle(order)
    for name, units in order:
        mask = torch.ones(b.graph[name].units, dtype=torch.bool)
        mask[units] = False
        keep[name] = mask
        cost.remove(b.graph[name], len(units))
        sizes = b.graph.sizes(keep)
        left = [layers[n.removesuffix(".weight")].at(*sizes[n][:2]) for n in weights if sizes[n] != (0,)]
        assert cost.total == pytest.approx(7.0 + sum(left))
    assert len(left) < len(weights)


def within(graph: tp.Graph, gone: list[int], spans: dict[str, list[int]]) -> set[int]:
    """Columns of what lies in the blocks among `gone`."""
    blocks = [g.id for g in graph.groups if g.kind == "block" and spans[g.id][0] in gone]
    return {column for block in blocks for name in graph.within(block) for column in spans[name]}


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("small", [0, 10**9])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["stages", "vit"])
def test_joint_steps_add_what_the_drift_grows_by(
    name: str, seed: int, small: int, shrinkage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the drift of the whole plan, in which a skipped block stands for all that lies in it."""
    monkeypatch.setattr(joint, "SMALL", small)
    monkeypatch.setattr(joint, "FRESH", 10**9)
    graph = built(name).graph
    known, spans = made_up(graph, seed), places(graph)
    widths = {g.id: list(range(g.units, -1 if g.kind == "block" else 0, -1)) for g in graph.groups}
    steps, gone, closed = Joint(graph, widths, known, shrinkage), list[int](), set[str]()

    def total(gone: list[int]) -> float:
        return drift(known, [c for c in gone if c not in within(graph, gone, spans)], shrinkage)

    order = random.Random(seed)
    skipped = 0
    while saving := {n: 7 for n in widths if steps.next_units(n) and n not in closed}:
        # Any group may be next, not the best alone: blocks come with nothing, some or much of them gone.
        some = [n for n in saving if (graph[n].kind == "block") == (order.random() < 0.1)]
        pick = order.choice(some or list(saving))
        best, added = steps.best({pick: 7})
        assert best == pick
        before = total(gone)
        gone += [spans[pick][unit] for unit in steps.take(pick).tolist()]
        closed.update(graph.within(pick))
        assert added == pytest.approx(total(gone) - before, rel=1e-3, abs=1e-3)
        skipped += graph[pick].kind == "block"
    assert skipped == len(blocks_of(graph))


def test_the_global_ladder_takes_back_what_a_block_no_longer_loses() -> None:
    b = built("stages")
    scores = all_ones(b.graph, ())
    values = {**scores.values, "stage1.0.conv1": torch.tensor([0.1, 0.2, 1.0, 9.0]).double()}
    values |= {"stage1.0": torch.tensor([9.0]).double()}
    widths = {g.id: list(range(g.units, -1 if g.kind == "block" else 0, -1)) for g in b.graph.groups}
    steps = Ladders(b.graph, widths, tp.Scores(values, None, "by hand", 0, 0, 0, b.graph.model_id))
    for spent in (0.0, 0.1, 0.3, 1.3):
        assert steps.best({"stage1.0": 2})[1] == pytest.approx(9.0 - spent)
        if steps.next_units("stage1.0.conv1"):
            steps.take("stage1.0.conv1")


def test_graphs_with_blocks_are_saved_and_loaded(tmp_path) -> None:
    for name in NAMES:
        graph = built(name).graph
        graph.save(tmp_path / "graph.json")
        again = tp.Graph.load(tmp_path / "graph.json")
        assert again.to_json() == graph.to_json()
        assert {b: again.within(b) for b in blocks_of(again)} == {b: graph.within(b) for b in blocks_of(graph)}


def test_a_latency_table_is_made_with_blocks() -> None:
    for name in ("stages", "mixing", "vit"):
        b = built(name)
        table = tp.latency_table(b.model, b.graph, b.inputs)
        plan = plan_without(b.graph, {b.blocks[0]: [0]})
        cost = LatencyCost(b.graph, table)
        whole = cost.total
        cost.remove(b.graph[b.blocks[0]], 1)
        assert cost.total < whole
        assert plan.macs < b.graph.macs()
        assert not [layer for layer in table.layers if layer.endswith("#rest")]


def test_products_outside_of_layers_leave_with_their_block() -> None:
    b = built("mixing")
    # Two products of 5 x 6 by 6 x 5 and 5 x 5 by 5 x 6 a block.
    assert (b.graph.reuse["a#product"], b.graph.shapes["a#product"]) == (2 * 5 * 5, (6,))
    assert "#rest" not in b.graph.reuse
