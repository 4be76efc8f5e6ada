"""Criteria on a real ImageNet network: one cut to 0.9, 0.8 and 0.7 of the multiply-adds, raw and refitted.

    python benchmarks/imagenet_criteria.py --checkpoint tf_efficientnet_lite0.safetensors --images imagenet-600

Even positions of the sorted images score and refit (closed form, no optimiser), odd positions measure agreement and KL
to the dense network. All criteria are ranked per multiply-add at the same allocation rules; rows are appended to the
results file as they are made and not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tpvprune as tp
from tpvprune.report import compare
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model

SHARES = (0.9, 0.8, 0.7)
CRITERIA: dict[str, tuple[Callable[[], Any], str]] = {
    "random": (lambda: tp.Random(), "global"),
    "l1": (lambda: tp.L1(), "global"),
    "lamp": (lambda: tp.LAMP(), "global"),
    "fpgm": (lambda: tp.FPGM(), "global"),
    "bnscale": (lambda: tp.BNScale(), "global"),
    "whc": (lambda: tp.WHC(), "global"),
    "taylor (labels)": (lambda: tp.Taylor(), "global"),
    "fisher (labels)": (lambda: tp.Fisher(), "global"),
    "jacobian (labels)": (lambda: tp.Jacobian(), "global"),
    "jbr": (lambda: tp.JBR(), "global"),
    "variance": (lambda: tp.Variance(), "global"),
    "wanda": (lambda: tp.Wanda(), "global"),
    "tpv all members": (lambda: tp.TPV(over="all"), "global"),
    "tpv": (lambda: tp.TPV(), "global"),
    "tpv, 8 probes": (lambda: tp.TPV(probes=8), "global"),
    "tpv compensated": (lambda: tp.TPV(compensated=True), "global"),
    "tpv compensated, 8 probes": (lambda: tp.TPV(compensated=True, probes=8), "global"),
    "tpv plan": (lambda: tp.TPV(sensitivities=10**6), "joint"),
    "tpv plan, 8 probes": (lambda: tp.TPV(sensitivities=10**6, probes=8), "joint"),
    "tpv plan compensated": (lambda: tp.TPV(sensitivities=10**6, compensated=True), "joint"),
}


def report(path: Path) -> None:
    lines = path.read_text().splitlines() if path.is_file() else []
    found = {row["criterion"]: row["rows"] for row in map(json.loads, lines)}
    names = [f"{share:g} {what}" for share in SHARES for what in ("raw", "refitted")]
    print(f"| criterion | {' | '.join(names)} |\n| --- {'| --- ' * len(names)}|")
    for name in sorted(found, key=lambda n: found[n][1]["refitted"]["kl"]):
        cells = [
            f"{row[what]['agreement']:.3f} / {row[what]['kl']:.3f}"
            for row in found[name]
            for what in ("raw", "refitted")
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--checkpoint")
    parser.add_argument("--images", type=Path)
    parser.add_argument("--labels", type=Path, help="class map; read by the criteria that need labels alone")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--results", type=Path, default=Path("runs/imagenet_criteria.jsonl"))
    args = parser.parse_args()
    if args.images:
        dense = create_model(args.model, args.checkpoint).to(args.device)
        pool, held = open_pool(args.images, dense, labels=args.labels).split()
        batches: list[Any] = [
            (images.to(args.device), labels.to(args.device)) for images, labels in pool.loader(args.batch)
        ]
        # A refit wants batches of mixed classes no more than scoring does: one image a class is what there is.
        test: list[Any] = [images.to(args.device) for images, _ in held.loader(args.batch)]
        graph = tp.trace(dense, batches[0][0][:1])
        done = (
            [json.loads(line)["criterion"] for line in args.results.read_text().splitlines()]
            if (args.results.is_file())
            else []
        )
        for name in args.criteria:
            if name in done or ("labels" in name and not args.labels):
                continue
            start = time.perf_counter()
            make, allocator = CRITERIA[name]
            scores = tp.score(dense, batches, graph, make())
            rows = []
            for share in SHARES:
                plan = tp.allocate(scores, graph, tp.Budget(macs=share), allocator=allocator)  # type: ignore[arg-type]
                cut = tp.apply(dense, plan)
                metrics, _ = compare({"raw": cut, "refitted": tp.reconstruct(cut, batches, dense)}, dense, test)
                rows.append({"macs": plan.macs / graph.macs(), **metrics})
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with args.results.open("a") as file:
                file.write(json.dumps({"criterion": name, "rows": rows}) + "\n")
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    report(args.results)


if __name__ == "__main__":
    main()
