"""Recovery by recipe: means folded, refits between steps, a distillation that goes on after a stop."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

import tpvprune as tp
from tests.helpers import assert_same_state
from tests.test_workflow import place, recipe  # noqa: F401  # a fixture
from tpvprune.errors import RecipeError
from tpvprune.runfolder import stage_keys
from tpvprune.workflow import Run

TUNED = ("recover.finetune.epochs=3", "recover.finetune.batch_size=4", "recover.finetune.patience=3")


def test_means_are_folded_if_a_recipe_says_so(place: Path) -> None:  # noqa: F811
    told = Run(recipe(place, "recover.fold=true", "recover.reconstruct=null"), place / "out").until("recover")
    assert told["steps"] == ["fold"]
    folded, cut = tp.load(place / "out"), tp.load(place / "out" / "pruned")
    assert any(not torch.equal(a, b) for a, b in zip(folded.buffers(), cut.buffers(), strict=True))
    for a, b in zip(folded.parameters(), cut.parameters(), strict=True):
        if a.ndim > 1:
            assert torch.equal(a, b)


def test_what_the_closed_form_cost_is_told(place: Path) -> None:  # noqa: F811
    told = Run(recipe(place), place / "out").until("recover")
    assert told["closed_form"]["layers"] > 3
    assert told["closed_form"]["samples"] == 12
    assert 0 < told["closed_form"]["memory_mib"] < 100


def test_a_gauss_newton_refit_follows_the_closed_form(place: Path) -> None:  # noqa: F811
    newton = ("recover.refine.steps=2", "recover.refine.iterations=2")
    told = Run(recipe(place, *newton), place / "out").until("recover")
    assert told["steps"] == ["reconstruct", "refine"]
    assert told["refine"]["samples"] == 12
    assert told["refine"]["after"] < told["refine"]["before"]
    again = Run(recipe(place, *newton), place / "again").until("recover")
    assert again["refine"]["after"] == told["refine"]["after"]
    assert_same_state(tp.load(place / "out").state_dict(), tp.load(place / "again").state_dict())
    plain = Run(recipe(place, *newton, "recover.refine.augment=false"), place / "plain").until("recover")
    assert plain["refine"]["before"] != told["refine"]["before"]
    with pytest.raises(RecipeError, match=r"recover.refine.*damping=0"):
        recipe(place, "recover.refine.damping=0")


def test_refits_between_steps_follow_the_recipe(place: Path) -> None:  # noqa: F811
    steps = ("plan.steps=3", "plan.refit=true")
    plain, other = recipe(place, *steps), recipe(place, *steps, "recover.reconstruct.ridge=0.5")
    assert stage_keys(plain, "plan")["plan"] != stage_keys(other, "plan")["plan"]
    without = [recipe(place, "plan.steps=3", *more) for more in ((), ("recover.reconstruct.ridge=0.5",))]
    assert len({stage_keys(r, "plan")["plan"] for r in without}) == 1
    told = Run(plain, place / "out").until("plan")
    assert told["share_of_macs"] <= 0.5
    run = Run(recipe(place, *steps), place / "again")
    run.until("score")
    graph, scores = run.graph, tp.Scores.load(place / "again" / "scores.safetensors")
    by_hand = tp.plan_for(
        run.inputs.dense, run.inputs.loader(run.inputs.scored()), graph, plain.limits(), criterion=plain.criterion(),
        planning=plain.planning(), scores=scores, refit_with=plain.closed_form(),
    )  # fmt: skip
    assert tp.Plan.load(place / "out" / "plan.json").diff(by_hand) == {}
    with pytest.raises(RecipeError, match="refit=True is for plans in steps"):
        recipe(place, "plan.refit=true")


def test_a_stopped_distillation_goes_on_where_it_was(place: Path) -> None:  # noqa: F811
    whole = Run(recipe(place, *TUNED), place / "whole")
    told = whole.until("recover")
    assert [entry["epoch"] for entry in told["epochs"]] == [1, 2, 3]
    assert all(entry["held_out"] > 0 for entry in told["epochs"])
    assert told["finetune_images"] == 11

    def stop(stage: str, done: int, total: int | None) -> None:
        if (stage, done) == ("finetune", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(recipe(place, *TUNED), place / "broken", progress=stop).until("recover")
    assert list((place / "broken").glob("recover-*.partial/last.safetensors"))
    lines: list[str] = []
    seen: list[tuple[str, int]] = []
    again = Run(
        recipe(place, *TUNED), place / "broken", log=lines.append, progress=lambda s, d, t: seen.append((s, d))
    ).until("recover")
    assert {stage for stage, _ in seen} == {"finetune"}, "what was refitted is not refitted again"
    assert min(done for _, done in seen) == 4  # three batches an epoch, and a state after each
    assert [entry["epoch"] for entry in again["epochs"]] == [1, 2, 3]
    assert again["closed_form"]["layers"] == told["closed_form"]["layers"]
    assert again["steps"] == told["steps"] == ["reconstruct", "finetune"]
    assert len([line for line in lines if line.startswith("epoch ") and "images/s" in line]) == 2
    assert not list((place / "broken").glob("*.partial*"))
    assert_same_state(tp.load(place / "broken").state_dict(), tp.load(place / "whole").state_dict())


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's readers close nothing
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_images_may_lie_in_a_tar_file(place: Path) -> None:  # noqa: F811
    with tarfile.open(place / "images.tar", "w") as tar:
        tar.add(place / "images", arcname=".")
    found, wanted = (
        Run(recipe(place, f"data.images={place / name}"), place / f"out-{name}").until("score")
        for name in ("images.tar", "images")
    )
    assert found == wanted
