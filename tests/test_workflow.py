"""A run's score stage: the criterion that a recipe names, and going on after a stop."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import tpvprune as tp
from tests.fakeclock import FakeClock
from tests.helpers import assert_scores_close
from tests.test_cli import CLASSES, call, make_images
from tpvprune.planning.widths import costs_of
from tpvprune.recipe import validate_recipe
from tpvprune.runfolder import stage_keys
from tpvprune.workflow import Run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=CLASSES).state_dict(), tmp_path / "weights.safetensors")
    make_images(tmp_path / "images", 24)
    return tmp_path


@pytest.fixture
def pointwise(place: Path) -> tuple[str, ...]:
    """Overrides for a network whose weights read few inputs each, so that single ones are soon compensated."""
    file = place / "pointwise.safetensors"
    save_file(timm.create_model("test_convnext", num_classes=CLASSES).state_dict(), file)
    return ("model.name=test_convnext", f"model.checkpoint={file}")


def recipe(place: Path, *overrides: str) -> Any:
    data = {
        "name": "mine",
        "model": {
            "name": "test_resnet",
            "checkpoint": str(place / "weights.safetensors"),
            "args": {"num_classes": CLASSES},
        },
        "data": {"images": str(place / "images"), "size": 32, "batch_size": 2},
        "recover": {"finetune": None},
    }
    return validate_recipe(data, "mine.yaml", overrides)


@pytest.mark.parametrize("overrides", [(), ("score.probes=2", "score.compensated=false"), ("score.criterion=wanda",)])
def test_a_stopped_scoring_goes_on_where_it_was(
    place: Path, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    whole = Run(recipe(place, *overrides), place / "whole")
    whole.until("score")

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "score" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(recipe(place, *overrides), place / "broken", progress=stop).until("score")
    (partial,) = (place / "broken").glob("score-*.partial.dense-1-*.safetensors")
    before = tp.Scores.load(partial)
    assert 0 < before.samples < 12
    seen: list[int] = []
    told = Run(
        recipe(place, *overrides), place / "broken", progress=lambda s, d, t: seen.append(d) if s == "score" else None
    ).until("score")
    assert len(seen) == 6 - before.manifest["batches"]
    assert told["images"] == 12
    a, b = (tp.Scores.load(place / name / "scores.safetensors") for name in ("whole", "broken"))
    assert_scores_close(b.values, a.values, 1e-12)
    assert a.manifest["data"] == b.manifest["data"]
    assert not list((place / "broken").glob("*.partial*"))


def test_other_settings_do_not_go_on_from_the_partial_scores(place: Path):
    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "score" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(recipe(place), place / "out", progress=stop).until("score")
    told = Run(recipe(place, "score.head=logits"), place / "out").until("score")
    assert told["images"] == 12
    assert "logits" in told["criterion"]
    assert not list((place / "out").glob("*.partial*"))


def test_a_criterion_without_batches_is_scored_in_one_go(place: Path):
    told = Run(recipe(place, "score.criterion=l1"), place / "out").until("plan")
    assert told["share_of_macs"] <= 0.5
    assert tp.Scores.load(place / "out" / "scores.safetensors").criterion == "l1"


def test_a_criterion_that_needs_labels_says_so(place: Path):
    with pytest.raises(tp.DataError, match=r"taylor needs labels.*label-free"):
        Run(recipe(place, "score.criterion=taylor"), place / "out").until("score")
    told = Run(recipe(place, "score.criterion=taylor", "data.labels=folders"), place / "with").until("score")
    assert told["criterion"] == "taylor"


def test_the_stage_says_how_sure_the_ranking_is(place: Path):
    told = Run(recipe(place, "score.probes=1"), place / "out").until("score")
    assert 0 <= told["wrong_side"] <= 0.5
    assert -1 <= told["rank_correlation"] <= 1
    assert told["samples_to_settle"] > 12


def test_a_stopped_schedule_goes_on_where_it_was(place: Path):
    asked = ("plan.steps=3", "budget.macs=0.7", "budget.round_to=1", "score.compensated=false")
    whole = Run(recipe(place, *asked), place / "whole")
    told = whole.until("plan")
    assert told["share_of_macs"] <= 0.7
    assert len(whole.plan.made_by["steps"]) == 3

    def stop(stage: str, done: int, total: int | None) -> None:
        if (stage, done) == ("plan", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(recipe(place, *asked), place / "broken", progress=stop).until("plan")
    assert len(list((place / "broken").glob("plan-*.partial.json"))) == 1
    steps: list[int] = []
    again = Run(
        recipe(place, *asked), place / "broken", progress=lambda s, d, t: steps.append(d) if s == "plan" else None
    )
    assert again.until("plan") == told
    assert steps == [2, 3]
    assert again.plan.to_json() == whole.plan.to_json()
    assert not list((place / "broken").glob("*.partial.*"))


def test_a_stopped_scoring_of_single_weights_goes_on_where_it_was(place: Path, pointwise: tuple[str, ...]):
    asked = (
        *pointwise,
        "budget.macs=0.7",
        "sparsify.sparsity=0.5",
        "sparsify.criterion=tpv",
        "score.compensated=false",
    )
    whole = Run(recipe(place, *asked), place / "whole")
    whole.until("plan")
    Run(recipe(place, *asked), place / "broken").until("score")

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "score" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(recipe(place, *asked), place / "broken", progress=stop).until("plan")
    (kept,) = (place / "broken").glob("plan-*.partial.zeros-1-*.safetensors")
    done = tp.Scores.load(kept).manifest["batches"]
    assert 0 < done < 6
    seen: list[int] = []
    again = Run(
        recipe(place, *asked), place / "broken", progress=lambda s, d, t: seen.append(d) if s == "score" else None
    )
    again.until("plan")
    assert len(seen) == 6 - done
    assert again.plan.to_json() == whole.plan.to_json()
    assert not list((place / "broken").glob("*.partial*"))


def test_nats_are_asked_for_before_anything_is_scored(place: Path):
    with pytest.raises(tp.PlanError, match=r"needs scores in nats, and tpv\(head=logits"):
        Run(recipe(place, "budget.drift=0.1", "score.head=logits"), place / "out").until("plan")
    assert not list((place / "out").glob("scores*"))


def test_what_a_class_map_holds_and_whose_labels_count_is_in_the_keys(place: Path) -> None:
    path = place / "map.txt"

    def keys(*asked: str) -> dict[str, str]:
        return stage_keys(recipe(place, "score.criterion=taylor", *asked), "eval")

    found = []
    for text in ("a\nb\n", "b\na\n"):
        path.write_text(text)
        found.append((keys(f"data.labels={path}"), keys(f"eval.labels={path}")))
    for one, other in zip(*found, strict=True):
        assert one["trace"] == other["trace"]
        assert one["score"] != other["score"]
    assert keys("eval.labels=folders")["score"] != keys("eval.labels=null")["score"]
    apart = [keys("eval.images=elsewhere", f"eval.labels={one}") for one in ("folders", "null")]
    assert apart[0]["score"] == apart[1]["score"]
    assert apart[0]["eval"] != apart[1]["eval"]


def test_a_recipe_bounds_several_costs_and_drift(place: Path):
    run = Run(recipe(place, "budget.bytes=0.8", "budget.params=90%", "budget.drift=50"), place / "out")
    run.until("eval")
    report = json.loads((place / "out" / "report.json").read_text())
    dense = sum(t.nbytes for t in (*run.inputs.dense.parameters(), *run.inputs.dense.buffers()))
    assert list(report["asked"]) == list(report["got"]) == ["params", "bytes", "drift"]
    assert report["asked"]["bytes"] == {"as_written": 0.8, "at_most": int(0.8 * dense)}
    assert report["got"]["bytes"]["value"] <= 0.8 * dense
    assert report["got"]["drift"]["value"] <= 50
    assert report["got"]["params"]["share"] <= 0.9
    told = json.loads((place / "out" / "stages.json").read_text())["plan"]["told"]
    assert told["drift"] == pytest.approx(report["got"]["drift"]["value"], rel=1e-3)
    assert {"measured_kl", "optimism"} <= set(told)


def test_half_the_multiply_adds_is_the_default_where_nothing_is_bounded(place: Path):
    assert recipe(place).limits().as_written == {"macs": 0.5}
    assert recipe(place, "budget.round_to=1").limits().as_written == {"macs": 0.5}
    assert recipe(place, "budget.drift=0.05").limits().as_written == {"drift": 0.05}
    assert recipe(place, "budget.drift=0.05").criterion().compensated is False
    with pytest.raises(tp.RecipeError, match="bounds at least one"):
        recipe(place, "budget.macs=null")


def test_a_budget_of_milliseconds_is_planned_by_a_table_of_this_machine(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    asked = ("budget.latency_ms=0.7", "budget.round_to=1", "latency.batch_size=2", "recover.reconstruct=null")
    run = Run(recipe(place, *asked), place / "out")
    with FakeClock().running() as clock:
        monkeypatch.setattr("tpvprune.inputs.latency_table", partial(tp.latency_table, clock=clock))
        run.until("plan")
    run.until("eval")
    (kept,) = (cache / "tpvprune" / "latency").glob("*.json")
    table = tp.LatencyTable.load(kept)
    assert table.measured["batch"] == [2, 3, 32, 32]
    report = json.loads((place / "out" / "report.json").read_text())
    got, asked_for = report["got"]["latency_ms"], report["asked"]["latency_ms"]
    dense = costs_of("latency_ms", run.graph, latency=table).total
    assert asked_for["at_most"] == pytest.approx(0.7 * dense)
    assert got["value"] == pytest.approx(costs_of("latency_ms", run.graph, run.plan.keep, latency=table).total)
    assert got["value"] <= asked_for["at_most"]
    assert got["measured"] == report["pruned"]["latency_ms"] > 0
    assert "batch 2" in report["environment"]["latency"]
    monkeypatch.setattr("tpvprune.inputs.latency_table", lambda *args, **kwargs: table)
    with pytest.raises(tp.BudgetError, match=r"latency_ms <= 0\.001 cannot be reached"):
        Run(recipe(place, "budget.latency_ms='0.001 ms'"), place / "other").until("plan")
    assert not (place / "other" / "scores.safetensors").exists()


def test_zeros_are_chosen_again_when_what_they_are_scored_for_changes(place: Path):
    asked = ("budget.macs=1.0", "score.criterion=l1", "sparsify.sparsity=0.5")
    keys = [stage_keys(recipe(place, *asked, *more), "plan") for more in ((), ("recover.reconstruct=null",))]
    assert keys[0]["score"] == keys[1]["score"]
    assert keys[0]["plan"] != keys[1]["plan"]


def test_weights_that_cannot_be_compensated_are_chosen_by_magnitude(place: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise tp.ModelError("'up' is a ConvTranspose2d")

    monkeypatch.setattr("tpvprune.scoring.tpv.parts_of_inputs", refuse)
    lines: list[str] = []
    asked = ("budget.macs=1.0", "score.criterion=l1", "sparsify.sparsity=0.5")
    with monkeypatch.context() as patch:  # a run that was stopped there goes on as one that was not
        patch.setattr("tpvprune.schedule.sparsify", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Run(recipe(place, *asked), place / "out").until("plan")
    run = Run(recipe(place, *asked), place / "out", log=lines.append)
    run.until("plan")
    assert any("scored by magnitude: 'up' is a ConvTranspose2d" in line for line in lines)
    assert run.plan.sparsity == pytest.approx(0.5, abs=0.01)


def test_images_that_only_zeros_are_scored_on_are_counted(place: Path, pointwise: tuple[str, ...]):
    asked = (*pointwise, "budget.macs=1.0", "score.criterion=l1", "sparsify.sparsity=0.5", "recover.finetune=null")
    run = Run(recipe(place, *asked), place / "out")
    told = run.until("plan")
    assert told["scored_by"] == "tpv(head=softmax, over=consume, compensated)"
    run.until("eval")
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["data"]["scored"] == told["images"] > 0


def test_weights_that_cannot_be_compensated_are_an_error_where_they_are_asked_for(
    place: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args: object, **kwargs: object) -> None:
        raise tp.ModelError("'up' is a ConvTranspose2d")

    monkeypatch.setattr("tpvprune.scoring.tpv.parts_of_inputs", refuse)
    asked = ("budget.macs=1.0", "score.criterion=l1", "sparsify.sparsity=0.5")
    with pytest.raises(tp.ModelError):
        Run(recipe(place, *asked, "sparsify.criterion=tpv"), place / "other").until("plan")


def test_zeros_follow_the_cut_and_change_the_plan_alone(place: Path, pointwise: tuple[str, ...]):
    asked = (*pointwise, "budget.macs=0.7", "sparsify.pattern='2:4'")
    run = Run(recipe(place, *asked), place / "out")
    told = run.until("plan")
    assert told["zeros"] == run.plan.zeros > 0
    assert told["sparsity"] == 0.5
    assert told["scored_by"] == "tpv(head=softmax, over=consume, compensated 2:4)"
    without = Run(recipe(place, *pointwise, "budget.macs=0.7"), place / "without")
    without.until("plan")
    assert {n: m.tolist() for n, m in run.plan.keep.items()} == {n: m.tolist() for n, m in without.plan.keep.items()}
    small, weights = (
        tp.apply(without.inputs.dense, without.plan),
        tp.weight_graph(tp.apply(without.inputs.dense, without.plan)),
    )
    scores = tp.score(
        small, without.inputs.loader(without.inputs.scored()), weights, tp.TPV(compensated="2:4", probes=8)
    )
    by_hand = tp.sparsify(scores, weights, pattern="2:4", after=without.plan)
    assert run.plan.diff(by_hand) == {}
    run.until("eval")
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["drift"]["predicted_kl"] is None
    held = tp.load(place / "out")
    for name, mask in held._tpvprune_plan.weight_masks().items():
        assert not held.get_parameter(name)[~mask].any()


def test_a_run_says_that_its_weights_are_random(place: Path):
    lines: list[str] = []
    Run(recipe(place, "model.checkpoint=null"), place / "out", log=lines.append).until("score")
    assert any("no checkpoint is named" in line for line in lines)
    lines.clear()
    Run(recipe(place), place / "other", log=lines.append).until("score")
    assert not any("no checkpoint" in line for line in lines)


def test_a_run_whose_weights_are_gone_is_not_finished(place: Path):
    asked, out = ("score.criterion=l1",), place / "out"
    Run(recipe(place, *asked), out).until("recover")
    weights, cut = out / "model.safetensors", out / "pruned" / "model.safetensors"
    made = weights.read_bytes()
    weights.unlink()
    Run(recipe(place, *asked), out).until("recover")
    assert weights.read_bytes() == made
    cut.unlink()
    with pytest.raises(tp.RecipeError, match=r"lacks pruned/model.safetensors of its stage apply; put the file back"):
        Run(recipe(place, *asked), out).until("recover")
    weights.unlink()
    Run(recipe(place, *asked), out).until("recover")
    assert cut.is_file()
    assert weights.read_bytes() == made


def test_random_weights_are_those_of_the_seed_after_a_stop_too(place: Path):
    asked = ("model.checkpoint=null", "score.criterion=l1")
    Run(recipe(place, *asked), place / "whole").until("recover")
    torch.manual_seed(7)
    Run(recipe(place, *asked), place / "broken").until("apply")
    Run(recipe(place, *asked), place / "broken").until("recover")
    Run(recipe(place, *asked, "seed=1"), place / "other").until("score")
    whole, broken, other = (place / name for name in ("whole", "broken", "other"))
    for file in ("plan.json", "scores.safetensors", "model.safetensors"):
        assert (whole / file).read_bytes() == (broken / file).read_bytes()
    assert (whole / "scores.safetensors").read_bytes() != (other / "scores.safetensors").read_bytes()
    keys = [stage_keys(recipe(place, *more), "trace")["trace"] for more in ((*asked, "seed=1"), asked, ("seed=1",), ())]
    assert len(set(keys)) == 3, "the seed of weights that a file holds does not matter"


def test_several_processes_are_told_to_choose_by_magnitude_themselves(place: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise tp.ModelError("'up' is a ConvTranspose2d")

    monkeypatch.setattr("tpvprune.scoring.tpv.parts_of_inputs", refuse)
    monkeypatch.setattr("tpvprune.workflow.process", lambda: (0, 2))
    asked = ("budget.macs=1.0", "score.criterion=l1", "sparsify.sparsity=0.5")
    with pytest.raises(tp.ModelError, match=r"'up' is a ConvTranspose2d; or .* sparsify.criterion=l1"):
        Run(recipe(place, *asked), place / "out").until("plan")


@pytest.mark.parametrize("verb", ["prune", "sensitivity", "tpv", "select"])
def test_a_size_that_the_model_cannot_take_is_told_before_anything_is_written(place, capsys, monkeypatch, verb):
    monkeypatch.chdir(place)
    torch.save(timm.create_model("test_vit").state_dict(), "vit.pth")
    words = ["vit.pth", "--model", "test_vit", "--set"] if verb == "select" else ["test_vit"]
    words += ["data.size=100", "--data", "images", *(["--macs", "0.6"] if verb == "prune" else [])]
    code, told, said = call(capsys, monkeypatch, verb, *words)
    assert (code, told) == (2, "")
    assert "does not run on an example of shape (12, 3, 100, 100): Input height (100) should be divisible" in said
    assert "patch size (16); check the input size" in said
    assert not (place / "runs").exists()
