"""The command line as a user meets it: real files in, exit codes, messages and files out."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import tpvprune as tp
from tpvprune import cli
from tpvprune.budget import BOUNDS
from tpvprune.console import number
from tpvprune.runfolder import one_line
from tpvprune.zoo.data import open_pool

CLASSES = 3
SMALL = [f"model.args.num_classes={CLASSES}", "data.size=32", "data.batch_size=8", "recover.finetune.epochs=1"]


class RunsCode:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=CLASSES).state_dict()


@pytest.fixture
def place(tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint and images of three classes, as the current directory."""
    save_file(weights, tmp_path / "weights.safetensors")
    make_images(tmp_path / "images", 24)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        inside = folder / f"class{i % CLASSES}"
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(inside / f"{i:03d}.png")


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error of one command."""
    monkeypatch.setattr(sys, "argv", ["tpvprune", *words])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *words: call(capsys, monkeypatch, *words)


def prune_words(*more: str, checkpoint: str | None = "weights.safetensors", data: str = "images") -> list[str]:
    words = ["prune", "test_resnet", "--data", data, "--out", "out"]
    words += ["--checkpoint", checkpoint] if checkpoint else []
    return [*words, *SMALL, *more]


def test_version_and_module_entry_point():
    said = subprocess.run([sys.executable, "-m", "tpvprune", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == f"tpvprune {tp.__version__}"


def test_what_prune_needs_may_be_keys_too(place, run):
    words = ["prune", "test_resnet", "--out", "out", *(word for word in SMALL if "images" not in word)]
    assert "no budget" in run(*words, "data.images=images", "budget.macs=null")[2]
    assert "--data is missing" in run(*words, "budget.macs=0.6", "data.images=null")[2]
    more = ("model.checkpoint=weights.safetensors", "data.images=images", "budget.units=0.7", "recover.finetune=null")
    code, told, _ = run(*words, *more, "--json")
    assert code == 0
    assert json.loads(told)["asked"].keys() == {"units"}


def test_prune_end_to_end_without_a_recipe(place, run):
    code, told, _ = run(*prune_words("--macs", "0.5", "--labels", "folders"))
    assert code == 0
    report = json.loads((place / "out/report.json").read_text())
    assert {"asked", "got", "before", "pruned", "recovered", "drift", "seconds", "environment"} <= set(report)
    assert report["got"]["macs"]["value"] == report["recovered"]["macs"] <= report["asked"]["macs"]["at_most"]
    for model in ("before", "pruned", "recovered"):
        assert {"params", "macs", "latency_ms", "metrics"} == set(report[model])
        assert {"kl", "agreement", "top1"} == set(report[model]["metrics"])
    assert report["before"]["metrics"]["kl"] == pytest.approx(0, abs=1e-12)
    assert report["drift"]["predicted_kl"] > 0
    assert report["data"]["scored"] == report["data"]["measured"] == 12
    assert set(report["seconds"]) == {"trace", "score", "plan", "apply", "recover", "eval"}
    assert f"{report['recovered']['macs']:,}" in told

    small = tp.load(place / "out")
    assert sum(p.numel() for p in small.parameters()) == report["recovered"]["params"]
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, CLASSES)


def test_piped_output_is_plain_and_json_is_one_document(place, run):
    code, told, _ = run(*prune_words("--macs", "0.6", "recover.finetune=null"))
    assert code == 0
    assert told.splitlines()[0] == "measure\tbefore\tpruned\trecovered"
    assert not any(char in told for char in "┃│━╭")
    code, told, _ = run("report", "out", "--json")
    assert code == 0
    assert list(json.loads(told)["got"]) == ["macs"]


def test_without_labels_no_accuracy_is_claimed(place, run):
    code, told, _ = run(*prune_words("--params", "0.5", "recover.finetune=null", "--json"))
    assert code == 0
    report = json.loads(told)
    assert list(report["got"]) == ["params"]
    assert "top1" not in report["before"]["metrics"]


def test_a_finished_run_is_not_done_again_and_a_changed_key_redoes_what_it_matters_to(place, run):
    assert run(*prune_words("--macs", "0.6", "recover.finetune=null"))[0] == 0
    first = {p.name: p.stat().st_mtime_ns for p in (place / "out").iterdir()}
    code, _, said = run("run", "out")
    assert code == 0
    assert "score:" not in said
    again = {p.name: p.stat().st_mtime_ns for p in (place / "out").iterdir()}
    for name in ("graph.json", "scores.safetensors", "plan.json", "model.safetensors", "report.json"):
        assert first[name] == again[name], name

    code, _, said = run("plan", "out", "budget.macs=0.4")
    assert code == 2, "a finished model is not thrown away"
    assert "another --out" in said
    assert tp.Plan.load(place / "out/plan.json").macs == tp.load(place / "out")._tpvprune_plan.macs

    code, told, said = run("plan", "out", "budget.macs=0.4", "--out", "other", "--json")
    assert code == 0
    assert json.loads(told)["share_of_macs"] <= 0.4
    assert "score:" not in said, "scores are reused for another budget"
    assert run("recover", "other")[0] == 0
    assert (
        sum(p.numel() for p in tp.load(place / "other").parameters()) == tp.Plan.load(place / "other/plan.json").params
    )
    code, told, said = run("eval", "out", "--labels", "folders", "--json")
    assert code == 0
    assert "top1" in json.loads(told)["before"]
    assert "recover:" not in said, "labels matter to the measuring only"


def test_a_run_keeps_its_name_and_its_model(place, run):
    words = ["trace", "test_resnet", *SMALL, "--checkpoint", "weights.safetensors", "--out", "out"]
    assert run(*words)[0] == 0
    for override in ("model.name=test_vit", "name=other"):
        code, _, said = run("trace", "out", override, "--out", "fresh")
        assert code == 2
        assert "out holds a run of 'test_resnet' (test_resnet), which keeps its name and its model" in said
        assert not (place / "fresh").exists(), "nothing is taken along for it"
    words = ["trace", "out/recipe.yaml", "model.name=test_vit", "model.checkpoint=null", "--out", "fresh"]
    assert run(*words)[0] == 0, "as the message says"


def test_new_images_make_old_scores_stale_and_shared_images_are_refused(place, run):
    words = ["score", "test_resnet", *SMALL, "--checkpoint", "weights.safetensors", "--data", "images", "--out", "out"]
    assert run(*words)[0] == 0
    make_images(place / "images", 25)
    code, _, said = run(*words)
    assert code == 0
    assert "score: " in said
    code, _, said = run(*prune_words("--macs", "0.6", "eval.images=images/class0")[:-1], "eval.images=images")
    assert code == 2
    assert "share images" in said


def test_a_finished_run_is_measured_on_other_images_without_being_made_again(place, run):
    for name, count in (("others", 12), ("more", 9)):
        make_images(place / name, count)
    assert run(*prune_words("--macs", "0.6", "recover.finetune=null", "eval.images=others"))[0] == 0
    made = {name: (place / "out" / name).read_bytes() for name in ("scores.safetensors", "model.safetensors")}
    code, _, said = run("eval", "out", "eval.images=more", "--json")
    assert code == 0, said
    assert json.loads((place / "out/report.json").read_text())["data"]["measured"] == 9
    assert "recover:" not in said
    make_images(place / "more", 11)  # two of them are new
    assert run("eval", "out")[0] == 0
    assert json.loads((place / "out/report.json").read_text())["data"]["measured"] == 11
    assert made == {name: (place / "out" / name).read_bytes() for name in made}
    code, _, said = run("eval", "out", "eval.images=null")
    assert code == 2, "half of the scored images would be measured on"
    assert "score would change" in said


def test_lists_of_recipes_are_validated_with_what_they_list(place, run):
    (place / "good.yaml").write_text("name: good\nruns: [quickstart_cnn]\n")
    (place / "bad.yaml").write_text("name: bad\nruns: [nothere]\n")
    assert run("recipes", "validate", "good.yaml")[0] == 0
    code, _, said = run("recipes", "validate", "good.yaml", "bad.yaml")
    assert code == 2
    assert "nothere" in said


def test_an_interrupted_run_goes_on_at_the_stage_it_stopped_in(place, run, monkeypatch):
    words = prune_words("--macs", "0.6")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tpvprune.recovery.recover.finetune", interrupted)
        code, _, _ = run(*words)
    assert code not in (0, 2)
    assert not (place / "out/tpvprune.json").exists(), "nothing half-made may pass for a result"
    plan = (place / "out/plan.json").stat().st_mtime_ns
    code, _, said = run(*words)
    assert code == 0
    assert "score:" not in said
    assert "recover:" in said
    interrupted_state = tp.load(place / "out").state_dict()
    assert plan <= (place / "out/plan.json").stat().st_mtime_ns

    assert run(*words[:5], "whole", *words[6:])[0] == 0
    for name, tensor in tp.load(place / "whole").state_dict().items():
        torch.testing.assert_close(interrupted_state[name], tensor, rtol=0, atol=0)


def test_each_stage_has_a_verb_and_stops_there(place, run):
    flags = ["--checkpoint", "weights.safetensors", "--data", "images", "--out", "out"]
    made = {
        "trace": "graph.json",
        "score": "scores.safetensors",
        "plan": "plan.json",
        "apply": "pruned/tpvprune.json",
        "recover": "tpvprune.json",
        "eval": "report.json",
    }
    left = list(made.values())
    for verb, product in made.items():
        assert not (place / "out" / product).exists()
        code, told, _ = run(verb, "test_resnet", *SMALL, *flags, "--macs", "0.6", "--json")
        assert code == 0
        assert json.loads(told)["stage"] == verb
        left.remove(product)
        assert (place / "out" / product).exists()
        assert not any((place / "out" / later).exists() for later in left)
    assert run("report", "out")[0] == 0


def test_trace_lists_what_stays_whole_and_needs_no_images(place, run):
    code, told, _ = run("trace", "test_resnet", SMALL[0], "--out", "out")
    assert code == 0
    assert "layer1.0.conv1\tchannel\t32\tlayer1.0.conv2" in told
    assert "fc\tits outputs are the model's outputs" in told


def test_a_saved_model_is_measured_alone(place, run):
    assert run(*prune_words("--macs", "0.6", "recover.finetune=null"))[0] == 0
    code, told, _ = run("eval", "out/pruned", "--data", "images", "--labels", "folders", "--json")
    assert code == 0
    measured = json.loads(told)
    assert measured["images"] == 24
    small = tp.load("out/pruned")
    labelled = open_pool("images", small, size=32, labels="folders")  # what it was pruned for, not timm's 160 pixels
    answers = small(torch.stack([labelled[i][0] for i in range(24)])).argmax(1)
    right = answers == torch.tensor([labelled[i][1] for i in range(24)])
    assert measured["top1"] == pytest.approx(float(right.float().mean()))


@pytest.mark.parametrize("name", ["weights.pth", "weights.pth.tar"])
def test_checkpoints_as_timm_writes_them(place, run, weights, name):
    torch.save({"state_dict": weights, "args": argparse.Namespace(lr=0.1), "epoch": 3}, place / name)
    code, _, _ = run("trace", "test_resnet", SMALL[0], "--checkpoint", name, "--out", "out")
    assert code == 0


def test_unreadable_images_are_skipped_and_counted(place, run):
    (place / "images/class0/notes.png").write_text("no image")
    whole = place / "images/class1/001.png"
    whole.write_bytes(whole.read_bytes()[:200])
    code, told, _ = run(*prune_words("--macs", "0.6", "recover.finetune=null", "--json"))
    assert code == 0
    assert json.loads(told)["data"]["skipped"] == 2


def test_unreadable_images_of_two_folders_are_counted_for_each(place, run):
    make_images(place / "others", 12)
    for folder in ("images", "others"):
        (place / folder / "class0" / "000.png").write_bytes(b"no image")
    words = prune_words("--macs", "0.6", "recover.finetune=null", "eval.images=others", "--json")
    code, told, _ = run(*words)
    assert code == 0
    assert json.loads(told)["data"]["skipped"] == 2


def bad_checkpoints(place: Path, weights: dict[str, torch.Tensor]) -> None:
    rng = np.random.default_rng(1)
    (place / "corrupt.safetensors").write_bytes(rng.bytes(500))
    (place / "corrupt.pth").write_bytes(rng.bytes(500))
    torch.save({"state_dict": weights, "extra": RunsCode(place / "ran")}, place / "code.pth")
    (place / "code.pkl.pth").write_bytes(pickle.dumps(RunsCode(place / "ran")))
    poisoned = {name: tensor.clone() for name, tensor in weights.items()}
    poisoned["layer2.0.conv1.weight"][0] = float("nan")
    save_file(poisoned, place / "nan.safetensors")
    save_file({"something.else": torch.zeros(3)}, place / "other.safetensors")
    torch.save({"epoch": 3}, place / "none.pth")


@pytest.mark.parametrize(
    ("checkpoint", "phrases"),
    [
        ("missing.safetensors", ["no checkpoint at missing.safetensors", ".pth.tar"]),
        ("corrupt.safetensors", ["corrupt.safetensors", "damaged"]),
        ("corrupt.pth", ["corrupt.pth", "damaged"]),
        ("code.pth", ["code.pth", "run code", ".safetensors"]),
        ("code.pkl.pth", ["code.pkl.pth", "run code"]),
        ("other.safetensors", ["lacks", "something.else"]),
        ("none.pth", ["none.pth holds no state dict of tensors", "save model.state_dict()"]),
        ("nan.safetensors", ["NaN", "layer2.0.conv1", "check its weights"]),
    ],
)
def test_bad_checkpoints_exit_2_and_write_nothing(place, run, weights, checkpoint, phrases):
    bad_checkpoints(place, weights)
    code, told, said = run(*prune_words("--macs", "0.5", checkpoint=checkpoint))
    assert code == 2
    assert told == ""
    for phrase in phrases:
        assert phrase in said
    assert not (place / "out").exists()
    assert not (place / "ran").exists(), "the checkpoint's code ran"


def test_weights_of_another_shape_name_the_tensor(place, run):
    words = [w for w in prune_words("--macs", "0.5") if "num_classes" not in w]
    code, _, said = run(*words)
    assert code == 2
    assert "'fc.weight' is (3, 96), the model has (1000, 96)" in said
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        (["prune", "tst_resnet", "--data", "images", "--macs", "0.5"], ["no model 'tst_resnet'", "test_resnet"]),
        (["prune", "test_resnet", "--data", "nowhere", "--macs", "0.5"], ["nowhere", "give a folder"]),
        (["prune", "test_resnet", "--data", "empty", "--macs", "0.5"], ["empty holds no image"]),
        (["score", "test_resnet", "--data", "none.npy", "data.size=8"], ["none.npy holds no image; one to score on"]),
        (["score", "test_resnet", "--data", "images/class0/000.png"], ["is one image", "in, images/class0"]),
        (["prune", "test_resnet", "--data", "mixed", "--macs", "0.5"], ["5 of 29 files are no images", "10%"]),
        (
            ["prune", "test_resnet", "--data", "images", "--macs", "0.0001"],
            ["cannot be reached", "the floor is", " 1 layer that cannot"],
        ),
        (
            ["prune", "test_resnet", "--data", "images", "--drift", "0.05", "score.criterion=l1"],
            ["needs scores in nats, and l1 gives none", "score.criterion=tpv"],
        ),
        (
            ["prune", "test_resnet", "--data", "images", "--drift", "0.05", "score.criterion=random"],
            ["needs scores in nats, and random gives none"],
        ),
        (["prune", "test_resnet", "--data", "images", "--macs", "half"], ["macs='half' is no amount", "50%"]),
        (["prune", "test_resnet", "--data", "images"], ["--macs 0.5"]),
        (["prune", "test_resnet", "--macs", "0.5"], ["--data is missing"]),
        (["prune", "test_resnet", "--data", "images", "--macs", "0.5", "--labels", "folders"], ["3 classes", "1000"]),
        (["prune", "test_resnet", "--data", "", "--macs", "0.5"], ["--data is missing; give a folder"]),
        (["prune", "test_resnet", "--data", "images", "--macs", ""], ["no budget"]),
        (["score", "test_resnet", "--data", " "], ["'data.images'", "nothing is named; give a path"]),
        (["score", "test_resnet", "--data", "images", "eval.images=''"], ["eval.images", "nothing is named"]),
        (["score", "test_resnet", "--data", "images", "--labels", ""], ["data.labels", "nothing is named"]),
        (["score", "test_resnet", "--data", "images", "--checkpoint", ""], ["model.checkpoint", "nothing is named"]),
        (
            ["prune", "test_resnet", "--data", "images", "--macs", "0.5", "budget.mac=1"],
            ["did you mean 'macs'"],
        ),
        (
            ["prune", "test_resnet", "--data", "images", "--macs", "0.5", "budget.protect=[layr1]"],
            ["'layr1' matches no layer", "layer1"],
        ),
        (
            ["prune", "test_resnet", "--data", "images", "--macs", "1.0", "sparsify={sparsity: 0.5, protect: [layr1]}"],
            ["sparsify.protect: pattern 'layr1' matches no layer", "did you mean layer1"],
        ),
        (
            ["prune", "test_resnet", "--data", "images", "--macs", "0.5", "recover.finetune.features=[layr1]"],
            ["recover.finetune.features: 'layr1' is no module", "did you mean layer1"],
        ),
        (
            ["prune", "test_resnet", "--data", "images", "--macs", "0.5", "recover.finetune.label_weight=0.5"],
            ["recover.finetune.label_weight=0.5 needs labels", "--labels (data.labels)"],
        ),
        (["prune", "test_resnet", "--data", "images", "--macs", "0.5", "device=abacus"], ["abacus"]),
        (
            ["prune", "test_resnet", "--data", "images", "--macs", "0.5", "budget.macs=0.9"],
            ["'budget.macs=0.9'", "budget.macs is set by 'budget.macs=\"0.5\"' too"],
        ),
        (["plan", "test_resnet", "data.images=images", "--data", "images"], ["data.images is set by", "set it once"]),
        (["run", "quickstrt"], ["no recipe 'quickstrt'", "quickstart"]),
        (["run", "images"], ["no folder of a run"]),
        (["frobnicate"], ["frobnicate"]),
        (["run", "quickstart", "--frobnicate"], ["frobnicate"]),
    ],
)
def test_bad_input_exits_2_names_the_thing_and_writes_nothing(place, run, words, phrases):
    (place / "empty").mkdir()
    np.save(place / "none.npy", np.zeros((0, 3, 8, 8), np.float32))
    make_images(place / "mixed", 24)
    for i in range(5):
        (place / "mixed" / f"{i}.jpg").write_text("no image")
    code, told, said = run(*words, *([] if words[0] == "frobnicate" else ["--out", "out"]))
    assert code == 2
    assert told == ""
    for phrase in phrases:
        assert phrase in said
    assert not (place / "out").exists()


def test_errors_are_json_when_json_is_asked_for(place, run):
    code, told, _ = run("prune", "tst_resnet", "--data", "images", "--macs", "0.5", "--json")
    assert code == 2
    assert json.loads(told)["error"] == "ModelError"


def test_what_others_print_is_kept_out_of_the_document(place, run, monkeypatch):
    def missing(*args, **kwargs):
        sys.stdout.write("Please install something.")
        raise ModuleNotFoundError("No module named 'something'")

    monkeypatch.setattr("tpvprune.zoo.streams.create_dataset", missing)
    code, told, said = run("score", "test_resnet", "--data", "hfds/something", "--json")
    assert code == 2
    assert json.loads(told)["error"] == "DataError"
    assert said.count("Please install something.") == 1
    assert "Please install" in run("score", "test_resnet", "--data", "hfds/something")[1]
    assert json.loads(run("recipes", "ls", "--json")[1])
    code, told, said = run("report", "out", "--markdown", "--json")
    assert code == 2
    assert "--markdown and --json are two forms" in said


def test_a_folder_of_something_else_is_left_alone(place, run):
    code, _, said = run(*prune_words("--macs", "0.5")[:-2], "--macs", "0.5", "--out", "images")
    assert code == 2
    assert "choose another --out" in said
    assert sorted(p.name for p in (place / "images").iterdir()) == ["class0", "class1", "class2"]


def test_recipes_are_listed_shown_copied_and_validated(place, run):
    code, told, _ = run("recipes", "ls", "--json")
    assert code == 0
    assert {"quickstart", "quickstart_cnn", "quickstart_vit"} <= {row["name"] for row in json.loads(told)}
    code, shown, _ = run("recipes", "show", "quickstart_cnn")
    assert code == 0
    assert run("recipes", "copy", "quickstart_cnn", "mine.yaml")[0] == 0
    assert (place / "mine.yaml").read_text().strip() == shown.strip()
    code, _, said = run("recipes", "copy", "quickstart_vit", "mine.yaml")
    assert code == 2
    assert "exists" in said
    (place / "deep/er").mkdir(parents=True)
    (place / "deep/er/bad.yaml").write_text("name: x\nmodel: {nam: y}\n")
    assert run("recipes", "validate", "mine.yaml", "quickstart")[0] == 0
    code, _, said = run("recipes", "validate", "deep")
    assert code == 2
    assert "bad.yaml, line 2" in said


def test_quickstart_cnn_in_short(place, run):
    short = ["score.samples=64", "eval.samples=100", "recover.finetune=null", "recover.reconstruct.samples=128"]
    code, told, _ = run("run", "quickstart_cnn", *short, "--out", "out", "--json")
    assert code == 0
    report = json.loads(told)
    assert report["got"]["macs"]["share"] <= 0.5
    assert report["before"]["metrics"]["top1"] > 0.9
    assert report["recovered"]["metrics"]["kl"] < report["pruned"]["metrics"]["kl"]


@pytest.mark.slow
def test_quickstart_as_the_readme_says(place, run):
    code, told, _ = run("run", "quickstart", "--json")
    assert code == 0
    for report in json.loads(told):
        assert report["got"]["macs"]["share"] <= 0.5
        assert report["recovered"]["metrics"]["top1"] > report["before"]["metrics"]["top1"] - 0.02
        assert (place / report["out"] / "model.safetensors").is_file()


def test_a_finished_run_is_reported_without_its_images(place, run):
    assert run(*prune_words("--macs", "0.6", "recover.finetune=null"))[0] == 0
    (place / "images").rename(place / "elsewhere")
    (place / "weights.safetensors").unlink()
    code, told, _ = run("report", "out", "--json")
    assert code == 0
    assert json.loads(told)["got"]["macs"]["share"] <= 0.6


def test_bounds_are_options_and_replace_those_of_a_recipe(place, run):
    words = prune_words("--bytes", "80%", "--drift", "50", "recover.finetune=null", "--json")
    code, told, _ = run(*words)
    assert code == 0
    assert list(json.loads(told)["got"]) == ["bytes", "drift"]
    code, told, _ = run("plan", "out", "--params", "0.7", "--out", "other", "--json")
    assert code == 0
    assert json.loads(told)["share_of_params"] <= 0.7
    assert yaml.safe_load((place / "other" / "recipe.yaml").read_text())["budget"]["drift"] is None
    code, told, _ = run("plan", "out", "budget.bytes=0.9", "--params", "0.7", "--out", "both", "--json")
    both = yaml.safe_load((place / "both" / "recipe.yaml").read_text())["budget"]
    assert {name: both[name] for name in BOUNDS if both[name]} == {"params": "0.7", "bytes": 0.9}
    code, _, said = run("prune", "test_resnet", "--data", "images")
    assert code == 2
    assert "no budget" in said


def test_truth_is_told_in_words() -> None:
    assert one_line({"settled": False, "images": 1280, "share": 0.5}) == "settled no; images 1,280; share 0.5"
    assert [number(value) for value in (True, False, 1, None)] == ["yes", "no", "1", "-"]


def test_the_help_names_all_that_images_and_labels_can_be(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    for verb in ("prune", "compare", "select", "eval"):
        _, told, _ = run(verb, "--help")
        assert all(word in told for word in ("tar file", ".npz/.npy", "'digits'", "hfds/", "torch/", "wds/"))
        assert all(word in told for word in ("'folders'", "class-map", "'own'", "criteria", "label_weight"))


def test_a_run_that_scored_half_of_its_images_is_measured_on_others_by_its_models_alone(place, run):
    make_images(place / "others", 12)
    assert run(*prune_words("--macs", "0.6", "recover.finetune=null"))[0] == 0
    code, _, said = run("eval", "out", "eval.images=others")
    assert code == 2
    assert "score would change" in said
    tp.save(tp.load("out"), "alone")
    for folder in ("out/pruned", "alone"):
        code, told, _ = run("eval", folder, "--data", "others", "--labels", "folders", "--json")
        assert code == 0
        assert json.loads(told).keys() == {"params", "macs", "latency_ms", "images", "top1"}
