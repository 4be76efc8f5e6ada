"""Whole residual blocks: what skipping each is predicted and measured to cost, and plans with and without them.

    python benchmarks/depth.py --model cifar_resnet56 --checkpoint resnet56_cifar10.safetensors --train cifar10/train \
        --test cifar10/test --macs 0.7

The first table skips one block at a time; nothing is refitted. The second cuts to the budget, with scores of blocks and
channels or of channels alone or of blocks alone, and refits in closed form.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tpvprune as tp
from tpvprune.report import compare, latencies
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def without(graph: tp.Graph, block: str) -> tp.Plan:
    return tp.Plan({block: torch.zeros(1, dtype=torch.bool)}, graph)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--checkpoint")
    parser.add_argument("--train", help="images to score and refit on; even positions where --test is left out")
    parser.add_argument("--test", help="images to measure on; odd positions of --train if left out")
    parser.add_argument("--samples", type=int, default=1280)
    parser.add_argument("--refit", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7])
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    args = parser.parse_args()
    model = create_model(args.model, args.checkpoint).eval()
    if args.test:
        pool, held = open_pool(args.train, model), open_pool(args.test, model, labels="folders")
    else:
        pool, held = open_pool(args.train, model, labels="folders").split()
    scored: list[Any] = [batch for batch, _ in pool.sample(args.samples, 0).loader(args.batch)]
    refit: list[Any] = [batch for batch, _ in pool.sample(args.refit, 1).loader(args.batch)]
    test: list[Any] = list(held.sample(args.held_out, 2).loader(args.batch))
    deep, flat = (tp.trace(model, scored[0][:1], depth=depth) for depth in (True, False))
    blocks = [group.id for group in deep.groups if group.kind == "block"]
    found: dict[str, Any] = {"blocks": [], "plans": []}

    scores = tp.score(model, scored, deep)
    print(f"{args.model}: {len(blocks)} blocks can be skipped, {len(deep.groups) - len(blocks)} other groups\n")
    print("| block skipped | multiply-adds | predicted KL | measured KL | accuracy |\n| --- | --- | --- | --- | --- |")
    cut = {name: tp.apply(model, without(deep, name)) for name in blocks}
    metrics, _ = compare({"dense": model, **cut}, model, test)
    for name in blocks:
        row = {"block": name, "macs": without(deep, name).macs / deep.macs()}
        row |= {"predicted": float(scores.values[name]) / 2, **metrics[name]}
        found["blocks"].append(row)
        print(f"| {name} | {row['macs']:.3f} | {row['predicted']:.4f} | {row['kl']:.4f} | {row['top1']:.4f} |")
    measured, predicted = ([row[key] for row in found["blocks"]] for key in ("kl", "predicted"))
    print(f"\nrank correlation {np.corrcoef(ranks(predicted), ranks(measured))[0, 1]:.3f}\n")

    print(f"dense: accuracy {metrics['dense']['top1']:.4f}\n")
    print("| budget | scores | units | skipped | multiply-adds | KL | accuracy | refitted | ms, dense ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    graphs = {"blocks and channels": deep, "channels": flat, "blocks": deep}
    kinds = {"joint": tp.TPV(), "compensated": tp.TPV(compensated=True)}
    made = {(k, u): tp.score(model, scored, g, c) for k, c in kinds.items() for u, g in graphs.items()}
    del made["compensated", "blocks"]  # blocks are scored the same way
    for share in args.macs:
        for (kind, units), one in made.items():
            graph = graphs[units]
            # No share of a group that must stay holds a block.
            least = 1.0 if units == "blocks" else 0.1
            plan = tp.allocate(one, graph, tp.Budget(macs=share, min_keep=least))
            small = tp.apply(model, plan)
            again = tp.reconstruct(small, refit, model)
            metrics, _ = compare({"raw": small, "refitted": again}, model, test)
            gone = [name for name, mask in plan.keep.items() if graph[name].kind == "block" and not bool(mask.any())]
            row = {"budget": share, "scores": kind, "units": units, "skipped": gone, "macs": plan.macs / graph.macs()}
            row |= {"raw": metrics["raw"], "refitted": metrics["refitted"]}
            row |= {"ms": latencies({"small": again, "dense": model}, test[0][0])}
            found["plans"].append(row)
            ms = f"{row['ms']['small']:.1f}, {row['ms']['dense']:.1f}"
            print(
                f"| {share} | {kind} | {units} | {len(gone)} | {row['macs']:.3f} | {row['raw']['kl']:.3f} "
                f"| {row['raw']['top1']:.4f} | {row['refitted']['top1']:.4f} | {ms} |",
                flush=True,
            )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
