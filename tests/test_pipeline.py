from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests.helpers import assert_same_state, built, outputs
from tpvprune.plan import attach, plan_of
from tpvprune.surgery.removal import refitted


def batches(name: str, count: int = 3, seed: int = 0) -> list[torch.Tensor]:
    shape = built(name).inputs.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, *shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("name", ["mlp", "residual", "vit", "grouped"])
def test_prune_is_its_verbs_in_order(name: str) -> None:
    b, data, budget = built(name), batches(name), tp.Budget(macs=0.6)
    model, rng = copy.deepcopy(b.model).train(), torch.get_rng_state()
    result = tp.prune(model, data, budget)
    assert_same_state(model.state_dict(), b.model.state_dict())
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    scores = tp.score(b.model, data, b.graph, tp.TPV(compensated=True, probes=8))
    plan = tp.allocate(scores, b.graph, budget)
    by_hand = tp.reconstruct(tp.apply(b.model, plan), data, b.model)
    assert result.plan.diff(plan) == {}
    assert_same_state(result.model.state_dict(), by_hand.state_dict())
    assert plan_of(result.model).macs <= 0.6 * b.graph.macs()
    assert all(torch.equal(result.scores.values[g], v) for g, v in scores.values.items())


@pytest.mark.parametrize("name", ["mlp", "residual", "vit"])
@pytest.mark.parametrize("planning", [None, tp.Planning(steps=2, refit=True)])
def test_a_pruned_model_is_pruned_as_if_it_were_the_dense_one(
    name: str, planning: tp.Planning | None, tmp_path: Path
) -> None:
    b, data = built(name), batches(name)
    once = tp.prune(b.model, data, tp.Budget(macs=0.8, round_to=1)).model
    bare = copy.deepcopy(once)
    attach(bare, None)
    before = plan_of(once)
    found, wanted = (tp.prune(m, data, tp.Budget(macs=0.7, round_to=1), planning=planning) for m in (once, bare))
    assert wanted.plan.removed
    assert {g: m.tolist() for g, m in found.plan.keep.items()} == {g: m.tolist() for g, m in wanted.plan.keep.items()}
    assert_same_state(found.model.state_dict(), wanted.model.state_dict())
    assert plan_of(once) is before
    whole = plan_of(found.model)
    assert whole.graph.shapes == b.graph.shapes
    assert whole.diff(before.compose(found.plan)) == {}
    tp.save(found.model, tmp_path / "twice")
    again = tp.load(tmp_path / "twice", skeleton=b.model)
    assert torch.equal(outputs(again, b.inputs), outputs(found.model, b.inputs))


def test_zeros_of_a_model_that_was_pruned_before_stay_zero() -> None:
    b, data = built("mlp"), batches("mlp")
    weight = [name for name in b.graph.parameters if name.endswith("weight")][-1]
    masks = {weight: torch.rand(b.graph.shapes[weight], generator=torch.Generator().manual_seed(0)) > 0.5}
    held = tp.apply(b.model, tp.Plan({}, b.graph, weights=masks))
    result = tp.prune(held, data, tp.Budget(macs=0.6, round_to=1))
    zero = ~plan_of(result.model).weight_masks()[weight]
    refitted = result.model.get_parameter(weight)
    assert int(zero.sum()) > 0.3 * refitted.numel()
    assert bool((refitted[zero] == 0).all())
    assert bool((refitted[~zero] != 0).all())
    assert not torch.equal(refitted, tp.apply(held, result.plan).get_parameter(weight))


def test_a_refit_that_fails_leaves_the_model_its_plan() -> None:
    b, data = built("mlp"), batches("mlp")
    once = tp.apply(b.model, tp.allocate(tp.score(b.model, data, b.graph), b.graph, tp.Budget(macs=0.8, round_to=1)))
    graph = tp.trace(once, b.inputs)
    plan = tp.allocate(tp.score(once, data, graph), graph, tp.Budget(macs=0.8, round_to=1))
    small = tp.apply(once, plan)
    whole = plan_of(small)

    def fail(model: nn.Module) -> nn.Module:
        assert plan_of(model) is not whole
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        refitted(small, once, plan, fail)
    assert plan_of(small) is whole
    with pytest.raises(tp.PlanError, match=r"not the dense original.*give the model that was pruned first"):
        tp.reconstruct(small, data, once)


