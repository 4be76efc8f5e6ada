"""Predicted against measured drift: 20 plans from 0.95 to 0.4 of the multiply-adds, all from one scoring.

    python benchmarks/drift.py --model cifar_resnet20 --checkpoint resnet20_cifar10.safetensors --train cifar10/train \
        --test cifar10/test

Prediction (`TPV.drift`, half of it is KL in nats) and measurement are both made on held-out images, so that what is
left between them is what first order leaves out. Plans are cut and not recovered.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tpvprune as tp
from tpvprune.report import compare
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def plot(path: Path, found: dict[str, list[dict[str, float]]], title: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5))
    for name, rows in found.items():
        axes.errorbar(
            [row["predicted"] for row in rows],
            [row["measured"] for row in rows],
            xerr=[row["stderr"] for row in rows],
            fmt="o-",
            label=name,
            markersize=4,
        )
    ends = [min(r["predicted"] for rows in found.values() for r in rows), 10.0]
    axes.plot(ends, ends, "k:", label="predicted = measured")
    axes.set(xscale="log", yscale="log", xlabel="predicted KL, nats", ylabel="measured KL, nats", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--checkpoint")
    parser.add_argument("--train", help="images to score on; even positions where --test is left out")
    parser.add_argument("--test", help="images to predict and measure on; odd positions of --train if left out")
    parser.add_argument("--samples", type=int, default=1280)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, help="JSON of all rows")
    args = parser.parse_args()
    model = create_model(args.model, args.checkpoint).eval()
    if args.test:
        pool, held = open_pool(args.train, model), open_pool(args.test, model)
    else:
        pool, held = open_pool(args.train, model).split()
    seen, held = pool.sample(args.samples, 0), held.sample(args.held_out, 1)
    scored: list[Any] = [batch for batch, _ in seen.loader(args.batch)]
    test: list[Any] = [batch for batch, _ in held.loader(args.batch)]
    graph = tp.trace(model, scored[0][:1])
    scores = tp.score(model, scored, graph, tp.TPV(sensitivities=args.samples))
    found: dict[str, list[dict[str, float]]] = {}
    for allocator in ("global", "joint"):
        rows = found.setdefault(allocator, [])
        print(f"\n{args.model}, {allocator} allocator\n")
        print("| multiply-adds | predicted KL | ± | measured KL | measured / predicted | agreement |")
        print("| --- | --- | --- | --- | --- | --- |")
        for share in np.linspace(0.95, 0.4, args.plans):
            plan = tp.allocate(scores, graph, tp.Budget(macs=float(share), round_to=1), allocator=allocator)  # type: ignore[arg-type]
            drift, error = tp.TPV(probes=2, seed=1).drift(model, test, plan)
            metrics, _ = compare({"cut": tp.apply(model, plan)}, model, test)
            row = {"macs": plan.macs / graph.macs(), "predicted": drift / 2, "stderr": error / 2}
            rows.append({**row, "measured": metrics["cut"]["kl"], "agreement": metrics["cut"]["agreement"]})
            row = rows[-1]
            print(
                f"| {row['macs']:.3f} | {row['predicted']:.4f} | {row['stderr']:.4f} | {row['measured']:.4f} "
                f"| {row['measured'] / row['predicted']:.2f} | {row['agreement']:.3f} |",
                flush=True,
            )
        predicted, measured = [row["predicted"] for row in rows], [row["measured"] for row in rows]
        correlation = np.corrcoef(ranks(predicted), ranks(measured))[0, 1]
        slope = np.polyfit(np.log(predicted), np.log(measured), 1)[0]
        print(f"\nrank correlation {correlation:.3f}; log-log slope {slope:.2f} (1 is calibrated up to a factor)")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found))
    if args.plot:
        plot(args.plot, found, args.model)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
