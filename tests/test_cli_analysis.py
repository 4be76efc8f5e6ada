"""`tpvprune tpv`, `select` and `advise` as a user meets them."""

from __future__ import annotations

import json

import numpy
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

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


def test_steps_of_more_images_than_there_are_name_the_options(place, run):  # noqa: F811
    code, told, said = run("tpv", "test_resnet", *SMALL, *GIVEN, "--samples", "8")
    assert (code, told) == (2, "")
    assert "--batch-size 32 is more than the 8 training images there are" in said
    assert "--samples 8" in said
    assert run("tpv", "test_resnet", *SMALL, *GIVEN, "--samples", "8", "--noise", "quant", "--draws", "2")[0] == 0


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


def test_what_a_budget_protects_is_no_more_pruned_by_advice_and_noise(place, run):  # noqa: F811
    whole = ["budget.protect=['*']"]
    words = [*SMALL, *GIVEN, "--samples", "12", "--json"]
    kept = []
    for more in ([], whole, ["budget.protect=[layer1*]"]):
        code, told, _ = run("advise", "test_resnet", *words, "--drift", "3.0", *more)
        assert code == 0
        kept.append({one["id"]: one["kept"] < one["units"] for one in json.loads(told)["groups"]})
    assert any(kept[0].values())
    assert not any(kept[1].values())
    assert any(kept[2].values())
    assert not any(cut for name, cut in kept[2].items() if name.startswith("layer1"))
    code, _, said = run("tpv", "test_resnet", *words, "--noise", "prune", "--macs", "0.9", *whole)
    assert code == 2
    assert "cannot be reached" in said


def test_select_counts_the_images_that_have_a_label(place, run):  # noqa: F811
    inputs, labels = torch.randn(8, 3, 32, 32), torch.tensor([0, -1, 1, 2, 0, -1, 2, 1])
    numpy.savez("some.npz", x=inputs.numpy(), y=labels.numpy())
    numpy.savez("none.npz", x=inputs.numpy(), y=numpy.full(8, -1))
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet", num_classes=CLASSES).state_dict(), place / "1.safetensors")
    sets = [word for one in SMALL for word in ("--set", one)]
    words = ["select", "weights.safetensors", "1.safetensors", "--model", "test_resnet", *sets, "--samples", "4"]
    code, told, said = run(*words, "--data", "some.npz", "--labels", "own", "--json")
    assert code == 0, said
    found = json.loads(told)
    assert (found["correlation"]["low"], found["correlation"]["high"]) == (None, None)
    model = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    model.load_state_dict(load_file("weights.safetensors"))
    with torch.no_grad():
        loss = functional.cross_entropy(model(inputs[[3, 7]]).double(), labels[[3, 7]])  # odd places, with labels
    assert found["loss"]["weights.safetensors"] == pytest.approx(float(loss), rel=1e-5)
    assert "loss " in run(*words, "--data", "some.npz", "--labels", "own")[1]
    code, _, said = run(*words, "--data", "none.npz", "--labels", "own")
    assert code == 2
    assert "no held-out image has a label" in said


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
