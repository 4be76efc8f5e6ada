"""Runs of the command line in processes of their own, which are killed, stopped, starved of disk or of rights.

`python -m tests.forks` imports everything once, reads one request a line (JSON) and forks a process for each, so that
a run costs no start. Trouble comes right before the nth change of the file system in the run's folder: what lies on
the disk changes at these moments alone, so that all numbers are all moments there are.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "open")
TIMED = ("stages.json", "report.json", "report.html", "README.md", "told.json")  # they tell seconds


class Forks:
    """The server of `python -m tests.forks`; close it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.forks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, words: list[str], folder: Path, **trouble: Any) -> int:
        """Begin `tpvprune WORDS`, and its process; see `_trouble` for what can happen to it in `folder`."""
        return int(self._ask({"words": words, "trouble": {"folder": str(folder), **trouble}, "told": str(self.place)}))

    def end(self, process: int) -> tuple[int, str]:
        """Exit code (-9: killed) and all that a run printed."""
        code = int(self._ask({"wait": process}))
        told = self.place / f"{process}.told"
        try:
            return code, told.read_text()
        finally:
            told.unlink()

    def run(self, words: list[str], folder: Path, **trouble: Any) -> tuple[int, str]:
        """`start` and `end`."""
        return self.end(self.start(words, folder, **trouble))

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.close()
        self.server.kill()
        self.server.wait()
        self.server.stdout.close()


def digests(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest; without one where it tells of time."""
    return {
        str(p.relative_to(folder)): "" if p.name in TIMED else hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"  # a killed run leaves it, which binds nobody
    }


def _trouble(folder: str, at: int | None = None, kind: str = "count", limit: int = 0, obey: bool = False) -> None:
    """What happens to this process before its change number `at` in a folder.

    Args:
        folder: only changes in it count.
        at: which change, from 1; None: none of them.
        kind: "kill", "stop" (Ctrl-C), "full" (no space is left from then on), "wait" (until FOLDER.go is there), or
            "count".
        limit: bytes that a file may have; 0 for any number.
        obey: whether modes of folders bind this process although it is root.
    """
    done = 0

    def seen(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        if event not in CHANGES or not isinstance(args[0], (str, os.PathLike)):
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = os.fspath(args[0])
        if (path != folder and not path.startswith(f"{folder}/")) or (event == "os.mkdir" and os.path.isdir(path)):
            return
        done += 1
        if kind == "full" and at is not None and done >= at and event == "os.chmod":  # a file that was just written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if done == at and kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if done == at and kind == "stop":
            os.kill(os.getpid(), signal.SIGINT)
        if done == at and kind == "wait":
            while not os.path.exists(f"{folder}.go"):
                time.sleep(0.002)
        if kind == "count":
            os.pwrite(counted, str(done).encode(), 0)

    counted = os.open(f"{folder}.changes", os.O_WRONLY | os.O_CREAT) if kind == "count" else -1
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if obey:
        libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        assert libc.capset(header, sets) == 0
    sys.addaudithook(seen)


def _answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _serve() -> None:
    import tpvprune.scoring.collect
    from tpvprune import cli
    from tpvprune.recovery.finetune import finetune

    tpvprune.scoring.collect.SAVE_EVERY = -1.0  # a state after every batch
    inspect.unwrap(finetune).__kwdefaults__["save_every"] = 2
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _answer(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]))
            continue
        child = os.fork()
        if child:
            _answer(child)
            continue
        said = os.open(f"{request['told']}/{os.getpid()}.told", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv, code = ["tpvprune", *request["words"]], 1
        try:
            _trouble(**request["trouble"])
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)


if __name__ == "__main__":
    _serve()
