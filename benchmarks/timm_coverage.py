"""Which models of timm can be pruned: every architecture module's smallest, and much-used ones, from trace to export.

    python benchmarks/timm_coverage.py --list both && python benchmarks/timm_coverage.py --report

And likewise of torchvision, with `--library torchvision`.

Every model runs in a process of its own, on random weights and one thread, within a limit on seconds and memory; what
is checked is in `timm_coverage_check.py`. What the results hold already is not run again; Ctrl-C keeps what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import timm
import timm_coverage_models
import torch
import torchvision
import torchvision_coverage_models
from timm_coverage_check import CHECKS
from timm_coverage_models import Target
from timm_coverage_report import amount, reason, report

import tpvprune as tp
from tpvprune.files import write_text

HERE = Path(__file__).resolve().parent
LIBRARIES: dict[str, Any] = {"timm": timm_coverage_models, "torchvision": torchvision_coverage_models}
VERSIONS = {
    name: {name: library.__version__, "tpvprune": tp.__version__}
    for name, library in (("timm", timm), ("torchvision", torchvision))
}
Record = dict[str, Any]


class Stopped(Exception):
    """The user wants no more."""


class Results:
    """Records in a JSONL file, of which the last of a model (of a module, for families), list and versions holds."""

    def __init__(self, file: Path, library: str) -> None:
        self.file, self.library, self.versions = file, library, VERSIONS[library]
        lines = file.read_text().splitlines() if file.is_file() else []
        self.records = {self._key(record): record for record in map(json.loads, lines)}
        self.fresh: list[Record] = []

    def _key(self, record: Record) -> tuple[str, ...]:
        name = record["module" if record["list"] == "families" else "model"]
        return (record["list"], name, *(record["versions"][package] for package in self.versions))

    def of(self, target: Target) -> Record | None:
        """What is known of a target under the versions at hand."""
        name = target.module if target.list == "families" else target.models[0]
        return self.records.get((target.list, name, *self.versions.values()))

    def elsewhere(self, target: Target, fresh: bool) -> Record | None:
        """What another list knows of the same model, under the versions at hand; if asked, only from this run."""
        for record in self.fresh if fresh else self.records.values():
            same = record["model"] in target.models[:1] and record["versions"].items() >= self.versions.items()
            if same and record["list"] != target.list:
                return record
        return None

    def add(self, record: Record) -> None:
        """Append it to the file."""
        self.records[self._key(record)] = record
        self.fresh.append(record)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def tidy(self) -> None:
        """Drop from the file what later records have replaced."""
        if self.records:
            write_text(self.file, "\n".join(json.dumps(record) for record in self.records.values()))


def resident(process: psutil.Process) -> int:
    """Bytes in memory of a process and all it has started."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += int(one.memory_info().rss)
    except psutil.Error:  # it has ended meanwhile
        pass
    return total


def end(process: psutil.Process) -> None:
    try:
        for one in (*process.children(recursive=True), process):
            one.kill()
    except psutil.Error:
        pass


def run(library: str, model: str, limits: dict[str, float], stop: threading.Event) -> Record:
    """The checks of one model, and what ended them if they did not end by themselves."""
    with tempfile.TemporaryDirectory() as folder:
        check = [sys.executable, str(HERE / "timm_coverage_check.py")]
        command = [*check, library, model, folder, str(limits["seconds"])]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        start, peak, wrong = time.monotonic(), 0, ""
        with (Path(folder) / "errors").open("w+") as errors:
            child = subprocess.Popen(
                command, env=environment, stdout=errors, stderr=errors, start_new_session=True
            )  # a session of its own: Ctrl-C is for this process
            watched = psutil.Process(child.pid)
            while child.poll() is None:
                peak = max(peak, resident(watched))
                if stop.is_set():
                    wrong = "stopped"
                elif time.monotonic() - start > limits["seconds"]:
                    wrong = f"not done within the {limits['seconds']:.0f} s of all checks together"
                elif peak > limits["gib"] * 2**30:
                    wrong = f"takes more than {limits['gib']:g} GiB of memory"
                if wrong:
                    end(watched)
                    child.wait()
                time.sleep(0.2)
            if stop.is_set():
                raise Stopped
            errors.seek(0)
            said = errors.read().strip().splitlines()
        file = Path(folder) / "record.json"
        record: Record = json.loads(file.read_text()) if file.is_file() else {"model": model, "checks": {}}
    running = record.pop("running", None if record["checks"] else "dense")
    if running:
        died = f"the process ended with {child.returncode}" + (f": {said[-1][:200]}" if said else "")
        record["checks"][running] = {"ok": False, "why": wrong or died}
    record.setdefault("seconds", {})["all"] = round(time.monotonic() - start, 1)
    return record | {"peak_mib": round(peak / 2**20)}


