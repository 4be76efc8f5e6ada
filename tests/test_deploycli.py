"""`export` and `bench` as a user meets them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch

import tpvprune as tp
from tests.test_cli import call

SIZE = 32


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """With a saved model in `small`, in the current directory."""
    torch.manual_seed(0)
    dense = timm.create_model("test_resnet", num_classes=3).eval()
    graph = tp.trace(dense, torch.zeros(1, 3, SIZE, SIZE))
    plan = tp.allocate(tp.score(dense, [], graph, tp.L1()), graph, tp.Budget(macs=0.5))
    tp.save(tp.apply(dense, plan), tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    return lambda *words: call(capsys, monkeypatch, *words)


@pytest.mark.parametrize(
    ("kind", "suffix"), [("onnx", "onnx"), ("torch-export", "pt2"), ("timm-state-dict", "safetensors")]
)
def test_export_prints_sizes_and_the_largest_difference(run, tmp_path: Path, kind: str, suffix: str):
    code, told, _ = run("export", "small", "--format", kind, "--size", str(SIZE), "--json")
    assert code == 0
    found = json.loads(told)
    file = tmp_path / "small" / "export" / f"model.{suffix}"
    assert found["path"] == str(Path("small/export") / file.name)
    assert found["bytes"] == file.stat().st_size < found["dense_bytes"]
    assert found["params"] == tp.plan.plan_of(tp.load("small")).params < found["dense_params"]
    assert found["difference"] <= 1e-5 * found["largest"]
    assert tp.load("small")


def test_export_in_words(run):
    code, told, _ = run("export", "small", "-f", "timm-state-dict", "-o", "weights.safetensors")
    assert code == 0
    assert told.splitlines()[0] == "timm-state-dict\tdense\tpruned\tshare"
    assert "largest difference from the model 0, " in told
    assert told.splitlines()[-1] == "weights.safetensors"
    assert Path("weights.safetensors").is_file()


def test_a_file_of_another_format_is_not_replaced(run):
    Path("weights.onnx").write_text("something")
    for kind, suffix in (("torch-export", ".pt2"), ("timm-state-dict", ".safetensors")):
        code, told, said = run("export", "small", "-f", kind, "-o", "weights.onnx")
        assert code == 2
        assert told == ""
        assert f"ends as a file of onnx does, and {kind} is asked for; name one that ends in {suffix}" in said
    assert Path("weights.onnx").read_text() == "something"


def test_bench_says_what_it_measured(run):
    words = ["bench", "small", "--runtime", "eager", "--batch", "1,2", "--rounds", "2", "--threads", "1"]
    before = torch.get_num_threads()
    code, told, _ = run(*words)
    assert code == 0
    lines = [line.split("\t") for line in told.splitlines()]
    assert [line[:2] for line in lines[:3]] == [["runtime", "batch"], ["eager", "1"], ["eager", "2"]]
    plan = tp.plan.plan_of(tp.load("small"))
    assert ["macs", f"{plan.graph.macs():,}", f"{plan.macs:,}", f"{plan.macs / plan.graph.macs():.1%}"] in lines
    assert "of 2 passes in turns" in told
    assert "1 thread(s), input 3x32x32" in told  # what the plan was made for, not the 160 pixels of timm
    assert torch.get_num_threads() == before
    assert "input 3x48x48" in run(*words, "--size", "48")[1]
    code, told, _ = run(*words, "--against", "small", "--json")
    assert code == 0
    found = json.loads(told)
    assert found["models"]["dense"] == found["models"]["pruned"]
    assert found["findings"] == ["multiply-adds fell by 0%, so no time is saved"]


def test_runtimes_that_are_all_skipped_are_an_error(run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as where it is not installed
    words = ["bench", "small", "--batch", "1", "--rounds", "2", "--runtime"]
    code, told, said = run(*words, "onnxruntime")
    assert (code, told) == (2, "")
    assert "--runtime onnxruntime leaves nothing to time: onnxruntime was skipped: " in said
    code, told, _ = run(*words, "eager,onnxruntime")
    assert code == 0
    assert "onnxruntime was skipped: " in told


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["export", "small", "--format", "tflite"], "--format tflite is none of onnx, torch-export"),
        (["export", "nowhere"], "holds no tpvprune.json"),
        (["bench", "small", "--batch", "one"], "--batch one is no list"),
        (["bench", "small", "--runtime", "eagre"], "'eagre' is none of eager, compiled"),
        (["bench", "small", "--device", "abacus"], "abacus"),
        (["bench", "small", "--against", "tst_resnet"], "no model 'tst_resnet'"),
    ],
)
def test_wrong_words_exit_2(run, words: list[str], phrase: str):
    code, told, said = run(*words)
    assert code == 2
    assert told == ""
    assert phrase in said


def test_a_model_that_is_not_known_by_name_says_so(run, tmp_path: Path):
    from tests.helpers import built, plan_without

    b = built("mlp")
    tp.save(tp.apply(b.model, plan_without(b.graph, {b.graph.groups[0].id: [0]})), tmp_path / "own")
    code, _, said = run("export", "own")
    assert code == 2
    assert "not known by name" in said
