"""A run's score stage: the criterion that a recipe names, and going on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import tpvprune as tp
from tests.helpers import assert_scores_close
from tests.test_cli import CLASSES, make_images
from tpvprune.recipe import validate_recipe
from tpvprune.workflow import Run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=CLASSES).state_dict(), tmp_path / "weights.safetensors")
    make_images(tmp_path / "images", 24)
    return tmp_path


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
    (partial,) = (place / "broken").glob("*.partial.safetensors")
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
    assert not list((place / "broken").glob("*.partial.safetensors"))


def test_other_settings_do_not_go_on_from_the_partial_scores(place: Path):
    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "score" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(recipe(place), place / "out", progress=stop).until("score")
    told = Run(recipe(place, "score.head=logits"), place / "out").until("score")
    assert told["images"] == 12
    assert "logits" in told["criterion"]
    assert not list((place / "out").glob("*.partial.safetensors"))


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
    told = Run(recipe(place), place / "out").until("score")
    assert 0 <= told["wrong_side"] <= 0.5
    assert -1 <= told["rank_correlation"] <= 1
    assert told["samples_to_settle"] > 12
