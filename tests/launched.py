"""Runs of the command line in several processes; run by a launcher: `torchrun ... tests/launched.py FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import torch

from tests.test_launched import RUNS
from tpvprune import cli
from tpvprune.processes import met
from tpvprune.recovery import finetune
from tpvprune.scoring import collect


@contextmanager
def stopped_after(states: int) -> Iterator[None]:
    """Ends all processes right after the nth state of a distillation that keeps one after every step."""
    training, left = finetune._Training, [states]
    run, save = training.run, training._save

    def stop(self: finetune._Training, folder: Path) -> None:
        save(self, folder)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    training.run = lambda self, folder, every, *more: run(self, folder, 1, *more)  # type: ignore[method-assign]
    training._save = stop  # type: ignore[method-assign]
    try:
        yield
    finally:
        training.run, training._save = run, save  # type: ignore[method-assign]


@contextmanager
def stopped_scoring() -> Iterator[None]:
    """Ends all processes when each has scored its share."""
    plain = collect.reduced

    def stop(tally: object) -> None:
        torch.distributed.barrier()
        raise KeyboardInterrupt

    collect.reduced, collect.SAVE_EVERY = stop, -1.0  # type: ignore[assignment]
    try:
        yield
    finally:
        collect.reduced, collect.SAVE_EVERY = plain, 30.0


STOPS = {
    "parted, stopped": partial(stopped_after, 2),
    "scored, stopped": stopped_scoring,
    "stepped, stopped": stopped_scoring,
}


def told(words: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command in this process."""
    sys.argv = ["tpvprune", *words]
    code, out, err = 0, StringIO(), StringIO()
    cli.err.file = err
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def main() -> None:
    """Do all runs, and leave what they told in the folder."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {}
    with met():  # processes that part may fail to meet a second time
        for name, words in RUNS.items():
            words = [word.replace("{folder}", str(folder)) for word in words]
            here = [*words, "--out", str(folder / name.partition(",")[0])]
            with STOPS.get(name, nullcontext)():
                found[name] = told(here)
            if name in STOPS and os.environ["RANK"] == "0":
                folder.joinpath(f"{name}.json").write_text(json.dumps(sorted(os.listdir(here[-1]))))
    (folder / f"told-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
