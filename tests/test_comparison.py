"""Criteria compared: against plans made and measured by hand, after a stop, on the command line and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tpvprune as tp
from tests.helpers import built, outputs
from tests.test_cli_inspect import SMALL, place, rows_of, run  # noqa: F401  # fixtures
from tpvprune import plots
from tpvprune.deploy.page import report_page
from tpvprune.errors import InputError

CRITERIA = {"l1": tp.L1(), "tpv": tp.TPV(probes="exact")}
SHARES = (0.8, 0.6)


def compared(**more: object) -> tp.Comparison:
    b = built("conv_bn")
    held_out = [(b.inputs, outputs(b.model, b.inputs).argmax(1))]
    return tp.compare_criteria(b.model, [b.inputs], b.graph, CRITERIA, held_out, shares=SHARES, **more)


def test_every_point_is_the_plan_of_its_criterion_measured() -> None:
    b, found = built("conv_bn"), compared()
    assert found.criteria == ("l1", "tpv")
    assert found.metric == "top1"
    assert found.dense["top1"] == 1
    p = outputs(b.model, b.inputs).log_softmax(1)
    for name, criterion in CRITERIA.items():
        scores = tp.score(b.model, [b.inputs], b.graph, criterion)
        for share, point in zip(SHARES, found.of(name), strict=True):
            plan = tp.allocate(scores, b.graph, tp.Budget(macs=share))
            small = tp.apply(b.model, plan)
            q = outputs(small, b.inputs).log_softmax(1)
            assert (point.asked, point.macs) == (share, plan.macs / b.graph.macs())
            assert point.params == plan.params / b.graph.params()
            assert point.metrics["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-9)
            assert point.metrics["top1"] == point.metrics["agreement"]
    assert found.mean("tpv") == sum(point.metrics["top1"] for point in found.of("tpv")) / 2
    means = [found.mean(name) for name in found.ranked()]
    assert means == sorted(means, reverse=True)


def test_refits_are_measured_if_asked_for() -> None:
    b = built("conv_bn")
    plain, refitted = compared(), compared(refit_with=tp.Reconstruct())
    assert refitted.refitted
    plan = tp.allocate(tp.score(b.model, [b.inputs], b.graph, tp.L1()), b.graph, tp.Budget(macs=0.6))
    small = tp.reconstruct(tp.apply(b.model, plan), [b.inputs], b.model)
    q, p = outputs(small, b.inputs).log_softmax(1), outputs(b.model, b.inputs).log_softmax(1)
    kl = float((p.exp() * (p - q)).sum(1).mean())
    assert refitted.of("l1")[1].metrics["kl"] == pytest.approx(kl, rel=1e-6)
    assert plain.of("l1")[1].metrics["kl"] != pytest.approx(kl, rel=1e-2)


def test_a_stopped_comparison_goes_on_and_other_settings_begin_anew(tmp_path: Path) -> None:
    file, seen = tmp_path / "c.json", list[str]()

    def stop(stage: str, done: int, total: int | None) -> None:
        if (stage, done) == ("compare", 1):
            raise KeyboardInterrupt

    def watch(stage: str, done: int, total: int | None) -> None:
        seen.append(stage)

    with pytest.raises(KeyboardInterrupt):
        compared(save=file, progress=stop)
    assert tp.Comparison.load(file).criteria == ("l1",)
    whole = compared(save=file, progress=watch)
    assert seen.count("score") == 1, "only what was not done"
    assert whole == compared()
    assert tp.Comparison.load(file) == whole
    seen.clear()
    compared(save=file, progress=watch)
    assert "score" not in seen
    compared(save=file, budget=tp.Budget(macs=0.5, round_to=1), progress=watch)
    assert "eval" in seen


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.body(x).relu()
        return {"a": self.a(z), "b": 3 * self.b(z)}


def test_points_of_another_output_or_criterion_are_not_taken_for_these(tmp_path: Path) -> None:
    model, file = Both().double().eval(), tmp_path / "c.json"
    inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)).double()
    graph = tp.trace(model, inputs[:1])
    other = Both().double().eval()
    with torch.no_grad():
        other.body.weight.mul_(2)

    def points(output: str, reference: nn.Module, **save: Any) -> tp.Comparison:
        criteria = {"tpv": tp.TPV(output=output, reference=reference)}
        return tp.compare_criteria(model, [inputs], graph, criteria, [inputs], shares=[0.5], output=output, **save)

    def curves(output: str, **save: Any) -> tp.SensitivityCurves:
        return tp.sensitivity(model, [inputs], graph, held_out=[inputs], output=output, **save)

    for way in (("a", model), ("b", model), ("b", other)):
        assert points(*way, save=file) == points(*way)
    assert points("a", model).points != points("b", model).points != points("b", other).points
    for output in "ab":
        assert curves(output, save=tmp_path / "s.json") == curves(output)


def test_mistakes_are_said() -> None:
    b = built("conv_bn")
    with pytest.raises(InputError, match="no criterion to compare"):
        tp.compare_criteria(b.model, [b.inputs], b.graph, {}, [b.inputs])
    with pytest.raises(tp.BudgetError, match="cannot be reached"):
        tp.compare_criteria(b.model, [b.inputs], b.graph, CRITERIA, [b.inputs], shares=(0.5, 1e-6))
    with pytest.raises(tp.PlanError, match="'jbr' was not compared"):
        compared().of("jbr")
    with pytest.raises(tp.PlanError, match="incomplete"):
        tp.Comparison.from_json({"format": 1, "points": [{}]})


def test_the_page_shows_the_curves() -> None:
    found = compared()
    b = built("conv_bn")
    made = tp.prune(b.model, [b.inputs], tp.Budget(macs=0.7))
    text = report_page(tp.Story("x", made.plan, made.report.to_json(), made.scores, comparison=found))
    assert 'id="figure-criteria"' in text
    assert "<td>tpv</td>" in text
    svg = plots.standalone(plots.lines(found.curves(), "a", "b", "c"))
    assert "xmlns=" in svg
    assert "var(--" not in svg


def test_compare_on_the_command_line_and_in_the_report(place: Path, run) -> None:  # noqa: F811
    given = ["--checkpoint", "weights.safetensors", "--data", "images", "--out", "out"]
    short = ["recover.reconstruct=null", "recover.finetune=null"]
    words = ["compare", "test_resnet", *SMALL, *short, *given, "--macs", "90%,0.7"]
    code, told, said = run(*words, "--criteria", "taylor")
    assert code == 2
    assert "taylor needs labels" in said
    own = [
        "compare",
        "test_resnet",
        "model.args.num_classes=10",
        *SMALL[1:],
        *short,
        "--data",
        "digits",
        "--samples",
        "8",
        "--macs",
        "0.9",
    ]
    code, told, _ = run(*own, "--criteria", "taylor", "--out", "own")
    assert code == 0
    assert "taylor" in rows_of(told)
    code, _, said = run(*words, "--criteria", "l9")
    assert code == 2
    assert "no criterion 'l9'" in said
    code, told, _ = run(*words, "--criteria", "tpv,l1,taylor", "--labels", "folders", "--plot")
    assert code == 0
    assert rows_of(told)["criterion"] == ["mean", "0.9", "0.7"]
    assert {"tpv", "l1", "taylor"} <= set(rows_of(told))
    assert (place / "out" / "comparison.svg").is_file()
    before = tp.Comparison.load(place / "out" / "comparison.json")
    other = ["--labels", "folders", "score.head=probabilities", "score.seed=3"]
    assert run(*words, "--criteria", "tpv,l1", *other)[0] == 0
    after = tp.Comparison.load(place / "out" / "comparison.json")
    assert after.made_of["criteria"]["l1"] == before.made_of["criteria"]["l1"]
    assert after.made_of["criteria"]["tpv"] != before.made_of["criteria"]["tpv"]
    assert not (place / "out" / "report.html").exists()
    code, _, _ = run("run", "out")
    assert code == 0
    assert 'id="criteria"' in (place / "out" / "report.html").read_text()
    code, told, _ = run("compare", "out", "--criteria", "random,l1", "--macs", "0.9,0.7", "--json")
    assert code == 0
    found = json.loads(told)
    assert [point["criterion"] for point in found["points"]] == ["random", "random", "l1", "l1"]
    assert torch.tensor([point["macs"] for point in found["points"]]).max() <= 0.9
    assert "random" in (place / "out" / "report.html").read_text()
