"""Runs that are killed, stopped, out of disk, without rights or doubled: nothing is lost, nothing half is taken."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import tpvprune as tp
from tests.forks import ROOT, Forks, digests
from tests.test_cli import CLASSES, make_images
from tpvprune.files import PART
from tpvprune.lock import LOCK, only_run
from tpvprune.runfolder import PRODUCTS, branch, holds

SETTINGS = (
    f"model.args.num_classes={CLASSES}",
    "data.size=32",
    "data.batch_size=4",
    "plan.steps=2",
    "score.compensated=false",
    "recover.finetune.epochs=2",
    "recover.finetune.batch_size=4",
)


class Place:
    """Weights, images, and what an undisturbed run makes of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        save_file(timm.create_model("test_resnet", num_classes=CLASSES).state_dict(), folder / "weights.safetensors")
        make_images(folder / "images", 12)
        self.forks = Forks(folder)
        code, told = self.run("whole")
        assert code == 0, told
        self.whole = digests(folder / "whole")
        self.changes = int((folder / "whole.changes").read_text())

    def words(self, out: str, verb: str = "recover") -> list[str]:
        given = {"--data": "images", "--checkpoint": "weights.safetensors", "--out": out}
        flags = [word for name, value in given.items() for word in (name, str(self.folder / value))]
        return [verb, "test_resnet", *SETTINGS, *flags, "--macs", "0.6"]

    def run(self, out: str, **trouble: object) -> tuple[int, str]:
        return self.forks.run(self.words(out), self.folder / out, **trouble)

    def fresh(self) -> str:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        return "out"

    def assert_goes_on(self, out: str) -> str:
        """The same command again ends well and gives what the undisturbed run gave; what it printed."""
        code, told = self.run(out)
        assert code == 0, told
        assert digests(self.folder / out) == self.whole
        return told


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("runs"))
    yield made
    made.forks.close()


@pytest.mark.parametrize("part", [0.03, pytest.param(0.3, marks=pytest.mark.slow), 0.9])
def test_a_killed_run_goes_on_to_the_same_bytes(place: Place, part: float) -> None:
    code, _ = place.run(place.fresh(), at=max(1, int(part * place.changes)), kind="kill")
    assert code == -9
    assert part > 0.1 or list((place.folder / "out").glob(f".*{PART}")), "what the write that was killed left"
    assert not (place.folder / "out" / PRODUCTS["recover"]).exists(), "nothing half-made may pass for a result"
    place.assert_goes_on("out")


@pytest.mark.slow
def test_a_run_killed_at_any_change_of_its_folder_goes_on_to_the_same_bytes(place: Place) -> None:
    for number in range(1, place.changes + 1):
        assert place.run(place.fresh(), at=number, kind="kill")[0] == -9, number
        saved = place.folder / "out" / PRODUCTS["recover"]
        if saved.exists():
            tp.load(place.folder / "out")  # it vouches for all that it names
        place.assert_goes_on("out")


@pytest.mark.slow
def test_a_run_killed_from_outside_again_and_again_ends_all_the_same(place: Place) -> None:
    """No hook: another process waits for a file to appear, and kills."""
    out = place.folder / place.fresh()
    command = [sys.executable, "-W", "ignore", "-m", "tpvprune", *place.words("out")]
    for pattern in (
        "stages.json",
        "graph.json",
        "scores.safetensors",
        "plan.json",
        "pruned/tpvprune.json",
        "recover-*",
    ):
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not list(out.glob(pattern)) and run.poll() is None:
            time.sleep(0.001)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -9, pattern
    place.assert_goes_on("out")


def test_ctrl_c_says_what_is_kept_and_the_run_goes_on(place: Place) -> None:
    code, told = place.run(place.fresh(), at=place.changes // 3, kind="stop")
    assert code == 130
    assert f"stopped; what was done so far is kept in {place.folder / 'out'}" in told
    assert "Traceback" not in told
    assert not list((place.folder / "out").rglob(f".*{PART}"))
    assert not (place.folder / "out" / LOCK).exists()
    place.assert_goes_on("out")


@pytest.mark.slow
def test_ctrl_c_at_any_change_loses_nothing(place: Place) -> None:
    for number in range(1, place.changes + 1, 3):
        assert place.run(place.fresh(), at=number, kind="stop")[0] == 130, number
        place.assert_goes_on("out")


def test_a_full_disk_is_said_and_what_was_done_is_kept(place: Place) -> None:
    code, told = place.run(place.fresh(), limit=40_000)  # the graph is smaller, the scores are not
    assert code == 1
    assert "File too large; make room and give the same command again" in told
    assert str(place.folder / "out") in told
    assert "Traceback" not in told
    assert (place.folder / "out" / "graph.json").is_file()
    assert not list((place.folder / "out").rglob(f".*{PART}"))
    assert "trace:" not in place.assert_goes_on("out")


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_change_loses_nothing(place: Place) -> None:
    for number in range(1, place.changes + 1, 3):
        code, told = place.run(place.fresh(), at=number, kind="full")
        if code:  # it is not where the last changes are removals
            assert "No space left on device" in told, number
            assert "make room" in told, number
        place.assert_goes_on("out")


def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(place: Place) -> None:
    out = place.folder / place.fresh()
    out.mkdir(mode=0o555)
    code, told = place.run("out", obey=True)
    assert code == 1
    assert f"{out}: Permission denied; choose another --out" in told
    assert "trace" not in told
    out.chmod(0o755)
    assert list(out.iterdir()) == []


def test_a_finished_run_is_told_of_a_folder_that_cannot_be_written_to(place: Place) -> None:
    out = place.folder / "whole"
    out.chmod(0o555)
    try:
        code, told = place.run("whole", obey=True)
    finally:
        out.chmod(0o755)
    assert code == 0, told


def test_two_runs_into_one_folder_are_one_and_a_message(place: Place) -> None:
    out = place.folder / place.fresh()
    first = place.forks.start(place.words("out"), out, at=place.changes // 2, kind="wait")
    until(lambda: (out / "graph.json").is_file())
    code, told = place.run("out", kind="none")
    assert code == 2
    assert f"a run is going on in {out}: process {first} on " in told
    (place.folder / "out.go").touch()
    code, told = place.forks.end(first)
    assert code == 0, told
    assert digests(out) == place.whole


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("process 1 on elsewhere\n")
    with only_run(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / LOCK).read_text()
        told = f"a run is going on in .*this process .{os.getpid()}"
        with pytest.raises(tp.RecipeError, match=told), only_run(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []
    with only_run(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()


def test_a_lock_is_held_against_another_process_and_ends_with_it(tmp_path: Path) -> None:
    """The other process uses the system's lock by itself, and is killed."""
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "f.write('process 77 on x'); f.flush(); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / LOCK)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(tp.RecipeError, match="process 77 on x; wait for it"), only_run(tmp_path):
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    with only_run(tmp_path):
        pass


def test_a_branch_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    source, out = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    for name in ("graph.json", "scores.safetensors", "plan.json", "stages.json", "recipe.yaml"):
        (source / name).write_text(name)
    out.mkdir()
    (out / "graph.json").write_text("graph.json")
    branch(source, out)
    assert holds(out) == holds(source)
    (out / "graph.json").write_text("newer")
    branch(source, out)
    assert (out / "graph.json").read_text() == "newer", "a folder with a recipe is a run of its own"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "photo.jpg").write_text("")
    branch(source, tmp_path / "c")
    assert holds(tmp_path / "c") == ["photo.jpg"]


def until(there: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.002)
