"""Plans in several steps: one plan in the end, scored again in between, gone on with after a stop."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tpvprune as tp
from tests import tolerances
from tests.cases import example
from tests.helpers import assert_same_state, built, gap, outputs
from tpvprune import schedule, stepping
from tpvprune.plan import drift_of, plan_of
from tpvprune.refits import Refits
from tpvprune.report import Answers, compare
from tpvprune.stepping import drift_told

NETS = ("mlp", "conv_bn", "residual", "vit", "grouped")


SHRINKAGE = 0.4  # where it is not said, it is chosen by measuring


def batches(name: str, count: int = 2) -> list[torch.Tensor]:
    return list(example(8 * count, *built(name).inputs.shape[1:], seed=3).split(8))


def by_hand(name: str, criterion: Any, budget: tp.Budget, shares: list[float]) -> torch.nn.Module:
    """The loop over the verbs that a schedule stands for, with bounds written out."""
    b = built(name)
    small, plan = b.model, None
    for share in shares:
        now = tp.trace(small, batches(name)[0][:1])
        again = criterion if plan is None else dataclasses.replace(criterion, reference=b.model)
        scores = tp.score(small, batches(name), now, again)
        limit = dataclasses.replace(budget, macs=int(share * b.graph.macs() + 1e-6))
        small = tp.apply(small, tp.allocate(scores, now, limit, after=plan, shrinkage=SHRINKAGE))
        plan = plan_of(small)
    return small


@pytest.mark.parametrize(
    ("spacing", "shares"), [("linear", [0.9, 0.8, 0.7]), ("geometric", [0.7 ** (1 / 3), 0.7 ** (2 / 3), 0.7])]
)
@pytest.mark.parametrize("name", NETS)
def test_a_schedule_is_the_loop_over_the_verbs(name: str, spacing: Any, shares: list[float]) -> None:
    b, budget = built(name), tp.Budget(macs=0.7, round_to=1, min_keep=0.2)
    planning = tp.Planning(steps=3, spacing=spacing, shrinkage=SHRINKAGE)
    plan = tp.plan_for(b.model, batches(name), b.graph, budget, criterion=tp.TPV(seed=4), planning=planning)
    wanted = by_hand(name, tp.TPV(seed=4), budget, shares)
    assert_same_state(tp.apply(b.model, plan).state_dict(), wanted.state_dict())
    assert plan.macs <= 0.7 * b.graph.macs()
    assert plan.graph is b.graph
    assert [step["got"]["macs"] for step in plan.made_by["steps"]] == sorted(
        (step["got"]["macs"] for step in plan.made_by["steps"]), reverse=True
    )
    assert plan.made_by["steps"][-1]["got"]["macs"] == plan.macs
    assert plan.made_by["asked"] == {"macs": int(0.7 * b.graph.macs() + 1e-6)}
    for group in b.graph.groups:  # floors are of the dense model
        assert int(plan.mask(group.id).sum()) >= 0.2 * group.units


def test_one_step_is_a_plain_plan(residual) -> None:
    budget = tp.Budget(macs=0.7, round_to=1)
    scores = tp.score(residual.model, batches("residual"), residual.graph)
    plan = tp.plan_for(residual.model, batches("residual"), residual.graph, budget)
    assert plan.to_json() == tp.allocate(scores, residual.graph, budget).to_json()
    given = tp.plan_for(residual.model, [], residual.graph, budget, scores=scores)
    assert given.diff(plan) == {}


def test_what_did_not_change_is_not_scored_again() -> None:
    b, told = built("mlp"), list[tuple[int, int | None]]()

    def progress(stage: str, done: int, total: int | None) -> None:
        if stage == "score":
            told.append((done, total))

    budget, planning = tp.Budget(drift=1e-12, round_to=1), tp.Planning(steps=3)
    plan = tp.plan_for(b.model, batches("mlp"), b.graph, budget, planning=planning, progress=progress)
    assert plan.removed == 0
    assert len(told) == len(set(told)) == len(batches("mlp"))


def test_a_criterion_without_nats_is_told_before_it_scores_under_a_drift() -> None:
    b = built("mlp")
    for steps in (1, 2):
        with pytest.raises(tp.PlanError, match="needs scores in nats, and jbr gives none"):
            tp.plan_for(
                b.model,
                batches("mlp"),
                b.graph,
                tp.Budget(drift=0.1),
                criterion=tp.JBR(),
                planning=tp.Planning(steps=steps),
                progress=lambda *told: pytest.fail("scored"),
            )


def test_steps_may_differ_from_one_step() -> None:
    # Otherwise the tests above could not tell a second scoring from none.
    name, found = "residual", set()
    for steps in (1, 4):
        plan = tp.plan_for(
            built(name).model, batches(name), built(name).graph, tp.Budget(macs=0.5, round_to=1, min_keep=0.01),
            planning=tp.Planning(steps=steps),
        )  # fmt: skip
        found.add(str(plan.to_json()["keep"]))
    assert len(found) == 2


@pytest.mark.parametrize("most", [0.005, 0.02])
def test_a_drift_is_held_against_what_was_measured(most: float) -> None:
    b, data = built("residual"), batches("residual", 4)
    plan = tp.plan_for(
        b.model, data, b.graph, tp.Budget(drift=most, round_to=1, min_keep=0.01), planning=tp.Planning(steps=6)
    )
    assert plan.removed
    p, q = (outputs(model, torch.cat(data)).log_softmax(1) for model in (b.model, tp.apply(b.model, plan)))
    measured = float((p.exp() * (p - q)).sum(1).mean())
    # The last step alone is predicted, so that first order has little room to be wrong.
    assert 0.2 * most < measured < 1.5 * most
    assert plan.made_by["predicted_kl"] <= most
    last = plan.made_by["steps"][-1]["measured_kl"]
    before = [step["measured_kl"] for step in plan.made_by["steps"][1:-1]]
    assert 0 < last <= most
    assert max(before) <= most


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["residual", "mlp"])
def test_a_drift_is_that_of_other_samples_too(name: str, steps: int) -> None:
    b, data = built(name), batches(name, 4)
    budget = tp.Budget(drift=0.05, round_to=1, min_keep=0.01)
    plan = tp.plan_for(b.model, data, b.graph, budget, planning=tp.Planning(steps=steps))
    told = plan.made_by
    assert plan.removed
    assert told["measured_kl"] == pytest.approx(kl_by_hand(name, plan, data), rel=tolerances.FLOAT32, abs=1e-7)
    assert told["optimism"] > 0
    assert told["measured_kl"] + told["optimism"] <= 0.05
    assert drift_of(told) == told["measured_kl"] + told["optimism"]
    if steps == 1:  # what it expects of others is what `allocate` does
        scores = tp.score(b.model, data, b.graph)
        again = tp.allocate(scores, b.graph, tp.Budget(macs=plan.macs, round_to=1, min_keep=0.01), cross_validated=True)
        assert again.made_by["optimism"] == pytest.approx(told["optimism"], rel=0.5)


def test_a_cost_that_drifts_too_far_on_other_samples_is_refused() -> None:
    b, data = built("residual"), batches("residual")
    budget = tp.Budget(macs=0.6, drift=1.0, round_to=1)
    told = tp.plan_for(b.model, data, b.graph, budget).made_by
    between = told["measured_kl"] + 0.5 * told["optimism"]
    match = r"step 1 of 1 the drift measured .* and [\d.]+ more are expected on others"
    with pytest.raises(tp.BudgetError, match=match):
        tp.plan_for(b.model, data, b.graph, dataclasses.replace(budget, drift=between))


def test_what_cannot_be_measured_is_predicted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    b, data = built("mlp"), batches("mlp", 4)
    budget = tp.Budget(drift=0.05, round_to=1)
    once = tp.plan_for(b.model, iter(data), b.graph, budget)
    scores = tp.score(b.model, data, b.graph)
    assert once.to_json() == tp.allocate(scores, b.graph, budget).to_json()
    given = tp.plan_for(b.model, [], b.graph, budget, scores=scores)
    assert given.to_json() == once.to_json()
    assert ["not measured" in record.message for record in caplog.records] == [True, True]
    assert once.made_by["predicted_kl"] <= 0.05
    assert "measured_kl" not in once.made_by
    caplog.clear()
    tp.plan_for(b.model, data, b.graph, budget)
    assert not caplog.records


class Named(torch.nn.Module):
    """Gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = built("mlp").model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.inner(x), "more": x}


