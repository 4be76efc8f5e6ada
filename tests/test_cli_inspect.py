"""`tpvprune inspect` and `tpvprune sensitivity` as a user meets them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import torch
from rich.console import Console
from safetensors.torch import save_file

import tpvprune as tp
from tests.test_cli import CLASSES, call, make_images
from tpvprune import console, groupwise, lookcli
from tpvprune.lookcli import brief
from tpvprune.zoo.models import create_model

ARGS = f"model.args.num_classes={CLASSES}"
SMALL = [ARGS, "data.size=32", "data.batch_size=8"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint and 24 images, as the current directory."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=CLASSES).state_dict(), tmp_path / "weights.safetensors")
    make_images(tmp_path / "images", 24)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    return lambda *words: call(capsys, monkeypatch, *words)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed on a terminal of 100 columns."""
    seen = io.StringIO()
    screen = Console(file=seen, width=100, force_terminal=True, color_system=None, soft_wrap=True)
    monkeypatch.setattr(console, "out", screen)
    monkeypatch.setattr(lookcli, "out", screen)
    return seen


def rows_of(told: str) -> dict[str, list[str]]:
    return {line.split("\t")[0]: line.split("\t")[1:] for line in told.splitlines() if "\t" in line}


def test_inspect_needs_no_data_and_writes_nothing(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, told, _ = run("inspect", "test_resnet")
    assert code == 0
    graph = tp.trace(create_model("test_resnet"), torch.zeros(1, 3, 160, 160))
    found = tp.inspect(graph)
    rows = rows_of(told)
    assert rows["macs"][:2] == [f"{graph.macs():,}", f"{found.floors['macs']:,}"]
    assert rows["params"][:2] == [f"{graph.params():,}", f"{found.floors['params']:,}"]
    for group in found.groups:
        assert group.id in rows
    one = next(group for group in found.groups if group.id == "layer1.0.conv1")
    shares = [f"{side[q]:.1%}" for q in ("macs", "params") for side in (one.holds, one.saves)]
    assert rows["layer1.0.conv1"] == ["32", "4", "layer1.0.conv2", *shares]
    assert rows["its outputs are the model's outputs"][0] == "fc"
    assert "cannot be reached" not in told
    assert "can be reached" not in told
    assert list(tmp_path.iterdir()) == []


def test_inspect_as_json_is_the_python_answer_every_time(place, run):
    code, told, _ = run("inspect", "test_resnet", "--json")
    assert code == 0
    graph = tp.trace(create_model("test_resnet"), torch.zeros(1, 3, 160, 160))
    wanted = {"model": "test_resnet", **json.loads(json.dumps(tp.inspect(graph).to_json()))}
    assert json.loads(told) == wanted
    assert run("inspect", "test_resnet", "--json")[1] == told
    assert run("inspect", "test_resnet", ARGS, "--checkpoint", "weights.safetensors")[0] == 0


def test_inspect_at_another_size(run):
    small, large = (json.loads(run("inspect", "test_resnet", "--size", size, "--json")[1]) for size in ("32", "64"))
    assert small["totals"]["params"] == large["totals"]["params"]
    assert small["totals"]["macs"] < large["totals"]["macs"]


def test_inspect_says_whether_a_budget_can_be_reached(run):
    code, told, _ = run("inspect", "test_resnet", "--macs", "0.5", "--params", "1%")
    assert code == 0
    assert re.search(r"macs <= [\d,]+ \(0.5\) can be reached: the floor is [\d,]+ \(2.1%\)", told)
    assert re.search(r"params <= [\d,]+ \(1%\) cannot be reached: the floor is [\d,]+ \(5.5%\); ask for more", told)
    asks = json.loads(run("inspect", "test_resnet", "--bytes", "20KB", "--json")[1])["asks"]
    assert [(ask["quantity"], ask["at_most"], ask["reachable"]) for ask in asks] == [("bytes", 20_000, False)]
    code, told, _ = run("inspect", "test_resnet", "budget.min_keep=0.8", "budget.macs=0.5")
    assert "(min_keep=0.8)" in told
    assert "cannot be reached" in told


def test_inspect_takes_recipes_and_folders_of_runs(place, run):
    code, told, _ = run("inspect", "quickstart", "--json")
    assert code == 0
    assert [one["model"] for one in json.loads(told)] == [one["model"] for one in json.loads(told) if one["asks"]]
    assert run("trace", "test_resnet", ARGS, "--checkpoint", "weights.safetensors", "--out", "out")[0] == 0
    (place / "weights.safetensors").unlink()
    code, told, _ = run("inspect", "out", "--json")
    assert code == 0
    graph = tp.Graph.load("out/graph.json")
    assert json.loads(told)["totals"] == {"macs": graph.macs(), "params": graph.params()}
    code, _, said = run("inspect", "out", "--size", "64")
    assert code == 2
    assert "no checkpoint at weights.safetensors" in said, "another size is traced anew"


@pytest.mark.parametrize(
    ("words", "phrases"),
    [
        (["inspect", "tst_resnet"], ["'tst_resnet'", "nor is it a model", "test_resnet"]),
        (["plan", "show", "plan.json"], ["there is no recipe 'show'", "for a plan that is there: tpvprune plans show"]),
        (["inspect", "test_resnet", "--macs", "half"], ["macs='half' is no amount"]),
        (["inspect", "test_resnet", "--checkpoint", "nowhere.pth"], ["no checkpoint at nowhere.pth"]),
        (["inspect", "test_resnet", "budget.protect=[layr1]", "budget.macs=0.5"], ["'layr1' matches no layer"]),
        (["sensitivity", "test_resnet"], ["no images are named", "--data"]),
        (["sensitivity", "test_resnet", "--data", "nowhere"], ["no folder of images at nowhere"]),
        (["sensitivity", "test_resnet", "--data", "images", "--shares", "0.5", "1.5"], ["a share of 1.5", "0 and 1"]),
        (["sensitivity", "test_resnet", "--data", "images", "--at", "0.3"], ["--at 0.3 is none of the shares 0.9"]),
        (["sensitivity", "test_resnet", "--data", "images", "--shares", "half"], ["--shares", "valid number"]),
    ],
)
def test_bad_input_exits_2_and_writes_nothing(place, run, words, phrases):
    code, told, said = run(*words)
    assert code == 2
    assert told == ""
    for phrase in phrases:
        assert phrase in said
    assert not (place / "runs").exists()


def look(run, *more: str, target: str = "test_resnet") -> tuple[int, str, str]:
    words = ["sensitivity", target, *SMALL, "--checkpoint", "weights.safetensors", "--data", "images"]
    return run(*words, *more)


def test_sensitivity_measures_once_and_saves_what_it_found(place, run, monkeypatch):
    code, told, said = look(run, "--measured", "--plot", "--shares", "0.75", "0.5", "--json")
    assert code == 0
    assert "score: " in said
    folder = place / "runs/test_resnet/sensitivity"
    found = tp.SensitivityCurves.load(folder / "sensitivity.json")
    answer = json.loads(told)
    assert found.shares == (0.75, 0.5)
    assert (found.samples, found.measured_images) == (12, 12)
    assert answer["ranked"] == [curve.group for curve in found.ranked()]
    assert answer["curves"] == json.loads(json.dumps(found.to_json()))["curves"]
    assert all(p.measured_kl is not None for curve in found.curves for p in curve.points)
    assert found.unprunable == {"fc": "its outputs are the model's outputs"}
    names = {text.text for text in ElementTree.parse(folder / "sensitivity.svg").iter() if text.tag.endswith("text")}
    assert {curve.group for curve in found.curves} <= names

    def never(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(groupwise, "compare", never)
    before = (folder / "sensitivity.svg").read_bytes()
    code, told, said = look(run, "--measured", "--plot", "--shares", "0.75", "0.5", "--at", "0.75")
    assert code == 0
    assert "score: " not in said
    assert (folder / "sensitivity.svg").read_bytes() != before, "ranked at another share"
    assert tp.SensitivityCurves.load(folder / "sensitivity.json") == found
    lines = [line.split("\t") for line in told.splitlines() if "\t" in line]
    assert lines[0] == ["group", "units", "KL keeping", "0.75", "0.5", "saves", "per 1%"]
    shown = [line[0] for line in lines[1:] if line[2:3] == ["predicted"]]
    assert shown == [curve.group for curve in found.ranked(0.75)]
    assert lines[-1] == ["its outputs are the model's outputs", "fc"]
    assert lines[-2] == ["cannot be pruned", "layers"]
    first = found.ranked(0.75)[0]
    assert lines[1][3:5] == [f"{p.predicted_kl:.2g}" for p in first.points]
    assert lines[2][:5] == [first.group, "", "measured", *(f"{p.measured_kl:.2g}" for p in first.points)]


def test_sensitivity_agrees_with_python_and_measures_on_other_images(place, run):
    assert look(run, "--measured", "--shares", "0.5")[0] == 0
    folder = Path("runs/test_resnet/sensitivity")
    found = tp.SensitivityCurves.load(folder / "sensitivity.json")
    model = create_model("test_resnet", "weights.safetensors", {"num_classes": CLASSES})
    graph, scores = tp.Graph.load(folder / "graph.json"), tp.Scores.load(folder / "scores.safetensors")
    pool = tp.zoo.data.open_pool("images", model, size=32)
    again = tp.sensitivity(model, (), graph, scores, (0.5,), pool.split()[1].loader(8))
    for mine, theirs in zip(again.curves, found.curves, strict=True):
        assert mine.points[0].measured_kl == pytest.approx(theirs.points[0].measured_kl, rel=1e-9)
        assert mine.points[0].predicted_kl == theirs.points[0].predicted_kl


def test_without_measuring_no_image_is_held_to_have_been_measured(place, run):
    code, told, _ = look(run, "--samples", "6")
    assert code == 0
    found = tp.SensitivityCurves.load("runs/test_resnet/sensitivity/sensitivity.json")
    assert found.samples == 6
    assert found.measured_images is None
    assert found.shares == (0.9, 0.75, 0.5, 0.25)
    assert "measured" not in told
    assert look(run, "--samples", "6", "--measured", "--shares", "0.5")[0] == 0
    assert tp.SensitivityCurves.load("runs/test_resnet/sensitivity/sensitivity.json").measured_images == 6


@pytest.mark.parametrize(("compensated", "again"), [("false", False), ("true", True)])
def test_scores_of_a_run_are_taken_where_they_hold_what_is_needed(place, run, compensated, again):
    words = ["score", "test_resnet", *SMALL, f"score.compensated={compensated}", "--out", "out"]
    assert run(*words, "--checkpoint", "weights.safetensors", "--data", "images")[0] == 0
    before = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    code, _, said = run("sensitivity", "out")
    assert code == 0
    assert ("score: " in said) == again
    assert "trace: " not in said
    after = {path.name: path.read_bytes() for path in (place / "out").iterdir() if path.is_file()}
    assert after == before, "the run that was looked at stays as it is"
    scores = tp.Scores.load("out/sensitivity/scores.safetensors")
    assert scores.in_nats
    assert scores.sensitivities is not None
    assert (tp.Scores.load("out/scores.safetensors").sensitivities is None) == again


def test_a_stopped_sensitivity_goes_on(place, run, monkeypatch):
    compare, calls = groupwise.compare, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compare(*args, **kwargs)

    monkeypatch.setattr(groupwise, "compare", stopping)
    assert look(run, "--measured", "--shares", "0.5", "--out", "mine")[0] not in (0, 2)
    assert look(run, "--measured", "--shares", "0.5", "--out", "mine")[0] == 0
    assert len(calls) == 1 + len(tp.SensitivityCurves.load("mine/sensitivity.json").curves)


def test_a_plot_without_matplotlib_is_refused_before_anything_is_done(place, run, monkeypatch):
    monkeypatch.setattr("tpvprune.plots.find_spec", lambda name: None)
    code, told, said = look(run, "--plot")
    assert code == 2
    assert told == ""
    assert "tpvprune[report]" in said
    assert not (place / "runs").exists()


def test_tables_fit_a_terminal_of_100_columns(place, run, terminal):
    for model in ("test_resnet", "test_vit", "swin_tiny_patch4_window7_224"):
        assert run("inspect", model, "--macs", "0.5")[0] == 0
    assert look(run, "--measured", "--shares", "0.75", "0.5")[0] == 0
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 100
    assert [line for line in lines if len(line) > 100 and line[:1] in "┏┃┡│└"] == []
    whole = terminal.getvalue()
    for name in (
        "layer4.0.conv2",
        "layers.2.blocks.5.mlp.fc1",
        "its outputs are the",
        "12 heads of 32",
    ):
        assert name in whole, name


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], ""),
        (["fc"], "fc"),
        (["a.0.x", "a.1.x", "a.2.x"], "a.{0-2}.x"),
        (["a.0.x", "a.2.x", "b", "a.3.x"], "a.{0,2-3}.x, b"),
        (["a.0.x1", "a.0.x2", "a.1.x1", "a.1.x2"], "a.{0-1}.x{1-2}"),
        (["a.0.x1", "a.0.x2", "a.1.x1"], "a.0.x{1-2}, a.1.x1"),
        (["blocks.9.fc", "blocks.10.fc", "head"], "blocks.{9-10}.fc, head"),
        (["a1", "a1.b2", "a2.b2"], "a1, a{1-2}.b2"),
    ],
)
def test_names_that_differ_in_a_number_are_written_as_one(names, told):
    assert brief(names) == told


def test_milliseconds_are_shown_and_judged_where_asked_for(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, told, _ = run(
        "inspect", "test_resnet", "latency.batch_size=1", "--size", "32", "--latency-ms", "0.6", "--json"
    )
    assert code == 0
    found = json.loads(told)
    assert 0 < found["floors"]["latency_ms"] <= found["totals"]["latency_ms"]
    assert all(0 <= group["saves"]["latency_ms"] <= 1 for group in found["groups"])
    (ask,) = found["asks"]
    assert ask["quantity"] == "latency_ms"
    code, told, _ = run("inspect", "test_resnet", "latency.batch_size=1", "--size", "32", "--latency")
    assert code == 0
    assert "milliseconds of a batch of 1" in told
    assert "latency_ms" in told
