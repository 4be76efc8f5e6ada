"""`tpvprune tpv`, `select` and `advise` as a user meets them."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.test_cli import CLASSES
from tests.test_cli_inspect import SMALL, place, run  # noqa: F401

GIVEN = ["--checkpoint", "weights.safetensors", "--data", "images"]


def test_tpv_of_every_noise_on_training_and_held_out_images(place, run):  # noqa: F811
    few = ["--samples", "8", "--draws", "2", "--steps", "3", "--batch-size", "4", "--bits", "4", "--macs", "0.9"]
    noises = [word for name in ("sgd", "label", "quant", "prune") for word in ("--noise", name)]
    code, told, _ = run("tpv", "test_resnet", *SMALL, *GIVEN, *few, *noises, "--json")
    assert code == 0
    found = json.loads(told)
    forms = [(one["noise"].split(",")[0], one["form"]) for one in found["findings"]]
    assert forms == [
        ("sgd", "trace"),
        ("sgd", "empirical"),
        ("label", "closed"),
        ("label", "empirical"),
        ("quant", "trace"),
        ("quant", "empirical"),
        ("quant", "rounded"),
        ("prune", "trace"),
        ("prune", "empirical"),
    ]
    for one in found["findings"]:
        assert one["test"]["samples"] == 8
        if one["noise"].startswith("prune"):  # an untrained network has channels that do nothing
            continue
        assert one["train"]["value"] > 0
        assert one["ratio"]["value"] == pytest.approx(one["train"]["value"] / one["test"]["value"])
    code, told, _ = run("tpv", "test_resnet", *SMALL, *GIVEN, *few, "--noise", "quant", "--form", "empirical")
    assert code == 0
    assert "quant, 4 bits a tensor\tempirical\t" in told
    assert not (place / "runs").exists()


def test_tpv_of_a_plan_that_moves_nothing_is_said_in_valid_json(place, run):  # noqa: F811
    weights = timm.create_model("test_resnet", num_classes=CLASSES).state_dict()
    still = {key: torch.zeros_like(value) if key.startswith("fc.") else value for key, value in weights.items()}
    save_file(still, "still.safetensors")
    given = ["--checkpoint", "still.safetensors", "--data", "images", "--samples", "8"]
    code, text, _ = run("tpv", "test_resnet", *SMALL, *given, "--noise", "prune", "--macs", "0.9", "--json")
    assert code == 0
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    (empirical,) = (one for one in found["findings"] if one["form"] == "empirical")
    assert empirical["train"]["value"] == 0
    assert empirical["ratio"] == {"value": None, "stderr": None, "samples": 8}


def test_tpv_says_what_is_missing(place, run):  # noqa: F811
    code, _, told = run("tpv", "test_resnet", *SMALL, *GIVEN, "--noise", "heat")
    assert code == 2
    assert "--noise heat is not known; give some of sgd, label, quant, prune" in told
    code, _, told = run("tpv", "test_resnet", *SMALL, *GIVEN, "--noise", "prune")
    assert code == 2
    assert "--noise prune needs --macs" in told
    code, _, told = run("tpv", "test_resnet")
    assert code == 2
    assert "no images are named" in told
    code, _, told = run("tpv", "test_resnet", *SMALL, *GIVEN, "--form", "exact")
    assert code == 2
    assert "must be some of trace, empirical" in told


def test_advise_spends_a_budget_on_both_and_measures(place, run):  # noqa: F811
    words = [*SMALL, *GIVEN, "--samples", "12", "--drift", "0.01"]
    code, told, _ = run("advise", "test_resnet", *words, "--bits", "8", "4", "--measured", "--json")
    assert code == 0
    found = json.loads(told)
    assert {tuple(one["kl_at_bits"]) for one in found["layers"]} == {("8", "4")}
    assert found["mixed"]["total"] <= 0.01 + 1e-9
    assert found["measured"]["total"] >= 0
    code, told, _ = run("advise", "test_resnet", *words, "--out", "plan.json")
    assert code == 0
    assert "\nmixed\t" in told
    assert "all weights to 8 bits\t" in told
    assert (place / "plan.json").is_file()
    code, _, told = run("advise", "test_resnet", *words, "--cost", "speed")
    assert code == 2
    assert "cost='speed' must be one of bytes, bitops" in told


def test_select_ranks_checkpoints(place, run):  # noqa: F811
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = timm.create_model("test_resnet", num_classes=CLASSES).state_dict()
        save_file(state, place / f"{seed}.safetensors")
    files = ["1.safetensors", "test_resnet=2.safetensors", "weights.safetensors"]
    sets = [word for one in SMALL for word in ("--set", one)]
    words = ["select", *files, "--model", "test_resnet", "--data", "images", *sets, "--samples", "4"]
    code, told, _ = run(*words, "--json")
    assert code == 0
    found = json.loads(told)
    assert set(found["tpv"]) == set(files)
    values = [one["value"] for one in found["tpv"].values()]
    assert values == sorted(values)
    code, told, _ = run(*words, "--labels", "folders")
    assert code == 0
    assert [line.split("\t")[1] for line in told.splitlines()[1:4]] == list(found["tpv"])
    assert "held-out loss" in told
    assert "rank correlation with the loss" in told
    tuned = json.loads(run(*words, "--method", "fine-tuning", "--steps", "2", "--repeats", "2", "--json")[1])
    assert (tuned["method"], set(tuned["tpv"])) == ("fine-tuning", set(files))
    code, _, told = run("select", "1.safetensors", "2.safetensors", "--data", "images")
    assert code == 2
    assert "of which model? Give --model NAME" in told
    assert not (place / "runs").exists()