def run_target(library: str, target: Target, limits: dict[str, float], stop: threading.Event) -> Record:
    """The first of a target's models that runs dense; the last, if none does."""
    record: Record = {"model": target.module, "checks": {"dense": {"ok": False, "why": "no variant can be built"}}}
    passed_over = {}
    for model in target.models:
        record = run(library, model, limits, stop)
        if record["checks"]["dense"]["ok"]:
            break
        passed_over[model] = record["checks"]["dense"]["why"]
    if record["model"] in passed_over:
        del passed_over[record["model"]]
    return {
        "list": target.list,
        "module": target.module,
        "passed": all(record["checks"].get(check, {}).get("ok", False) for check in CHECKS),
        "versions": VERSIONS[library] | {"torch": torch.__version__.partition("+")[0]},
        "limits": limits,
        **record,
        **({"passed_over": passed_over} if passed_over else {}),
    }


def line(record: Record) -> str:
    macs = record.get("macs", {})
    size = "x".join(map(str, record.get("input", ["?"])[1:])) or "?"
    got = f"{macs['got'] / macs['before']:.1%} of {amount(macs['before'])}" if macs.get("got") else "no plan"
    seconds = record.get("seconds", {})
    traced = f", trace {seconds['trace']:.1f} s" if "trace" in seconds else ""
    verdict = "pass" if record["passed"] else f"FAIL, {reason(record)}"
    return f"{record['module']}/{record['model']} {size}: {got}{traced}, {seconds.get('all', 0):.0f} s: {verdict}"


def run_all(targets: list[Target], results: Results, limits: dict[str, float], jobs: int, rerun: bool) -> None:
    stop, lock, done = threading.Event(), threading.Lock(), 0

    def one(target: Target) -> None:
        nonlocal done
        if stop.is_set():
            return
        with lock:
            known = results.elsewhere(target, fresh=rerun)
        try:
            record = {**known, "list": target.list} if known else run_target(results.library, target, limits, stop)
        except Stopped:
            return
        with lock:
            done += 1
            results.add(record)
            print(f"[{done}/{len(targets)}] {target.list}: {line(record)}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, target) for target in targets]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=tuple(LIBRARIES), default="timm")
    parser.add_argument("--list", choices=("families", "popular", "both"), default="both")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="models or modules, and no others")
    parser.add_argument("--again", nargs="+", metavar="NAME", default=[], help="only these, though there are results")
    parser.add_argument("--failed", action="store_true", help="only those whose results say that they did not pass")
    parser.add_argument("--report", action="store_true", help="write the page of docs from the results, run nothing")
    parser.add_argument("--results", type=Path, help="file, in place of results/LIBRARY_coverage.jsonl")
    parser.add_argument("--seconds", type=float, default=300, help="limit for all checks of a model")
    parser.add_argument("--gib", type=float, default=8, help="limit on the memory of a model's checks")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    models = LIBRARIES[given.library]
    targets = models.families() if given.list != "popular" else []
    targets += models.popular() if given.list != "families" else []
    results = Results(given.results or HERE / "results" / f"{given.library}_coverage.jsonl", given.library)
    if given.report:
        page = HERE.parent / "docs" / f"{given.library}_coverage.md"
        write_text(page, report(given.library, given.list, [(target, results.of(target)) for target in targets]))
        print(f"wrote {page.name}")
        return
    wanted = {*given.only, *given.again}
    unknown = wanted.difference(*((target.module, *target.models[:1]) for target in targets))
    if unknown:
        parser.error(f"not in the chosen lists: {', '.join(sorted(unknown))}")
    chosen = [t for t in targets if not wanted or wanted.intersection((t.module, *t.models[:1]))]
    if given.failed:
        chosen = [t for t in chosen if not (results.of(t) or {"passed": True})["passed"]]
    elif not given.again:
        chosen = [t for t in chosen if not results.of(t)]
    print(f"{len(chosen)} of {len(targets)} models to run", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: leaves no process behind
    try:
        limits = {"seconds": given.seconds, "gib": given.gib}
        run_all(chosen, results, limits, given.jobs, bool(given.failed or given.again))
    except KeyboardInterrupt:
        print(f"stopped; what was done is in {results.file.name}")
        sys.exit(130)
    results.tidy()
    passed = sum(record["passed"] for record in results.fresh)
    print(f"{passed} of {len(results.fresh)} pass")


if __name__ == "__main__":
    main()
