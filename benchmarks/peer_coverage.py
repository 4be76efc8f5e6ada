"""Which models of `timm_coverage.py` torch-pruning cuts, by a pruner and the settings of its own timm example.

    python benchmarks/peer_coverage.py --list popular && python benchmarks/peer_coverage.py --report

A model counts if the pruner is built and steps, the cut model runs with outputs of the shape as before, and at most 95%
of its multiply-adds are left (asked for are about 70%, by one ratio of channels everywhere), with widths as they come
or else rounded to 8. Nothing is compared with masks. Models, input sizes and random weights are those of the results of
`timm_coverage.py`. Each runs in a process of its own on one thread; what the results hold is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from planning import peer_pruner, step_of_peer
from timm_coverage_check import brief, build, inputs_of, run

HERE = Path(__file__).resolve().parent
OURS = HERE / "results" / "timm_coverage.jsonl"
RESULTS = HERE / "results" / "peer_coverage.jsonl"
CHANNELS = 1 - 0.7**0.5  # share that leaves: multiply-adds go by the product of two widths
LEFT = 0.95


def cut(name: str) -> dict[str, Any]:
    """What comes of a model, at the better of two roundings of its widths: `ok`, and the share left or what failed."""
    found = _cut(name)
    return found if found["ok"] else {**found, **(again if (again := _cut(name, round_to=8))["ok"] else {})}


def _cut(name: str, **settings: Any) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    model, about = build(name)
    inputs = inputs_of(2, about["input"])
    shapes = [output.shape for output in run(model, inputs)]
    dense = torch_pruning.utils.count_ops_and_params(model, inputs[:1])[0]
    where = "pruner"
    try:
        pruner = peer_pruner(model, inputs[:1], pruning_ratio=CHANNELS, **settings)
        where = "step"
        step_of_peer(model, pruner)
        where = "forward"
        outputs = run(model, inputs)
        if [output.shape for output in outputs] != shapes:
            return {"ok": False, "where": where, "why": f"outputs are {[list(o.shape) for o in outputs]}"}
        left = torch_pruning.utils.count_ops_and_params(model, inputs[:1])[0] / dense
    except Exception as error:
        return {"ok": False, "where": where, "why": brief(error)}
    ok = left <= LEFT
    return {"ok": ok, "where": "macs", "left": round(left, 4), "why": "" if ok else f"{left:.1%} of multiply-adds left"}


def in_a_process(name: str, seconds: float) -> dict[str, Any]:
    """The same, within a limit on seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "where": "time", "why": f"not done within {seconds:.0f} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"ok": False, "where": "process", "why": brief(said[-1] if said else f"ended with {done.returncode}")}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(ours: dict[tuple[str, str], dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    """Counts of both lists, and what went wrong, model by model."""
    print("| list | models | tpvprune, all checks | torch-pruning, cut and runs |\n| --- | --- | --- | --- |")
    for which in ("families", "popular"):
        models = [(record["model"], record["passed"]) for key, record in ours.items() if key[0] == which]
        known = [pair for pair in models if pair[0] in theirs]
        cuts = sum(theirs[model]["ok"] for model, _ in known)
        if not known:
            continue
        print(f"| {which} | {len(known)} of {len(models)} | {sum(passed for _, passed in known)} | {cuts} |")
    wrong = Counter(record["where"] for record in theirs.values() if not record["ok"])
    print(f"\nwhere it failed: {dict(wrong.most_common())}\n\n| model | where | what it said |\n| --- | --- | --- |")
    for model, record in sorted(theirs.items()):
        if not record["ok"]:
            print(f"| {model} | {record['where']} | {record['why'][:120].replace('|', ' ')} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", choices=("families", "popular", "both"), default="both")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models, though there may be results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--report", action="store_true", help="print what the results hold, run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(cut(args.one)))
        return
    ours = {(r["list"], r["model"]): r for r in map(json.loads, OURS.read_text().splitlines()) if "input" in r}
    lines = args.results.read_text().splitlines() if args.results.is_file() else []
    theirs = {record["model"]: record for record in map(json.loads, lines)}
    if args.report:
        report(ours, theirs)
        return
    wanted = dict.fromkeys(model for which, model in ours if args.list in (which, "both"))
    names = args.only or [name for name in wanted if name not in theirs]
    versions = {"torch-pruning": version("torch-pruning"), "torch": torch.__version__.partition("+")[0]}
    for number, name in enumerate(names, 1):
        record = {"model": name, **in_a_process(name, args.seconds), "versions": versions}
        print(f"[{number}/{len(names)}] {record}", flush=True)
        with args.results.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
