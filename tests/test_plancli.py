"""`tpvprune plans`: what is shown, compared and composed, in tables and in JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tpvprune as tp
from tests.helpers import built, plan_without
from tests.test_cli import call
from tpvprune.report import asked_and_got


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: call(capsys, monkeypatch, "plans", *words)


@pytest.fixture
def plans(tmp_path: Path) -> dict[str, tp.Plan]:
    """Channels, weights of what they leave, and both, in files."""
    b = built("conv_bn")
    scores = tp.score(b.model, [b.inputs], b.graph)
    channels = tp.allocate(scores, b.graph, tp.Budget(macs=0.6, round_to=1))
    small = tp.apply(b.model, channels)
    graph = tp.weight_graph(small)
    weights = tp.sparsify(tp.score(small, [], graph, tp.L1()), graph, 0.4, protect=["conv1"])
    found = {"channels": channels, "weights": weights, "both": channels.compose(weights)}
    for name, plan in found.items():
        plan.save(tmp_path / f"{name}.json")
    return found


def rows(told: str) -> list[list[str]]:
    return [line.split("\t") for line in told.splitlines()]


def test_a_plan_of_channels_is_shown(run, plans) -> None:
    plan = plans["channels"]
    code, told, _ = run("show", "channels.json")
    assert code == 0
    lines = rows(told)
    assert ["params", f"{plan.graph.params():,}", f"{plan.params:,}"] in lines
    assert ["macs", f"{plan.graph.macs():,}", f"{plan.macs:,}"] in lines
    assert ["macs", f"{plan.made_by['asked']['macs']:,}", f"{plan.macs:,}"] in lines
    assert ["conv1", "channel", "6", str(int(plan.mask("conv1").sum()))] in lines
    assert ["allocator", "joint"] in lines
    assert "sparsity" not in told


def test_a_plan_of_both_is_shown(run, plans) -> None:
    plan = plans["both"]
    code, told, _ = run("show", "both.json")
    assert code == 0
    lines = rows(told)
    assert ["zeros", "0", f"{plan.zeros:,}"] in lines
    assert ["macs", f"{plan.made_by['composed'][0]['asked']['macs']:,}", f"{plan.macs:,}"] in lines
    assert ["sparsity", "0.4", f"{plan.sparsity:.4g}"] in lines
    assert ["stays dense", "conv1.weight: protected"] in [[c.replace("_", " ") for c in line] for line in lines]
    for row in plan.summary():
        assert [row["group"], row["kind"], str(row["units"]), str(row["kept"])] in lines


def test_json_says_the_same(run, plans) -> None:
    code, told, _ = run("show", "both.json", "--json")
    assert code == 0
    found, plan = json.loads(told), plans["both"]
    assert found["params"] == {"dense": plan.graph.params(), "kept": plan.params}
    assert found["macs"] == {"dense": plan.graph.macs(), "kept": plan.macs}
    assert found["weights"] == {"zeros": plan.zeros, "nonzero": plan.nonzero, "sparsity": plan.sparsity}
    assert found["groups"] == plan.summary()
    assert [bound["quantity"] for bound in found["bounds"]] == ["macs", "sparsity"]
    assert found["bounds"][1]["got"] == plan.sparsity
    assert found["made_by"] == plan.made_by


def test_bounds_of_every_kind_have_an_answer(run, mlp, tmp_path) -> None:
    asked = {"macs": 1, "params": 2, "bytes": 3, "units": 4, "drift": 0.5, "latency_ms": 2.5, "unheard of": 1}
    keep = plan_without(mlp.graph, {"0": [1]}).keep
    made_by = {"asked": asked, "got": {"latency_ms": 2.25}, "predicted_kl": 0.25}
    plan = tp.Plan(keep, mlp.graph, made_by)
    plan.save(tmp_path / "plan.json")
    found = json.loads(run("show", "plan.json", "--json")[1])
    got = {bound["quantity"]: bound["got"] for bound in found["bounds"]}
    graph = mlp.graph
    assert got == {
        **{name: graph.cost(name, keep) for name in ("macs", "params", "bytes", "units")},
        "drift": 0.25,
        "latency_ms": 2.25,
        "unheard of": None,
    }
    told, got = asked_and_got(tp.Budget(drift=0.5), plan)
    assert (told["drift"]["at_most"], got["drift"]["value"]) == (0.5, 0.25)
    measured = tp.Plan(keep, mlp.graph, made_by | {"measured_kl": 0.0})  # which comes before what was predicted
    measured.save(tmp_path / "plan.json")
    bounds = json.loads(run("show", "plan.json", "--json")[1])["bounds"]
    assert [bound["got"] for bound in bounds if bound["quantity"] == "drift"] == [0.0]
    assert asked_and_got(tp.Budget(drift=0.5), measured)[1]["drift"]["value"] == 0.0


def test_folders_are_read(run, plans, tmp_path) -> None:
    tp.save(tp.apply(built("conv_bn").model, plans["both"]), tmp_path / "saved")
    assert run("show", "saved", "--json") == run("show", "both.json", "--json")
    code, _, said = run("show", str(tmp_path))
    assert code == 2
    assert "no plan at" in said


def test_plans_are_compared(run, plans) -> None:
    code, told, _ = run("diff", "both.json", "channels.json")
    assert code == 0
    lines = {line[0]: line[1:] for line in rows(told)[1:]}
    assert lines == {
        name: ["0", f"{int((~mask).sum()):,}"] for name, mask in plans["both"].weights.items() if not bool(mask.all())
    }
    found = json.loads(run("diff", "both.json", "channels.json", "--json")[1])
    assert found == plans["both"].diff(plans["channels"])
    assert json.loads(run("diff", "both.json", "both.json", "--json")[1]) == {}


def test_plans_are_composed(run, plans, tmp_path) -> None:
    code, told, _ = run("compose", "channels.json", "weights.json", "--out", "composed.json")
    assert code == 0
    assert "channels.json + weights.json -> composed.json" in told
    assert tp.Plan.load(tmp_path / "composed.json").diff(plans["both"]) == {}
    code, _, said = run("compose", "channels.json", "weights.json", "--out", "composed.json")
    assert code == 2
    assert "composed.json exists" in said
    code, told, _ = run("compose", "channels.json", "weights.json", "-o", "other.json", "--json")
    assert json.loads(told)["weights"]["zeros"] == plans["both"].zeros


def test_what_does_not_go_together_is_refused(run, plans, mlp, tmp_path) -> None:
    plan_without(mlp.graph, {"0": [1]}).save(tmp_path / "other.json")
    for words in (["diff", "channels.json", "other.json"], ["compose", "channels.json", "other.json", "--out", "c"]):
        code, _, said = run(*words)
        assert code == 2, words
        assert said.startswith("tpvprune: ")
    assert not (tmp_path / "c").exists()
    code, told, _ = run("show", "gone.json", "--json")
    assert code == 2
    assert json.loads(told)["error"] == "PlanError"


def test_plans_of_weights_alone_show_no_multiply_adds(run, plans, monkeypatch) -> None:
    plan = plans["weights"]
    _, told, _ = run("show", "weights.json")
    assert "macs" not in told
    assert ["nonzero", f"{plan.graph.params():,}", f"{plan.nonzero:,}"] in rows(told)
    assert torch.equal(plan.weights["conv2.weight"], tp.Plan.load("weights.json").weights["conv2.weight"])
