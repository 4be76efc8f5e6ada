"""`torchrun -m tpvprune` makes of a recipe what one process makes of it."""

from __future__ import annotations

import gc
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tpvprune as tp
from tests.forks import digests
from tests.helpers import launch
from tests.test_cli import call

SUMS = 1e-4
"""Of a tensor's largest entry: float32 weights after a refit or a few steps, from sums in another order."""

FEW = ("score.samples=45", "recover.finetune.samples=45", "eval.samples=20", "data.batch_size=10")
TUNED = ("recover.finetune.epochs=2", "recover.finetune.batch_size=22", "recover.finetune.lr=0.0003")
RAW = ("recover.reconstruct=null", "recover.finetune=null")
# Alone and together: batches are dealt out as three and two; one is a process's and the other has none; images are
# shared out by 22, 22 and 1 a step, the last of them to one alone.
SAME: dict[str, list[str]] = {
    "zeros": ["eval", "quickstart_cnn", *FEW, *TUNED, RAW[0], "recover.finetune.augment=false",
              "plan.steps=2", "sparsify.sparsity=0.3", "sparsify.criterion=tpv"],
    "refitted": ["recover", "quickstart_cnn", *FEW[:-1], "data.batch_size=64", RAW[1], "plan.steps=2",
                 "plan.refit=true"],
    "drift": ["plan", "quickstart_cnn", *FEW, *RAW, "budget.macs=0.8", "budget.drift=1.0", "plan.steps=3"],
}  # fmt: skip
SAME["stream"] = [*SAME["zeros"], "data.images=wds/{folder}@part-{0..2}.tar|40"]
ENDS = ["0-of-2.safetensors", "1-of-2.safetensors"]
AUGMENTED = ["recover", "quickstart_cnn", *FEW, TUNED[0], TUNED[2], RAW[0], "recover.finetune.batch_size=16"]
SCORED = ["score", "quickstart_cnn", *FEW, *RAW]
STEPPED = ["plan", *SCORED[1:], "plan.steps=2"]
RUNS: dict[str, list[str]] = {
    **SAME,
    "zeros, again": SAME["zeros"],
    "floor": ["plan", "quickstart_cnn", *FEW, "budget.macs=0.00001"],
    "unmet": ["plan", "quickstart_cnn", *FEW, *RAW, "budget.macs=0.5", "budget.drift=0.00001"],
    "whole": AUGMENTED,
    "parted, stopped": AUGMENTED,
    "parted, gone on with": AUGMENTED,
    "scored, stopped": SCORED,
    "scored, gone on with": SCORED,
    "scored at once": SCORED,
    "stepped": ["score", *STEPPED[1:]],
    "stepped, stopped": STEPPED,
    "stepped, gone on with": STEPPED,
    "stepped at once": STEPPED,
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes: several threads sum in another order, which a refit of badly conditioned inputs enlarges."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    pytest.importorskip("webdataset")
    folder = tmp_path_factory.mktemp("together")
    for number, first in enumerate((0, 7, 20)):  # of unequal sizes, and no multiple of the processes
        write_shard(folder / f"part-{number}.tar", range(first, (7, 20, 40)[number]))
    launch(Path(__file__).with_name("launched.py"), folder)
    return folder


def write_shard(path: Path, numbers: range) -> None:
    """Pictures of noise and their labels, as webdataset reads them."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            pixels = torch.randint(256, (32, 32), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
            image = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(image, "png")
            for end, content in (("png", image.getvalue()), ("cls", b"0")):
                member = tarfile.TarInfo(f"{number:03d}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def told(folder: Path, name: str) -> list[tuple[int, str, str]]:
    """Exit code and output of a run in each process."""
    return [tuple(json.loads((folder / f"told-{rank}.json").read_text())[name]) for rank in (0, 1)]


def state(folder: Path) -> dict[str, Any]:
    return {stage: about["told"] for stage, about in json.loads((folder / "stages.json").read_text()).items()}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's readers close nothing
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", SAME)
def test_several_processes_make_what_one_makes(
    name: str, together: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, out, _), other = told(together, name)
    assert first == 0
    assert other == (0, "", "")
    assert out
    words = [word.replace("{folder}", str(together)) for word in SAME[name]]
    code, _, said = call(capsys, monkeypatch, *words, "--out", str(tmp_path / name))
    assert code == 0, said
    alone, both = tmp_path / name, together / name
    plans = [tp.Plan.load(folder / "plan.json") for folder in (alone, both)]
    assert plans[0].diff(plans[1]) == {}
    assert plans[0].zeros == plans[1].zeros
    scores = [tp.Scores.load(folder / "scores.safetensors") for folder in (alone, both)]
    assert scores[0].samples == scores[1].samples == (20 if name == "stream" else 45)
    assert [found.manifest["processes"] for found in scores] == [1, 2]
    for group, values in scores[0].values.items():
        torch.testing.assert_close(scores[1].values[group], values, rtol=1e-4, atol=1e-4 * float(values.max()))
    if name == "drift":
        measured = [[step.get("measured_kl", 0.0) for step in plan.made_by["steps"]] for plan in plans]
        assert measured[1] == pytest.approx(measured[0], rel=1e-4)
        assert measured[0][-1] > 0
        return
    models = [tp.load(folder).state_dict() for folder in (alone, both)]
    for key, value in models[0].items():
        expected, found = value.double(), models[1][key].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=SUMS * float(expected.abs().max()))
    if name in ("zeros", "stream"):
        one, two = state(alone), state(both)
        assert one["recover"]["steps"] == two["recover"]["steps"] == (["finetune"] if name == "zeros" else [])
        assert one["recover"].get("finetune_images") == two["recover"].get("finetune_images")
        for mine, theirs in zip(one["recover"]["epochs"], two["recover"]["epochs"], strict=True):
            for key in ("loss", "held_out", "held_out_before"):
                assert theirs[key] == pytest.approx(mine[key], rel=1e-3), key
        reports = [json.loads((folder / "report.json").read_text()) for folder in (alone, both)]
        for key, value in (reports[0]["recovered"] or reports[0]["pruned"])["metrics"].items():
            assert (reports[1]["recovered"] or reports[1]["pruned"])["metrics"][key] == pytest.approx(value, rel=1e-3)
        assert reports[0]["drift"]["pruned_kl"] == pytest.approx(reports[1]["drift"]["pruned_kl"], rel=1e-6)
    gc.collect()


def test_a_run_that_is_done_lets_the_others_go(together: Path) -> None:
    assert [code for code, *_ in told(together, "zeros, again")] == [0, 0]
    assert told(together, "zeros, again")[0][2] == ""  # no stage was done again


def test_the_first_process_tells_what_is_wrong(together: Path) -> None:
    (code, out, said), other = told(together, "floor")
    assert (code, out) == (2, "")
    assert "cannot be reached" in said
    assert other == (0, "", "")
    assert not (together / "floor" / "plan.json").exists()


def test_an_error_that_all_meet_ends_all(together: Path) -> None:
    (code, _, said), (code_there, out_there, said_there) = told(together, "unmet")
    assert code == code_there == 2
    assert "cannot be met: after step 1 of 1 the drift measured on the scored batches is" in said
    assert out_there == ""
    assert said_there.startswith("tpvprune: process 1: ")


def test_what_several_processes_were_stopped_in_goes_on_to_the_same_bytes(together: Path) -> None:
    (code, _, said), (code_there, *_) = told(together, "parted, stopped")
    assert code == code_there == 130
    assert "what was done so far is kept" in said
    assert told(together, "parted, gone on with")[0][0] == 0
    assert "finetune" in state(together / "parted")["recover"]["steps"]
    assert digests(together / "parted") == digests(together / "whole")
    parted, whole = (state(together / name)["recover"]["epochs"] for name in ("parted", "whole"))
    for name in ("loss", "held_out"):
        assert [epoch[name] for epoch in parted] == pytest.approx([epoch[name] for epoch in whole], rel=1e-12)


def test_what_several_processes_were_stopped_scoring_goes_on_to_the_same_bytes(together: Path) -> None:
    (code, _, said), (code_there, *_) = told(together, "scored, stopped")
    assert code == code_there == 130
    assert "what was done so far is kept" in said
    kept = [name.partition(".")[2] for name in json.loads((together / "scored, stopped.json").read_text())]
    shares = [name for name in kept if name.startswith("partial.dense-2-")]
    assert sorted(name.partition(".")[2].partition(".")[2] for name in shares) == ENDS
    assert told(together, "scored, gone on with")[0][0] == 0
    assert digests(together / "scored") == digests(together / "scored at once")
    assert tp.Scores.load(together / "scored" / "scores.safetensors").samples == 45


def test_what_several_processes_were_stopped_scoring_a_step_on_goes_on_to_the_same_bytes(together: Path) -> None:
    assert told(together, "stepped, stopped")[0][0] == 130
    kept = json.loads((together / "stepped, stopped.json").read_text())
    shares = [name for name in kept if ".partial.json.step2-2-" in name]
    assert [name.partition("step2")[2].partition(".")[2] for name in shares] == ENDS
    assert told(together, "stepped, gone on with")[0][0] == 0
    assert digests(together / "stepped") == digests(together / "stepped at once")
    assert len(tp.Plan.load(together / "stepped" / "plan.json").made_by["steps"]) == 2
    assert not list((together / "stepped").glob("*.partial*"))
