"""Arguments of another kind than a verb takes: told by the parameter, before anything runs."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests.helpers import assert_same_state
from tpvprune.kinds import as_verb


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


MODEL = network()
BATCH = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
GRAPH = tp.trace(MODEL, BATCH)
SCORES = tp.score(MODEL, [BATCH], GRAPH)
BUDGET = tp.Budget(units=0.5)
PLAN = tp.allocate(SCORES, GRAPH, BUDGET)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: tp.score(MODEL, [BATCH], None),
            r"score: graph takes a Graph, which tp\.trace.* given is None",
        ),
        (
            lambda: tp.score("resnet18", [BATCH], GRAPH),
            "score: model takes a Module.* of type str",
        ),
        (
            lambda: tp.allocate(GRAPH, SCORES, BUDGET),
            r"allocate: scores takes a Scores, .*score.* of type Graph",
        ),
        (lambda: tp.allocate(SCORES, GRAPH, 0.5), r"allocate: budget takes a Budget, such as tp\.Budget\(macs=0\.5\)"),
        (lambda: tp.allocate(SCORES, GRAPH, BUDGET, after=BUDGET), "allocate: after takes a Plan.* of type Budget"),
        (lambda: tp.prune(MODEL, [BATCH], 0.5), "prune: budget takes a Budget.* of type float"),
        (lambda: tp.apply(PLAN, MODEL), "apply: model takes a Module.* of type Plan"),
        (lambda: tp.mask(MODEL, PLAN.keep), "mask: plan takes a Plan.* of type dict"),
        (lambda: tp.finetune(MODEL, [BATCH], MODEL, settings={"epochs": 1}), r"settings takes a Finetune, such as Fin"),
        (lambda: tp.reconstruct(MODEL, [BATCH], MODEL, settings=tp.Reconstruct), "is the class Reconstruct"),
        (lambda: tp.analysis.tpv("resnet18", [BATCH], PLAN), "tpv: model takes a Module"),
    ],
)
def test_what_is_no_such_thing_is_told(call, message: str) -> None:
    with pytest.raises(tp.InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (BATCH, r"batch by batch: for a single one, batches=\[batch\]; what was given is of type Tensor"),
        ("images", "as a DataLoader gives them; what was given is of type str"),
        (GRAPH, "given is of type Graph"),
        (MODEL, "given is of type Sequential"),
        (None, "given is None"),
        (3, "given is of type int"),
    ],
)
def test_what_is_no_batches_is_told(given, message: str) -> None:
    with pytest.raises(tp.DataError, match=message):
        tp.score(MODEL, given, GRAPH)


class OneAtATime:
    """Gone through by number alone, as torch's datasets are."""

    def __getitem__(self, number: int) -> torch.Tensor:
        return [BATCH[:2], BATCH[2:]][number]


def test_batches_may_be_whatever_can_be_gone_through() -> None:
    loader = torch.utils.data.DataLoader(BATCH, batch_size=2)
    for batches in ([BATCH], (BATCH,), iter([BATCH]), (b for b in [BATCH]), loader, OneAtATime()):
        assert tp.score(MODEL, batches, GRAPH).samples == 4


WEIGHTS = tp.weight_graph(MODEL)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tp.weight_graph(MODEL, layers="0"), r"weight_graph: layers='0' is one string; .* layers=\['0'\]"),
        (lambda: tp.sparsify(tp.score(MODEL, [], WEIGHTS, tp.L1()), WEIGHTS, protect="0"), "protect='0' is one string"),
        (lambda: tp.sensitivity(MODEL, [BATCH], GRAPH, SCORES, shares=0.5), r"shares=0\.5 is one number; give a list"),
        (lambda: tp.analysis.tpv(MODEL, [BATCH], PLAN, parameters="0.weight"), "tpv: parameters='0.weight' is one str"),
        (lambda: tp.analysis.weight_energies(MODEL, [BATCH], "0.weight"), r"weight_energies: names='0\.weight' is one"),
        (lambda: tp.weight_graph(MODEL, layers=None), "weight_graph: layers takes a list; what was given is None"),
        (lambda: tp.weight_graph(MODEL, layers=MODEL[0].weight.sum), "takes a list; what was given is of type builtin"),
    ],
)
def test_one_name_or_number_where_several_are_taken_is_told(call, message: str) -> None:
    with pytest.raises(tp.InputError, match=message):
        call()