def test_without_a_refit_units_are_judged_together_as_they_are() -> None:
    b, data, budget = built("residual"), batches("residual"), tp.Budget(macs=0.6)
    result = tp.prune(b.model, data, budget, reconstruct_with=None)
    plan = tp.allocate(tp.score(b.model, data, b.graph, tp.TPV(probes=8)), b.graph, budget, allocator="joint")
    assert result.plan.diff(plan) == {}
    assert result.plan.made_by["allocator"] == "joint"


def test_samples_whose_number_nothing_tells_are_probed_once() -> None:
    class Streamed:
        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(data)

    b, data, budget = built("mlp"), batches("mlp"), tp.Budget(macs=0.6)
    result = tp.prune(b.model, Streamed(), budget)
    once = tp.score(b.model, data, b.graph, tp.TPV(compensated=True))
    assert all(torch.equal(result.scores.values[g], v) for g, v in once.values.items())


def test_models_that_return_more_than_a_tensor_are_pruned_by_the_part_that_counts() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> dict[str, object]:
            return {"logits": self.inner(x), "hidden": (x,)}

    b, data, budget = built("mlp"), batches("mlp"), tp.Budget(macs=0.7, round_to=1)
    tuning = tp.Finetune(epochs=1, lr=1e-3)
    torch.manual_seed(0)
    bare = tp.prune(b.model, data, budget, finetune_with=tuning)
    torch.manual_seed(0)
    wrapped = tp.prune(Wrapped(b.model), data, budget, output="logits", finetune_with=tuning)
    torch.testing.assert_close(wrapped.model(data[0])["logits"], bare.model(data[0]))
    assert wrapped.report.recovered.metrics == pytest.approx(bare.report.recovered.metrics)
    with pytest.raises(tp.ModelError, match="'logits', 'hidden'"):
        tp.prune(Wrapped(b.model), data, budget)


