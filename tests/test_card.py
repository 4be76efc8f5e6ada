"""What a saved folder says to people and hubs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

import tpvprune as tp
from tests.helpers import built, plan_without, random_gone
from tpvprune.card import MARK, bounds, figure, model_card, numbers
from tpvprune.zoo.models import create_model


def small_timm() -> nn.Module:
    dense = create_model("test_resnet", args={"num_classes": 3, "in_chans": 1})
    graph = tp.trace(dense, torch.zeros(1, 1, 32, 32))
    return tp.apply(dense, tp.allocate(tp.score(dense, [], graph, tp.L1()), graph, tp.Budget(macs=0.5)))


def test_a_saved_folder_carries_a_card_with_its_sizes(tmp_path: Path) -> None:
    small = small_timm()
    tp.save(small, tmp_path)
    card = (tmp_path / "README.md").read_text()
    plan = tp.plan.plan_of(small)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {"library_name": "tpvprune", "tags": ["pruning", "tpvprune", "timm"]}
    assert "# test_resnet, pruned" in card
    assert f"| multiply-adds | {plan.graph.macs():,} | {plan.macs:,} |" in card
    assert f"{plan.macs / plan.graph.macs():.1%} of the multiply-adds" in card
    assert "Multiply-adds are those of one input of 1 x 32 x 32." in card
    for row in plan.summary():
        assert f"| {row['group']} | {row['kind']} | {row['units']:,} | {row['kept']:,} |" in card
    assert str(tmp_path) not in card
    assert 'tpvprune.load(".")' in card


def test_a_model_of_your_own_is_loaded_with_its_skeleton(tmp_path: Path) -> None:
    b = built("mlp")
    tp.save(tp.apply(b.model, plan_without(b.graph, random_gone(b.graph, 0))), tmp_path)
    assert 'tpvprune.load(".", skeleton=make_model())' in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == type(b.model).__name__


def test_the_card_is_written_anew_until_it_is_made_your_own(tmp_path: Path) -> None:
    small = small_timm()
    tp.save(small, tmp_path)
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card.replace("pruned", "shrunk"))
    tp.save(small, tmp_path)
    assert (tmp_path / "README.md").read_text() == card
    mine = card.replace(MARK, "") + "mine"
    (tmp_path / "README.md").write_text(mine)
    tp.save(small, tmp_path)
    assert (tmp_path / "README.md").read_text() == mine


def test_timm_builds_the_dense_original_from_the_config(tmp_path: Path) -> None:
    tp.save(small_timm(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("test_resnet", 3)
    assert config["model_args"] == {"num_classes": 3, "in_chans": 1}
    assert config["pretrained_cfg"]["mean"] == list(timm.create_model("test_resnet").pretrained_cfg["mean"])
    assert not {"url", "hf_hub_id", "file", "architecture"} & set(config["pretrained_cfg"])
    dense = timm.create_model(f"local-dir:{tmp_path}", pretrained=False)
    wanted = create_model("test_resnet", args={"num_classes": 3, "in_chans": 1})
    shapes = {n: t.shape for n, t in wanted.state_dict().items()}
    assert {n: t.shape for n, t in dense.state_dict().items()} == shapes


@pytest.fixture
def report() -> dict[str, object]:
    b = built("mlp")
    labelled = [(b.inputs, torch.tensor([0, 1, 2, 3, 0]))]
    found = tp.prune(b.model, labelled, tp.Budget(macs=0.7), held_out=labelled).report
    return json.loads(json.dumps(found.to_json()))


def test_a_card_with_a_report_says_what_was_asked_and_measured(report) -> None:
    b = built("mlp")
    plan = plan_without(b.graph, random_gone(b.graph, 0))
    card = model_card(plan, {"class": "x.Net"}, report)
    assert "| multiply-adds | 0.7 |" in card
    top1 = [f"{report[name]['metrics']['top1']:.1%}" for name in ("before", "pruned", "recovered")]
    assert f"| accuracy | {' | '.join(top1)} |" in card
    assert f"accuracy went from {top1[0]} to {top1[2]}" in card
    assert "Measured on 5 images, scored on 5 images." in card
    assert f"{report['drift']['predicted_kl']:.4g} predicted" in card
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_numbers_and_bounds_are_those_of_the_report(report) -> None:
    heads, rows = numbers(report)
    assert heads == ["", "before", "pruned", "recovered"]
    assert rows[0] == ["parameters", *(f"{report[name]['params']:,}" for name in heads[1:])]
    report["asked"]["latency_ms"] = {"as_written": "8 ms", "at_most": 8.0}
    report["got"]["latency_ms"] = {"value": 7.5, "share": 0.5, "measured": 9.25}
    assert bounds(report)[-1] == ["milliseconds", "8 ms", "8", "9.25 (predicted 7.5)", "50.0%"]
    assert [figure("kl", v) for v in (None, 1234, 0.123456)] == ["-", "1,234", "0.1235"]


def test_scores_of_weights_alone_are_said_to_be(report) -> None:
    b = built("mlp")
    plan = plan_without(b.graph, random_gone(b.graph, 0))
    assert isinstance(report["data"], dict)
    card = model_card(plan, {"class": "x.Net"}, {**report, "data": {**report["data"], "scored": 0}})
    assert "Measured on 5 images, scored by the weights alone. Milliseconds" in card
