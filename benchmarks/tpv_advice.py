"""Nats that advice predicts against nats that are measured: rounding, pruning, and mixes under one budget.

    python benchmarks/tpv_advice.py --checkpoint resnet20_cifar10.safetensors --train cifar10/train --test cifar10/test

Predicted from unlabeled training images, measured on test images: weights are rounded for real (to the nearest of
evenly spaced levels, a range an output channel), plans are applied.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import tpvprune as tp
from tpvprune import analysis
from tpvprune.report import compare
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="cifar_resnet20")
    parser.add_argument("--checkpoint")
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", help="odd positions of --train where it is left out")
    parser.add_argument("--samples", type=int, default=1280)
    parser.add_argument("--held-out", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--drifts", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 0.2])
    args = parser.parse_args()
    model = create_model(args.net, args.checkpoint)
    if args.test:
        pool, held = open_pool(args.train, model), open_pool(args.test, model)
    else:
        pool, held = open_pool(args.train, model).split()
    train: list[Any] = [images for images, _ in pool.sample(args.samples).loader(args.batch)]
    test: list[Any] = [images for images, _ in held.sample(args.held_out, 1).loader(args.batch)]
    graph = tp.trace(model, train[0][:1])
    start = time.perf_counter()
    scores = tp.score(model, train, graph)
    first = analysis.advise(model, train, graph, args.drifts[0], scores=scores)
    print(f"{args.net}: scores and one advice from {args.samples} images in {time.perf_counter() - start:.0f} s\n")
    changed = {f"all weights, {b} bits": (kl, analysis.quantise(model, b)) for b, kl in first.rounding_totals.items()}
    for share, kl in first.pruning_totals.items():
        changed[f"pruned, {share:.0%} of MACs"] = (
            kl,
            tp.apply(model, tp.allocate(scores, graph, tp.Budget(macs=share))),
        )
    mixes = []
    for cost in ("bytes", "bitops"):
        for drift in args.drifts:
            found = analysis.advise(model, train, graph, drift, cost=cost, scores=scores)  # type: ignore[arg-type]
            name = f"{cost} under {drift:g} nats"
            changed[name] = (found.mixed.total, analysis.quantise(tp.apply(model, found.plan), found.bits))
            mixes.append((name, found))
    metrics, images = compare({name: small for name, (_, small) in changed.items()}, model, test)
    print(f"| change | predicted KL | measured KL, {images} images | measured / predicted | agreement |")
    print("| --- | --- | --- | --- | --- |")
    for name, (kl, _) in changed.items():
        found_kl, same = metrics[name]["kl"], metrics[name]["agreement"]
        print(f"| {name} | {kl:.4f} | {found_kl:.4f} | {found_kl / kl:.2f} | {same:.3f} |")
    print("\n| mix | pruning | rounding | MACs left | mean bits | cost left | rounding alone | pruning alone |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, found in mixes:
        mix, alone = found.mixed, found.alone
        shares = " | ".join(f"{one.cost:.1%}" for one in (mix, alone["rounding"], alone["pruning"]))
        print(f"| {name} | {mix.pruning:.4f} | {mix.rounding:.4f} | {mix.macs:.1%} | {mix.mean_bits:.2f} | {shares} |")


if __name__ == "__main__":
    main()