def test_the_report_says_what_was_asked_and_what_came_out() -> None:
    b, data = built("residual"), batches("residual")
    labelled = [(x, outputs(b.model, x).argmax(1)) for x in batches("residual", 2, seed=5)]
    result = tp.prune(b.model, data, tp.Budget(params="70%"), held_out=labelled)
    report = result.report
    bound = int(0.7 * b.graph.params())
    assert report.asked == {"params": {"as_written": "70%", "at_most": bound}}
    assert report.got["params"]["value"] == sum(p.numel() for p in result.model.parameters()) <= bound
    assert report.got["params"]["share"] == pytest.approx(report.got["params"]["value"] / b.graph.params())
    assert (report.before.params, report.before.macs) == (b.graph.params(), b.graph.macs())
    assert report.pruned.params == report.recovered.params == result.plan.params
    assert report.before.metrics == {"kl": 0.0, "agreement": 1.0, "top1": 1.0}
    assert report.recovered.metrics["kl"] < report.pruned.metrics["kl"]
    assert report.data == {"scored": 24, "measured_on": "held-out batches", "measured": 16}
    assert set(report.seconds) == {"trace", "score", "plan", "apply", "recover", "eval"}
    x = torch.cat([batch for batch, _ in labelled])
    p, q = outputs(b.model, x).log_softmax(1), outputs(result.model, x).log_softmax(1)
    assert report.drift["recovered_kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-9)
    wanted = tp.TPV(probes=8).drift(b.model, labelled, result.plan)[0] / 2
    assert report.drift["predicted_kl"] == pytest.approx(wanted, rel=1e-9)
    assert json.loads(json.dumps(report.to_json()))["format"] == 2


def test_labels_of_scoring_batches_are_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    b = built("mlp")
    data, budget = [(x, torch.full((8,), 3)) for x in batches("mlp")], tp.Budget(macs=0.6)
    assert set(tp.prune(b.model, data, budget).report.before.metrics) == {"kl", "agreement"}
    assert "top1" in tp.prune(b.model, data, budget, held_out=data).report.before.metrics
    numbered = [(x, torch.arange(8)) for x in batches("mlp")]
    assert set(tp.prune(b.model, data, budget, held_out=numbered).report.before.metrics) == {"kl", "agreement"}
    assert "no top-1 is told, because label 7 is none of the model's 4 classes" in caplog.text


def test_stages_can_be_left_out_or_added() -> None:
    b, data = built("mlp"), batches("mlp")
    bare = tp.prune(b.model, data, tp.Budget(macs=0.6), reconstruct_with=None)
    assert bare.report.recovered is None
    assert bare.report.drift["recovered_kl"] is None
    assert_same_state(bare.model.state_dict(), tp.apply(b.model, bare.plan).state_dict())
    tuned = tp.prune(b.model, data, tp.Budget(macs=0.6), finetune_with=tp.Finetune(epochs=1))
    assert "top1" not in tuned.report.before.metrics
    stages: list[str] = []
    logits = tp.TPV(head="logits")
    plain = tp.prune(b.model, data, tp.Budget(macs=0.6), criterion=logits, progress=lambda s, *_: stages.append(s))
    assert plain.report.drift["predicted_kl"] is None
    assert list(dict.fromkeys(stages)) == ["trace", "score", "allocate", "reconstruct", "eval"]
    assert plain.report.data["measured_on"] == "scoring batches"


def test_outputs_that_are_no_logits_are_measured_by_distance() -> None:
    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv2(self.conv1(x).relu())

    result = tp.prune(Map().eval(), [torch.randn(4, 3, 7, 7)], tp.Budget(macs=0.6), criterion=tp.TPV(head="logits"))
    assert set(result.report.before.metrics) == {"mse"}
    assert result.report.before.metrics["mse"] == 0 < result.report.pruned.metrics["mse"]


def test_what_cannot_be_read_twice_or_is_empty_is_refused(mlp) -> None:
    with pytest.raises(tp.DataError, match="read once only"):
        tp.prune(mlp.model, iter(batches("mlp")), tp.Budget(macs=0.6))
    with pytest.raises(tp.DataError, match="at least one"):
        tp.prune(mlp.model, [], tp.Budget(macs=0.6))
    with pytest.raises(tp.DataError, match="there is no batch"):
        tp.prune(mlp.model, batches("mlp"), tp.Budget(macs=0.6), held_out=[])


def test_iterative_pruning_is_a_loop_over_the_verbs() -> None:
    b, data = built("residual"), batches("residual")
    small = b.model
    for share in (0.8, 0.6, 0.45):
        graph = tp.trace(small, data[0][:1])
        budget = tp.Budget(macs=int(share * b.graph.macs()))
        plan = tp.allocate(tp.score(small, data, graph), graph, budget)
        small = tp.reconstruct(tp.apply(small, plan), data, b.model)
    whole = plan_of(small)
    assert whole.graph.model_id == b.graph.model_id
    assert whole.macs <= 0.45 * b.graph.macs()
    assert whole.params == sum(p.numel() for p in small.parameters())
    shapes = {n: p.shape for n, p in tp.apply(b.model, whole).named_parameters()}
    assert shapes == {n: p.shape for n, p in small.named_parameters()}


def test_what_cannot_be_met_is_told_before_anything_is_scored(mlp) -> None:
    seen: list[str] = []

    def told(stage: str, done: int, total: int | None) -> None:
        seen.append(stage)

    with pytest.raises(tp.BudgetError, match="the floor is"):
        tp.prune(mlp.model, [mlp.inputs], tp.Budget(macs=0.001), progress=told)
    with pytest.raises(tp.PlanError, match="latency_ms needs a table"):
        tp.prune(mlp.model, [mlp.inputs], tp.Budget(latency_ms=0.7), progress=told)
    with pytest.raises(tp.PlanError, match=r"needs scores in nats, and tpv\(head=logits"):
        tp.prune(mlp.model, [mlp.inputs], tp.Budget(drift=0.1), criterion=tp.TPV("logits"), progress=told)
    assert "score" not in seen


def test_a_criterion_that_tells_with_its_scores_what_they_are_may_be_bounded_by_drift(mlp) -> None:
    class Mine:
        label = "mine"

        def measure(self, *args: Any, **kwargs: Any) -> tp.Scores:
            return tp.TPV().measure(*args, **kwargs)

    found = tp.prune(mlp.model, [mlp.inputs], tp.Budget(drift=0.5), criterion=Mine())
    assert found.plan.made_by["criterion"].startswith("tpv(head=softmax")


def test_a_budget_of_milliseconds_and_the_joint_allocator_can_be_asked_for(mlp) -> None:
    table = tp.latency_table(mlp.model, mlp.graph, mlp.inputs)
    found = tp.prune(mlp.model, [mlp.inputs], tp.Budget(latency_ms=0.99), latency=table)
    assert found.plan.made_by["asked"]["latency_ms"] >= found.plan.made_by["got"]["latency_ms"]
    assert f"batch {len(mlp.inputs)}" in found.report.environment["latency"]
    joint = tp.prune(mlp.model, [mlp.inputs], tp.Budget(macs=0.8), planning=tp.Planning(allocator="joint"))
    assert joint.plan.made_by["allocator"] == "joint"
    assert joint.scores.sensitivities is not None
