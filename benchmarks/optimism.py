"""Drift of plans on other images than those they were made by: as it is counted, as it is cross-validated, as it is.

    python benchmarks/optimism.py --model cifar_resnet20 --checkpoint resnet20_cifar10.safetensors --data cifar10/train

Plans are made of few images by the joint allocator; all figures are first order, in nats of KL, so that what lies
between the columns is the choice of units by what a few images say. Held-out images are drawn from the same folder.

With `--refit` the same of refits, measured: KL of what a plan leaves, refitted in closed form, on the images that the
refit is made of; of refits on each half of them, on the other half; and on others.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch

import tpvprune as tp
from tpvprune.planning.optimism import drift_on
from tpvprune.refits import Refits
from tpvprune.report import Answers, compare
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--checkpoint")
    parser.add_argument("--data", help="images; plans are made of those at even positions, judged on the others")
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 300, 1280])
    parser.add_argument("--held-out", type=int, default=3000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--round-to", type=int)
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--refit", action="store_true", help="measure refits")
    args = parser.parse_args()
    model = create_model(args.model, args.checkpoint).eval()
    seen, others = open_pool(args.data, model).split()
    graph = tp.trace(model, next(iter(seen.sample(1, 0).loader(1)))[0])

    def batches_of(pool: Any) -> list[torch.Tensor]:
        return [batch for batch, _ in pool.loader(args.batch)]

    def scores_of(batches: list[torch.Tensor], probes: int, seed: int) -> tp.Scores:
        return tp.score(model, batches, graph, tp.TPV(sensitivities=10**9, probes=probes, seed=seed))

    others_of = batches_of(others.sample(args.held_out, 1))
    held = None if args.refit else scores_of(others_of, 2, 1)
    said = ("on those images", "crossed") if args.refit else ("counted", "on those images", "cross-validated")
    judged = ("on those images", "crossed") if args.refit else ("counted", "cross-validated")
    heads = ["images", "multiply-adds", *said, "on others", *(f"{one} / others" for one in judged)]
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for samples in args.samples:
        for macs in args.macs:
            rows = []
            for seed in args.seeds:
                batches = batches_of(seen.sample(samples, seed))
                scores = scores_of(batches, args.probes, seed)
                budget = tp.Budget(macs=macs, round_to=args.round_to)
                plan = tp.allocate(scores, graph, budget, cross_validated=not args.refit)
                if held is None:
                    refits = Refits(Answers(model), batches, None, None)
                    small = {"now": refits(plan)}
                    on = [compare(small, model, images)[0]["now"]["kl"] for images in (batches, others_of)]
                    rows.append((on[0], refits.drift(plan), on[1]))
                    continue
                counted = tp.allocate(scores, graph, budget).made_by["predicted_kl"]
                on = [drift_on(known, graph, plan.keep) / 2 for known in (scores, held)]
                rows.append((counted, on[0], plan.made_by["predicted_kl"], on[1]))
            found = np.array(rows)
            mean = [f"{math.exp(np.log(column).mean()):.4f}" for column in found.T]
            ratios = [
                f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
                for ratio in (found[:, 0] / found[:, -1], found[:, -2] / found[:, -1])
            ]
            print(f"| {samples} | {macs:g} | {' | '.join(mean)} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