def test_several_may_be_whatever_can_be_gone_through() -> None:
    for layers in (["0"], ("0",), {"0"}, {"0": 1}.keys(), iter(["0"])):
        assert [group.id for group in tp.weight_graph(MODEL, layers=layers).groups] == ["0.weight"]


def test_arguments_that_are_missing_are_pythons_to_tell() -> None:
    with pytest.raises(TypeError, match=r"score\(\) missing 2 required positional arguments"):
        tp.score(MODEL)
    with pytest.raises(TypeError, match=r"score\(\) got an unexpected keyword argument 'grpah'"):
        tp.score(MODEL, [BATCH], grpah=GRAPH)


def test_verbs_keep_their_names_and_signatures() -> None:
    assert tp.allocate.__name__ == "allocate"
    assert list(inspect.signature(tp.score).parameters)[:3] == ["model", "batches", "graph"]


def test_only_classes_are_asked_for() -> None:
    @as_verb
    def verb(a: tp.Plan | None, b: str | tp.Plan, c: int, d: tp.scoring.criteria.Criterion) -> None:
        pass

    verb(None, 3, "x", None)
    with pytest.raises(tp.InputError, match="verb: a takes a Plan"):
        verb(3, 3, "x", None)


def test_verbs_that_take_a_graph_scores_or_a_budget_all_look() -> None:
    verbs = [getattr(place, name) for place in (tp, tp.analysis) for name in place.__all__]
    verbs = [verb for verb in verbs if inspect.isfunction(verb)]
    asks = [v for v in verbs if {"graph", "budget", "plan", "batches"} & set(inspect.signature(v).parameters)]
    assert len(asks) >= 20
    assert [v.__name__ for v in asks if not hasattr(v, "__wrapped__")] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (GRAPH, "Graph(6 units in 1 groups; 38 parameters, 30 multiply-adds; 1 layers stay whole)"),
        (GRAPH["0"], "Group('0', channel, 6 units, 3 members)"),
        (PLAN, "Plan(3 of 6 units leave; 20 parameters, 15 multiply-adds stay)"),
        (
            tp.Plan({}, GRAPH, weights={"0.weight": torch.eye(6, 3, dtype=torch.bool)}),
            "Plan(0 of 6 units leave; 15 w",
        ),
    ],
)
def test_what_is_printed_is_a_line(value: object, text: str) -> None:
    assert repr(value).startswith(text)


def test_scores_and_what_is_pruned_are_printed_in_a_line() -> None:
    scores = tp.score(MODEL, [BATCH], GRAPH, tp.TPV(sensitivities=4))
    assert repr(scores) == f"Scores(6 units in 1 groups by {scores.criterion}, 4 samples, with sensitivities)"
    assert repr(scores.sensitivities) == f"Sensitivities(6 units, 4 samples, {len(scores.sensitivities.rows)} rows)"
    pruned = tp.prune(MODEL, [BATCH], BUDGET)
    assert repr(pruned) == f"Pruned(Sequential, {pruned.plan!r})"


MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
def test_what_the_caller_has_switched_off_changes_nothing(mode: str) -> None:
    def work() -> tuple[tp.Pruned, nn.Module, nn.Module]:
        pruned = tp.prune(MODEL, [BATCH], BUDGET, finetune_with=tp.Finetune(epochs=1, lr=0.01))
        return pruned, tp.refine(pruned.model, [BATCH], MODEL), tp.fold_means(pruned.model, [BATCH], MODEL)

    wanted = work()
    with MODES[mode]():
        found = work()
        assert not torch.is_grad_enabled()
    assert found[0].plan.to_json() == wanted[0].plan.to_json()
    for one, other in zip((found[0].model, *found[1:]), (wanted[0].model, *wanted[1:]), strict=True):
        assert_same_state(one.state_dict(), other.state_dict())
    found[0].model(BATCH).sum().backward()  # what comes out can be trained


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_that_is_loaded_where_gradients_are_off_can_be_trained(mode: str, tmp_path: Path) -> None:
    tp.save(tp.apply(MODEL, PLAN), tmp_path)
    with MODES[mode]():
        small = tp.load(tmp_path, skeleton=network())
    small(BATCH).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
