"""Blocks in recipes and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import timm
import torch
from safetensors.torch import save_file

import tpvprune as tp
from tests.block_cases import built, gone_with
from tests.helpers import gap, outputs, plan_without
from tests.test_cli import CLASSES, call, make_images
from tpvprune.recipe import validate_recipe
from tpvprune.runfolder import stage_keys
from tpvprune.workflow import Run

BLOCK = "layer1.0"  # the only block of test_resnet without a layer in its shortcut


@pytest.fixture
def place(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=CLASSES).state_dict(), tmp_path / "weights.safetensors")
    make_images(tmp_path / "images", 24)
    return tmp_path


def written(place: Path) -> dict[str, Any]:
    return {
        "name": "mine",
        "model": {
            "name": "test_resnet",
            "checkpoint": str(place / "weights.safetensors"),
            "args": {"num_classes": CLASSES},
        },
        "data": {"images": str(place / "images"), "size": 32, "batch_size": 6},
        "recover": {"finetune": None},
    }


def recipe(place: Path, *overrides: str) -> Any:
    return validate_recipe(written(place), "mine.yaml", overrides)


@pytest.mark.parametrize("more", [(), ("plan.steps=2", "score.compensated=false"), ("plan.allocator=joint",)])
def test_a_recipe_with_depth_skips_blocks_and_its_model_is_loaded(place: Path, more: tuple[str, ...]) -> None:
    # The last norm of each block starts at zero: skipping one changes nothing, and so it goes first.
    run = Run(recipe(place, "plan.depth=true", "budget.macs=0.5", *more), place / "out")
    told = run.until("report")
    assert not run.plan.mask(BLOCK).any()
    assert told["got"]["macs"]["value"] == run.plan.macs <= 0.5 * run.graph.macs()
    small = tp.load(place / "out")
    assert isinstance(small.get_submodule(BLOCK), torch.nn.Identity)
    assert sum(p.numel() for p in small.parameters()) == run.plan.params == told["pruned"]["params"]


def test_depth_is_part_of_what_was_traced(place: Path) -> None:
    flat, deep = recipe(place), recipe(place, "plan.depth=true")
    one, other = stage_keys(flat, "plan"), stage_keys(deep, "plan")
    assert not [stage for stage in one if one[stage] == other[stage]]
    out = place / "out"
    Run(flat, out).until("plan")
    assert BLOCK not in Run(flat, out).graph
    Run(deep, out).until("plan")
    assert BLOCK in Run(deep, out).graph
    stored = json.loads((out / "stages.json").read_text())
    assert {stage: state["key"] for stage, state in stored.items()} == other
    assert recipe(place, "plan.depth=false") == flat


@pytest.mark.parametrize("overrides", [("score.criterion=wanda",), ("score.criterion=l1",)])
def test_criteria_that_do_not_score_blocks_say_so(place: Path, overrides: tuple[str, ...]) -> None:
    with pytest.raises(tp.InputError, match=r"block 'layer1\.0' leaves as a whole"):
        Run(recipe(place, "plan.depth=true", *overrides), place / "out").until("score")


def test_verbs_show_blocks(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = place / "mine.yaml", place / "out"
    path.write_text(json.dumps({**written(place), "plan": {"depth": True, "allocator": "joint"}}))
    for words in (
        ["inspect", path],
        ["sensitivity", path, "-o", place / "curves", "--measured", "--shares", "0.75", "0.5"],
        ["trace", path, "-o", out],
        ["plan", path, "-o", out],
        ["plans", "show", out / "plan.json"],
    ):
        code, text, _ = call(capsys, monkeypatch, *map(str, words))
        assert code == 0
        if words[0] == "plan":
            continue
        row = next(line.split("\t") for line in text.splitlines() if line.startswith(f"{BLOCK}\t"))
        if words[0] == "inspect":
            assert row[1:4] == ["block", "0", "-"]
            assert row[4:6] == ["28.8%", "28.8%"]
        if words[0] == "sensitivity":
            assert text.count("\tgone\t") == 1
            assert row[1:6] == ["1", "predicted", "-", "-", "0"]
        if words[0] == "trace":
            assert row[1:3] == ["block", "1"]
        if words[0] == "plans":
            assert row[1:] == ["block", "1", "0"]
            assert "blocks\t1\t0" in text


def test_plans_with_blocks_are_compared_and_fit_the_schema(tmp_path: Path) -> None:
    schema = json.loads((Path(__file__).parents[1] / "docs/plan.schema.json").read_text(encoding="utf-8"))
    for name in ("stages", "mixing", "vit"):
        b = built(name)
        plan = plan_without(b.graph, gone_with(b, b.blocks[:1], 0))
        jsonschema.Draft202012Validator(schema).validate(plan.to_json())
        plan.save(tmp_path / "plan.json")
        again = tp.Plan.load(tmp_path / "plan.json")
        assert again.diff(plan) == {}
        assert gap(outputs(tp.apply(b.model, again), b.inputs), outputs(tp.apply(b.model, plan), b.inputs)) == 0