class Squeezed(Named):
    """Loses the batch where it is of one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).squeeze()


def test_scores_of_an_output_that_is_not_named_again_are_predicted_by(caplog: pytest.LogCaptureFixture) -> None:
    model, data, budget = Named(), batches("mlp", 4), tp.Budget(drift=0.05, round_to=1)
    graph, criterion = tp.trace(model, data[0][:1]), tp.TPV(output="logits")
    scores = tp.score(model, data, graph, criterion)
    plan = tp.plan_for(model, data, graph, budget, scores=scores)
    assert plan.removed
    assert "measured_kl" not in plan.made_by
    assert any("not measured" in record.message for record in caplog.records)
    assert "measured_kl" in tp.plan_for(model, data, graph, budget, scores=scores, criterion=criterion).made_by


def test_drift_is_measured_on_whole_batches() -> None:
    model, data = Squeezed(), batches("mlp", 4)
    plan = tp.plan_for(model, data, tp.trace(model, data[0][:2]), tp.Budget(drift=0.05, round_to=1))
    assert plan.removed
    assert plan.made_by["measured_kl"] > 0


@pytest.mark.parametrize("steps", [1, 2])
def test_a_pruned_model_gets_a_plan_of_its_own(steps: int) -> None:
    b, data = built("mlp"), batches("mlp", 4)
    small = tp.apply(b.model, tp.allocate(tp.score(b.model, data, b.graph), b.graph, tp.Budget(macs=0.7, round_to=1)))
    graph = tp.trace(small, data[0][:1])
    plan = tp.plan_for(small, data, graph, tp.Budget(drift=0.1, round_to=1), planning=tp.Planning(steps=steps))
    assert plan.removed
    assert plan.graph.model_id == graph.model_id
    assert sum(p.numel() for p in tp.apply(small, plan).parameters()) == plan.params < graph.params()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_plan_of_nothing_says_what_was_asked(steps: int) -> None:
    b, data = built("mlp"), batches("mlp")
    budget, planning = tp.Budget(drift=0.05, min_keep=1.0), tp.Planning(steps=steps)
    plan = tp.plan_for(b.model, data, b.graph, budget, planning=planning)
    assert plan.removed == 0
    assert plan.made_by["asked"] == {"drift": 0.05}
    assert drift_of(plan.made_by) == 0


def test_a_step_that_is_left_out_keeps_what_those_before_expect_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    b, data = built("mlp"), batches("mlp", 4)
    budget, planning = tp.Budget(drift=0.05, round_to=1, min_keep=0.01), tp.Planning(steps=2)
    first = tp.plan_for(b.model, data, b.graph, dataclasses.replace(budget, drift=0.025)).made_by
    real, second = schedule._measured, list[bool]()

    def measured(*args: Any, **kwargs: Any) -> float:  # whatever the second step takes is too much
        return 1.0 if second else real(*args, **kwargs)

    def progress(stage: str, done: int, total: int | None) -> None:
        if (stage, done) == ("plan", 1):
            second.append(True)

    monkeypatch.setattr(schedule, "_measured", measured)
    told = tp.plan_for(b.model, data, b.graph, budget, planning=planning, progress=progress).made_by
    assert first["optimism"] > 0
    assert [step["measured_kl"] for step in told["steps"]] == pytest.approx([first["measured_kl"]] * 2)
    for key in ("measured_kl", "optimism"):
        assert told[key] == pytest.approx(first[key])
    assert told["predicted_kl"] == pytest.approx(first["measured_kl"] + first["optimism"])


def test_one_step_leaves_no_plan_that_another_budget_would_go_on_with(tmp_path: Path) -> None:
    b, data, save = built("mlp"), batches("mlp", 4), tmp_path / "plan.json"
    plans = [
        tp.plan_for(b.model, data, b.graph, tp.Budget(drift=drift, round_to=1), save=save) for drift in (0.02, 0.5)
    ]
    assert plans[0].macs > plans[1].macs
    assert not save.exists()


def test_one_step_under_drift_shows_how_far_it_is() -> None:
    b, told = built("mlp"), list[tuple[str, int, int | None]]()
    tp.plan_for(
        b.model, batches("mlp", 4), b.graph, tp.Budget(drift=0.05, round_to=1), progress=lambda *what: told.append(what)
    )
    stages = list(dict.fromkeys(stage for stage, *_ in told))
    assert stages == ["plan", "score", "allocate", "eval"]
    assert max(done for stage, done, _ in told if stage == "eval") == 4
    assert told[-1] == ("plan", 1, 1)


def test_what_a_plan_under_drift_was_held_at_is_told_with_its_parts() -> None:
    b, data = built("mlp"), batches("mlp", 4)
    plan = tp.plan_for(b.model, data, b.graph, tp.Budget(drift=0.05, round_to=1))
    told, by = drift_told(plan), plan.made_by
    assert list(told) == ["drift", "measured_kl", "optimism"]
    assert told["drift"] == pytest.approx(by["measured_kl"] + by["optimism"], rel=1e-3)
    assert told["measured_kl"] == pytest.approx(kl_by_hand("mlp", plan, data), rel=1e-3)
    assert 0 < told["optimism"] < told["drift"] <= 0.05
    assert drift_told(tp.plan_for(b.model, data, b.graph, tp.Budget(macs=0.8, round_to=1))) == {}
    unmeasured = tp.plan_for(b.model, iter(data), b.graph, tp.Budget(drift=0.05, round_to=1))
    assert drift_told(unmeasured)["drift"] == pytest.approx(unmeasured.made_by["predicted_kl"], rel=1e-3)


def kl_by_hand(name: str, plan: tp.Plan, data: list[torch.Tensor]) -> float:
    b = built(name)
    p, q = (outputs(model, torch.cat(data)).log_softmax(1) for model in (b.model, tp.apply(b.model, plan)))
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("most", [0.005, 0.03, 0.1])
@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("name", ["residual", "conv_bn", "vit", "mlp"])
def test_no_step_measures_more_than_its_share_of_the_drift(name: str, steps: int, most: float) -> None:
    b, data = built(name), batches(name)
    budget = tp.Budget(drift=most, round_to=1, min_keep=0.01)
    plan = tp.plan_for(b.model, data, b.graph, budget, planning=tp.Planning(steps=steps))
    measured = kl_by_hand(name, plan, data)
    assert measured <= most
    assert plan.made_by["measured_kl"] == pytest.approx(measured, rel=tolerances.FLOAT32, abs=1e-7)
    for number, step in enumerate(plan.made_by["steps"], 1):
        assert step["measured_kl"] <= most * number / steps + 1e-12
    assert plan.made_by["steps"][-1]["measured_kl"] == plan.made_by["measured_kl"]
    assert plan.made_by["predicted_kl"] >= 0


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("name", ["conv_bn", "vit"])  # the others reach their floors before
def test_steps_taken_again_use_what_they_may(name: str, steps: int) -> None:
    b, data = built(name), batches(name)
    budget = tp.Budget(drift=0.1, round_to=1, min_keep=0.01)
    plan = tp.plan_for(b.model, data, b.graph, budget, planning=tp.Planning(steps=steps))
    assert kl_by_hand(name, plan, data) <= 0.1
    assert 0.4 * 0.1 <= drift_of(plan.made_by) <= 0.1


@pytest.mark.parametrize("budget", [{"drift": 0.1}, {"macs": 0.6, "drift": 0.5}], ids=str)
@pytest.mark.parametrize("name", ["residual", "conv_bn"])
def test_where_steps_are_refitted_the_refitted_model_is_measured(name: str, budget: dict[str, float]) -> None:
    b, data = built(name), batches(name)
    planning = tp.Planning(steps=3, refit=True)
    plan = tp.plan_for(b.model, data, b.graph, tp.Budget(**budget, round_to=1), planning=planning)
    assert plan.removed
    # Each half of every batch is measured by what the other half gives.
    halves = [[x[::2] for x in data], [x[1::2] for x in data]]
    kls = []
    for mine, other in (halves, halves[::-1]):
        refitted = tp.reconstruct(tp.apply(b.model, plan), mine, b.model)
        p, q = (outputs(model, torch.cat(other)).log_softmax(1) for model in (b.model, refitted))
        kls.append((p.exp() * (p - q)).sum(1))
    measured = float(torch.cat(kls).mean())
    assert plan.made_by["measured_kl"] == pytest.approx(measured, rel=tolerances.FLOAT32, abs=1e-7)
    assert measured <= budget["drift"]
    assert "optimism" not in plan.made_by  # it was not measured on what the refits were made of


@pytest.mark.parametrize("name", ["residual", "vit"])  # the others have too few units to come near
def test_refitted_steps_use_their_bound_and_hold_it_on_other_samples(name: str) -> None:
    b, most = built(name), 0.02
    data, others = (
        [example(24, *b.inputs.shape[1:], seed=seed) for seed in seeds] for seeds in (range(2), range(50, 60))
    )
    planning, budget = tp.Planning(steps=2, refit=True), tp.Budget(drift=most, round_to=1, min_keep=0.01)
    plan = tp.plan_for(b.model, data, b.graph, budget, planning=planning)
    refitted = tp.reconstruct(tp.apply(b.model, plan), data, b.model)
    seen, true = (compare({"now": refitted}, b.model, images)[0]["now"]["kl"] for images in (data, others))
    assert true <= 1.2 * most
    assert plan.made_by["measured_kl"] > seen
    assert 0.5 * most <= plan.made_by["measured_kl"] <= most


def test_samples_are_read_once_for_both_halves() -> None:
    class Shuffled:
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            self.passes += 1
            every = torch.cat(data)
            yield every[torch.randperm(len(every), generator=torch.Generator().manual_seed(self.passes))]

    b, data, order = built("mlp"), batches("mlp", 4), Shuffled()
    plan = tp.allocate(tp.score(b.model, data, b.graph), b.graph, tp.Budget(macs=0.7, round_to=1))
    found = Refits(Answers(b.model), order, None, None).drift(plan)
    assert order.passes == 1
    every = torch.cat(data)[torch.randperm(len(torch.cat(data)), generator=torch.Generator().manual_seed(1))]
    assert found == pytest.approx(Refits(Answers(b.model), [every], None, None).drift(plan), rel=1e-9)
    assert Refits(Answers(b.model), [every[:1]], None, None).drift(plan) is None


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("name", ["residual", "conv_bn", "vit", "mlp"])
def test_a_cost_and_a_drift_in_steps_are_a_promise_or_an_error(name: str, steps: int) -> None:
    b, data, refused = built(name), batches(name), list[tuple[str, str]]()
    for macs, most in ((0.7, 0.03), (0.5, 0.1), (0.4, 0.003), (0.3, 1e-4)):
        budget = tp.Budget(macs=macs, drift=most, round_to=1, min_keep=0.01)
        try:
            plan = tp.plan_for(b.model, data, b.graph, budget, planning=tp.Planning(steps=steps))
        except tp.BudgetError as error:
            refused.append((f"macs={macs}, drift={most}", str(error)))
            continue
        assert plan.macs <= macs * b.graph.macs()
        assert kl_by_hand(name, plan, data) <= most
    assert 0 < len(refused) < 4
    for asked, said in refused:  # in the numbers that were asked, whatever a step was to keep to
        assert asked in said
        assert f"of {steps}" in said


def test_a_drift_that_is_measured_above_the_bound_is_refused_and_what_was_scored_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, data, save = built("residual"), batches("residual"), tmp_path / "plan.json"
    budget, planning = tp.Budget(macs=0.5, drift=0.1, round_to=1), tp.Planning(steps=2, shrinkage=SHRINKAGE)
    whole = tp.plan_for(b.model, data, b.graph, budget, planning=planning)
    with monkeypatch.context() as patched:
        found = iter([0.04, 0.2])
        patched.setattr(schedule, "_measured", lambda *args, **kwargs: next(found))
        match = (
            r"macs=0\.5, drift=0\.1 .* after step 2 of 2 the drift .* 0\.2 nats.*, with macs [\d,]+ \(\d+\.\d%\); allow"
        )
        with pytest.raises(tp.BudgetError, match=match):
            tp.plan_for(b.model, data, b.graph, budget, planning=planning, save=save)
    assert len(tp.Plan.load(save).made_by["steps"]) == 1
    counted = Stopping()
    again = tp.plan_for(b.model, data, b.graph, budget, planning=planning, save=save, progress=counted)
    assert counted.batches == 0
    assert again.diff(whole) == {}


def shuffled(data: list[torch.Tensor]) -> list[torch.Tensor]:
    every = torch.cat(data)
    return list(every[torch.randperm(len(every), generator=torch.Generator().manual_seed(5))].split(5))


def other_weights(model: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(model)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    return model


BLOCK = built("residual")
BEGUN: dict[str, dict[str, Any]] = {  # what is changed of a plan's arguments, and how that is told
    "another budget": {"budget": tp.Budget(macs=0.5, round_to=1)},
    "another criterion": {"criterion": tp.TPV(seed=7)},
    "another way of planning": {"planning": tp.Planning(steps=3)},
    "other weights": {"model": other_weights(BLOCK.model)},
    "other images": {"batches": batches("residual")[:1]},
    "another graph": {"graph": dataclasses.replace(BLOCK.graph, groups=BLOCK.graph.groups[:-1])},
    "other scores": {"scores": tp.score(BLOCK.model, batches("residual"), BLOCK.graph, tp.L1())},
}


@pytest.mark.parametrize("differs", BEGUN)
def test_a_state_is_gone_on_with_for_the_same_plan_alone(differs: str, tmp_path: Path) -> None:
    data, save = batches("residual"), tmp_path / "plan.json"
    given: dict[str, Any] = {"model": BLOCK.model, "batches": data, "graph": BLOCK.graph}
    given |= {"budget": tp.Budget(macs=0.8, round_to=1), "planning": tp.Planning(steps=2)}
    given["scores"] = tp.score(BLOCK.model, data, BLOCK.graph)
    whole = tp.plan_for(**given, save=save)
    same: list[dict[str, Any]] = [{}, {"batches": shuffled(data)}, {"scores": None}]
    for change in same:
        assert tp.plan_for(**(given | change), save=save).to_json() == whole.to_json()
    before = save.read_bytes()
    told = rf"plan\.json holds a plan that was begun with .*{differs}.*; give another file, delete it"
    with pytest.raises(tp.PlanError, match=told):
        tp.plan_for(**(given | BEGUN[differs]), save=save)
    assert save.read_bytes() == before


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_schedule_goes_on_where_it_was(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    b, data, save = built("residual"), batches("residual"), tmp_path / "plan.json"
    budget, planning = tp.Budget(macs=0.6, round_to=1), tp.Planning(steps=3)
    whole = tp.plan_for(b.model, data, b.graph, budget, planning=planning)

    def tell(stage: str, done: int, total: int | None) -> None:
        if (stage, done) == ("plan", stop):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tp.plan_for(b.model, data, b.graph, budget, planning=planning, save=save, progress=tell)
    assert len(tp.Plan.load(save).made_by["steps"]) == stop
    scored: list[int] = []
    real = schedule.score

    def counted(*args: Any, **kwargs: Any) -> tp.Scores:
        scored.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(schedule, "score", counted)
    again = tp.plan_for(b.model, data, b.graph, budget, planning=planning, save=save)
    assert again.to_json() == whole.to_json()
    assert len(scored) == 3 - stop


class Stopping:
    """Progress that interrupts a scoring after `after` batches, the nth one of a run; counts the batches scored."""

    def __init__(self, scoring: int = 0, after: int = 0) -> None:
        self.stop, self.scorings, self.batches = (scoring, after), 0, 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if stage != "score":
            return
        self.scorings += done == 1
        self.batches += 1
        if (self.scorings, done) == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("planning", [tp.Planning(), tp.Planning(steps=3), tp.Planning(steps=3, refit=True)], ids=str)
@pytest.mark.parametrize("criterion", [tp.TPV(seed=4), tp.TPV(compensated=True), tp.Wanda()], ids=lambda c: c.label)
def test_a_schedule_stopped_within_a_step_goes_on_with_the_batches_of_it(
    planning: tp.Planning, criterion: Any, tmp_path: Path
) -> None:
    b, data, save = built("residual"), batches("residual", 4), tmp_path / "plan.json"
    budget, last = tp.Budget(macs=0.6, round_to=1), planning.steps
    given: dict[str, Any] = {"criterion": criterion, "planning": planning}
    whole = tp.plan_for(b.model, data, b.graph, budget, **given)
    with pytest.raises(KeyboardInterrupt):
        tp.plan_for(b.model, data, b.graph, budget, **given, save=save, progress=Stopping(last, 3))
    (kept,) = set(tmp_path.iterdir()) - {save}
    assert kept.name.startswith(f"plan.json.step{last}-1-")
    done = tp.Scores.load(kept).manifest["batches"]
    assert 0 < done < 4
    counted = Stopping()
    again = tp.plan_for(b.model, data, b.graph, budget, **given, save=save, progress=counted)
    assert again.to_json() == whole.to_json()
    assert counted.batches == 4 - done
    assert set(tmp_path.iterdir()) == ({save} if last > 1 else set())


def test_a_schedule_stopped_after_a_scoring_does_not_score_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b, data, save = built("residual"), batches("residual"), tmp_path / "plan.json"
    budget, planning, real = tp.Budget(macs=0.6, round_to=1), tp.Planning(steps=2), stepping.allocate
    whole = tp.plan_for(b.model, data, b.graph, budget, planning=planning)

    def second(*args: Any, **kwargs: Any) -> tp.Plan:
        if kwargs["after"] is not None:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(stepping, "allocate", second)
    with pytest.raises(KeyboardInterrupt):
        tp.plan_for(b.model, data, b.graph, budget, planning=planning, save=save)
    monkeypatch.setattr(stepping, "allocate", real)
    counted = Stopping()
    again = tp.plan_for(b.model, data, b.graph, budget, planning=planning, save=save, progress=counted)
    assert again.to_json() == whole.to_json()
    assert counted.batches == 0


def test_zeros_of_another_plan_are_scored_anew(tmp_path: Path) -> None:
    b, data, save = built("mlp"), batches("mlp", 4), tmp_path / "plan.json"
    scores = tp.score(b.model, data, b.graph)
    plans = [tp.allocate(scores, b.graph, tp.Budget(macs=share, round_to=1)) for share in (0.6, 0.8)]
    asked = {"sparsity": 0.5}
    wanted = [schedule.hold_zeros(b.model, plan, data, tp.TPV(), asked) for plan in plans]
    with pytest.raises(KeyboardInterrupt):
        schedule.hold_zeros(b.model, plans[0], data, tp.TPV(), asked, Stopping(1, 3), save=save)
    (kept,) = tmp_path.iterdir()
    done = tp.Scores.load(kept).manifest["batches"]
    other, same = Stopping(), Stopping()
    assert (
        schedule.hold_zeros(b.model, plans[1], data, tp.TPV(), asked, other, save=save).to_json() == wanted[1].to_json()
    )
    assert (
        schedule.hold_zeros(b.model, plans[0], data, tp.TPV(), asked, same, save=save).to_json() == wanted[0].to_json()
    )
    assert 0 < done < 4
    assert (other.batches, same.batches) == (4, 4 - done)


def test_several_bounds_hold_after_several_steps(residual) -> None:
    budget = tp.Budget(macs=0.8, params=0.7, round_to=1)
    plan = tp.plan_for(residual.model, batches("residual"), residual.graph, budget, planning=tp.Planning(steps=3))
    assert plan.macs <= 0.8 * residual.graph.macs()
    assert plan.params <= 0.7 * residual.graph.params()


def test_an_unreachable_budget_is_refused_before_any_scoring(residual) -> None:
    with pytest.raises(tp.BudgetError, match="the floor is"):
        tp.plan_for(residual.model, [object()], residual.graph, tp.Budget(macs=0.001), planning=tp.Planning(steps=2))


@pytest.mark.parametrize("criterion", [tp.L1(), tp.JBR(confidence=0.0), tp.TPV(compensated=True), tp.Random()])
def test_every_criterion_takes_steps(criterion: Any) -> None:
    b, data = built("residual"), batches("residual")
    plan = tp.plan_for(
        b.model, data, b.graph, tp.Budget(macs=0.7, round_to=1), criterion=criterion, planning=tp.Planning(steps=2)
    )
    assert plan.macs <= 0.7 * b.graph.macs()
    small = tp.apply(b.model, plan)
    assert gap(outputs(small, data[0]), outputs(tp.mask(b.model, plan), data[0])) < tolerances.SAME_FUNCTION


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"spacing": "square"}, "spacing='square'"),
        ({"allocator": "best"}, "allocator='best'"),
        ({"per": "dollars"}, "per='dollars'"),
        ({"shrinkage": 2}, "shrinkage=2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(tp.BudgetError, match=match):
        tp.Planning(**kwargs)


def test_a_generator_cannot_be_read_once_a_step(mlp) -> None:
    with pytest.raises(tp.DataError, match="every step reads them"):
        tp.plan_for(mlp.model, (x for x in batches("mlp")), mlp.graph, tp.Budget(macs=0.7), planning=tp.Planning(2))


def refitted_by_hand(name: str, criterion: Any, budget: tp.Budget, shares: list[float], data: Any) -> tp.Plan:
    """The loop over the verbs, what is left refitted from the dense weights after every step."""
    b = built(name)
    small, plan = b.model, None
    for share in shares:
        now = tp.trace(small, batches(name)[0][:1])
        again = criterion if plan is None else dataclasses.replace(criterion, reference=b.model)
        scores = tp.score(small, batches(name), now, again)
        limit = dataclasses.replace(budget, macs=int(share * b.graph.macs() + 1e-6))
        plan = plan_of(tp.apply(small, tp.allocate(scores, now, limit, after=plan)))
        assert plan is not None
        small = tp.reconstruct(tp.apply(b.model, plan), data, b.model, tp.Reconstruct(ridge=0.05))
    assert plan is not None
    return plan


@pytest.mark.parametrize("name", ["conv_bn", "residual", "vit"])
@pytest.mark.parametrize("other", [False, True])
def test_what_is_left_is_refitted_between_steps_if_asked(name: str, other: bool) -> None:
    b, budget = built(name), tp.Budget(macs=0.5, round_to=1, min_keep=0.01)
    data = [example(16, *b.inputs.shape[1:], seed=9)] if other else batches(name)
    plan = tp.plan_for(
        b.model, batches(name), b.graph, budget, criterion=tp.TPV(seed=4), planning=tp.Planning(steps=3, refit=True),
        refit_with=tp.Reconstruct(ridge=0.05), refit_batches=data if other else None,
    )  # fmt: skip
    wanted = refitted_by_hand(name, tp.TPV(seed=4), budget, [1 - 0.5 / 3, 1 - 1 / 3, 0.5], data)
    assert plan.diff(wanted) == {}
    assert plan.macs <= 0.5 * b.graph.macs()


def test_refits_change_what_leaves() -> None:
    # Otherwise the test above could not tell a refit from none.
    found = set()
    for refit in (False, True):
        plan = tp.plan_for(
            built("residual").model, batches("residual"), built("residual").graph,
            tp.Budget(macs=0.5, round_to=1, min_keep=0.01), criterion=tp.TPV(compensated=True),
            planning=tp.Planning(steps=4, refit=refit),
        )  # fmt: skip
        found.add(str(plan.to_json()["keep"]))
    assert len(found) == 2


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_schedule_with_refits_goes_on_to_the_same_plan(stop: int, tmp_path: Path) -> None:
    b, data, save = built("residual"), batches("residual"), tmp_path / "plan.json"
    budget, planning = tp.Budget(macs=0.6, round_to=1), tp.Planning(steps=3, refit=True)
    whole = tp.plan_for(b.model, data, b.graph, budget, planning=planning)

    def tell(stage: str, done: int, total: int | None) -> None:
        if (stage, done) == ("plan", stop):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tp.plan_for(b.model, data, b.graph, budget, planning=planning, save=save, progress=tell)
    again = tp.plan_for(b.model, data, b.graph, budget, planning=planning, save=save)
    assert again.to_json() == whole.to_json()


def test_a_refit_without_steps_is_refused() -> None:
    with pytest.raises(tp.BudgetError, match="refit=True is for plans in steps"):
        tp.Planning(refit=True)


def test_several_processes_that_refit_between_steps_are_asked_for_the_same_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    b = built("mlp")
    monkeypatch.setattr(schedule, "process", lambda: (0, 2))
    monkeypatch.setattr(schedule, "of_all", lambda mine: [mine])
    with pytest.raises(tp.BudgetError, match="give refit_batches, the same in all of them"):
        tp.plan_for(b.model, batches("mlp"), b.graph, tp.Budget(macs=0.6), planning=tp.Planning(steps=2, refit=True))
