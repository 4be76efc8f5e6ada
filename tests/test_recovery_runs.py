"""Recovery by recipe: means folded, refits between steps, a distillation that goes on after a stop."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tpvprune as tp
from tests.helpers import assert_same_state
from tests.test_workflow import place, recipe  # noqa: F401  # a fixture
from tpvprune.errors import RecipeError
from tpvprune.recovering import kept_back
from tpvprune.runfolder import stage_keys
from tpvprune.workflow import Run
from tpvprune.zoo.pool import Pool

TUNED = ("recover.finetune.epochs=3", "recover.finetune.batch_size=4", "recover.finetune.patience=3")
TUNED += ("recover.finetune.norms=freeze", "recover.finetune.lr=1e-5", "recover.reconstruct.ridge=1e6")


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
    tuned = recipe(place, *steps, "recover.finetune.epochs=1")  # keeps images back from the refits
    assert stage_keys(plain, "plan")["plan"] != stage_keys(tuned, "plan")["plan"]
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


def test_a_distillation_that_brings_nothing_closer_is_left_out(
    place: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines: list[str] = []
    run = Run(recipe(place, "recover.finetune.epochs=2", "recover.finetune.lr=5"), place / "out", log=lines.append)
    told = run.until("recover")
    assert told["steps"] == ["reconstruct"]
    assert told["left_out"] == ["finetune"]
    assert all(epoch["held_out"] > epoch["held_out_before"] for epoch in told["epochs"])
    assert "no epoch came closer" in caplog.text
    learnt, held = kept_back(run.recipe, run.inputs.images.scored)
    assert (len(learnt), len(held)) == (told["reconstruct_images"], 1) == (11, 1)
    before = tp.load(place / "out" / "pruned")
    by_hand = tp.reconstruct(before, run.inputs.loader(learnt), run.inputs.dense, run.recipe.closed_form())
    assert_same_state(tp.load(place / "out").state_dict(), by_hand.state_dict())
    assert sum("held-out" in line and "(before: " in line for line in lines) == 2


def test_nothing_is_kept_back_where_nothing_is_distilled_or_images_are_few(place: Path) -> None:  # noqa: F811
    plain, tuned = recipe(place), recipe(place, *TUNED)
    pool = Run(plain, place / "out").inputs.images.scored
    assert kept_back(plain, pool)[1] is None
    assert kept_back(tuned, pool.sample(9))[1] is None
    many = Pool("many", lambda position, augment: torch.zeros(1), list(map(str, range(25_000))))
    learnt, held = kept_back(tuned, many)
    assert (len(learnt), len(held)) == (24_000, 1000)
    assert not set(learnt.positions) & set(held.positions)


def test_a_stopped_distillation_goes_on_where_it_was(place: Path) -> None:  # noqa: F811
    weights = load_file(place / "weights.safetensors")
    for name, value in weights.items():  # last norms of blocks begin at zero: nothing that was cut would be missed
        if value.ndim == 1 and name.endswith(".weight"):
            value.fill_(1)
    weights["fc.weight"] *= 30
    save_file(weights, place / "weights.safetensors")
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
