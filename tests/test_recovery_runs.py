"""Recovery by recipe: means folded, refits between steps, a distillation that goes on after a stop."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

import tpvprune as tp
from tests.helpers import assert_same_state
from tests.recovery.test_finetune import kl
from tests.test_cli import make_images
from tests.test_workflow import place, recipe  # noqa: F401  # a fixture
from tpvprune import recovering
from tpvprune.errors import RecipeError
from tpvprune.recipe import Recipe, load_recipe
from tpvprune.recovering import kept_back
from tpvprune.runfolder import stage_keys
from tpvprune.workflow import Run
from tpvprune.zoo.pool import Pool
from tpvprune.zoo.streams import Stream

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
    make_images(place / "images", 80)
    lines: list[str] = []
    wild = ("recover.finetune.epochs=2", "recover.finetune.lr=0.5", "data.batch_size=8")
    run = Run(recipe(place, *wild), place / "out", log=lines.append)
    told = run.until("recover")
    assert told["steps"] == ["reconstruct"]
    assert told["left_out"].startswith("finetune, because on 8 images kept back no epoch came closer")
    assert "finetune_images" not in told
    assert all(epoch["held_out"] > epoch["held_out_before"] for epoch in told["epochs"])
    assert "no epoch came closer" in caplog.text
    learnt, held = kept_back(run.recipe, run.inputs.images.scored)
    assert (len(learnt), len(held), told["reconstruct_images"]) == (32, 8, 32)
    before = tp.load(place / "out" / "pruned")
    by_hand = tp.reconstruct(before, run.inputs.loader(learnt), run.inputs.dense, run.recipe.closed_form())
    assert_same_state(tp.load(place / "out").state_dict(), by_hand.state_dict())
    assert sum("held-out" in line and "(before: " in line for line in lines) == 2

    run.until("report")
    page = (place / "out" / "report.html").read_text()
    assert "Left out: finetune, because on 8 images" in page


def test_a_distillation_that_brings_the_model_closer_is_kept(tmp_path: Path) -> None:
    few = ["recover.reconstruct=null", "recover.finetune.samples=200", "recover.finetune.epochs=3"]
    chosen = load_recipe("quickstart_cnn", [*few, "score.samples=64", "recover.finetune.batch_size=16"])
    assert isinstance(chosen, Recipe)
    run = Run(chosen, tmp_path / "out")
    told = run.until("recover")
    assert told["steps"] == ["finetune"]
    assert "left_out" not in told
    _, held = kept_back(chosen, run.inputs.images.scored)
    assert held is not None
    assert (told["finetune_images"], len(held)) == (200, 20)
    best = min(told["epochs"], key=lambda epoch: epoch["held_out"])
    assert best["held_out"] < 0.5 * best["held_out_before"]
    images = torch.cat([images for images, _ in run.inputs.loader(held)])
    found, dense = tp.load(tmp_path / "out"), run.inputs.dense
    assert kl(found, dense, [images]) == pytest.approx(best["held_out"], rel=1e-3)


@pytest.mark.parametrize(
    ("images", "distilled", "refitted_on", "kept"),
    [
        (3, None, 1000, 0),
        (12, None, 1000, 3),
        (40, None, 1000, 8),
        (300, None, 1000, 30),
        (25_000, None, 1000, 1000),
        (25_000, 500, 1000, 50),
        (25_000, 500, None, 50),
    ],
)
def test_what_is_kept_back_is_drawn_from_all_and_recovered_on_by_none(
    images: int, distilled: int | None, refitted_on: int | None, kept: int, place: Path  # noqa: F811
) -> None:  # fmt: skip
    asked = (f"recover.finetune.samples={distilled or 'null'}", f"recover.reconstruct.samples={refitted_on or 'null'}")
    tuned = recipe(place, "recover.finetune.epochs=1", *asked)
    names = list(map(str, range(images)))
    pool = Pool("many", lambda position, augment: torch.zeros(1), names)
    assert kept_back(recipe(place), pool) == (pool, None)
    learnt, held = kept_back(tuned, pool)
    wanted = [distilled or images, refitted_on or images]
    assert len(learnt) == min(max(wanted), images - kept)
    if not kept:
        assert held is None
        return
    assert len(held) == kept
    assert not set(learnt.positions) & set(held.positions)
    if kept >= 30:  # from all over the pool, at no fixed distance
        assert min(held.positions) < images / 4 < 3 * images / 4 < max(held.positions)
        assert len({b - a for a, b in zip(held.positions, held.positions[1:], strict=False)}) > 5
    stream = Stream("many", [(name, 0) for name in names], lambda image, augment: torch.zeros(1), False)
    ours, theirs = kept_back(tuned, stream)
    assert [len(list(part.images())) for part in (ours, theirs)] == [len(learnt), kept]
    assert not {name for name, _ in ours.images()} & {name for name, _ in theirs.images()}


def test_a_stop_between_the_state_and_the_record_of_an_epoch_loses_neither(
    place: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    one = (*TUNED, "recover.finetune.epochs=1")
    whole = Run(recipe(place, *one), place / "whole").until("recover")
    kept = recovering.write_text

    def stop(path: Path, text: str) -> None:
        kept(path, text)
        if '"loss"' in text:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recovering, "write_text", stop)
        with pytest.raises(KeyboardInterrupt):
            Run(recipe(place, *one), place / "out").until("recover")
    told = Run(recipe(place, *one), place / "out").until("recover")
    assert [epoch["epoch"] for epoch in told["epochs"]] == [1]
    assert told["steps"] == whole["steps"]
    assert_same_state(tp.load(place / "out").state_dict(), tp.load(place / "whole").state_dict())


def test_a_stopped_distillation_goes_on_where_it_was(place: Path) -> None:  # noqa: F811
    whole = Run(recipe(place, *TUNED), place / "whole")
    told = whole.until("recover")
    assert [entry["epoch"] for entry in told["epochs"]] == [1, 2, 3]
    assert all(entry["held_out"] > 0 for entry in told["epochs"])

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
    assert again["steps"] == told["steps"]
    for key in ("loss", "held_out", "held_out_before"):  # each epoch's model is the same
        assert [entry[key] for entry in again["epochs"]] == [entry[key] for entry in told["epochs"]]
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
