"""KL of plans of one cost by how far products of units are trusted, and what `plan_for` makes of it.

    python benchmarks/trust.py --net cifar_convnext --train cifar10/train --test cifar10/test
    python benchmarks/trust.py --net cifar_resnet20 --checkpoint resnet20_cifar10.safetensors --train cifar10/train \
        --test cifar10/test --samples 1280

Plans of the joint allocator, cut and not recovered, measured on held-out images. "estimated" is what `allocate` does.
"""

from __future__ import annotations

import argparse
from typing import Any

from train_small import MODELS, ROOT

import tpvprune as tp
from tpvprune.planning.joint import estimated_shrinkage
from tpvprune.report import compare
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="cifar_convnext", help="a model, or a network of train_small.py")
    parser.add_argument("--checkpoint")
    parser.add_argument("--train", required=True, help="images to score on; even positions where --test is left out")
    parser.add_argument("--test", help="images to measure on; odd positions of --train if left out")
    parser.add_argument("--samples", type=int, default=640)
    parser.add_argument("--held-out", type=int, default=600)
    parser.add_argument("--probes", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.8, 0.7, 0.5])
    parser.add_argument("--drift", type=float, nargs="*", default=[], help="bounds on drift to plan for, in nats")
    parser.add_argument("--shrinkages", type=float, nargs="*", default=[0.6, 0.9, 1.0])
    args = parser.parse_args()
    small = MODELS.get(args.net)
    model = (
        create_model(args.net, args.checkpoint)
        if small is None
        else create_model(small.model, ROOT / "benchmarks" / "checkpoints" / f"{args.net}.safetensors", small.args)
    ).eval()
    seen, held = open_pool(args.train, model), open_pool(args.test or args.train, model)
    if args.test is None:
        seen, held = seen.split()
    scored: list[Any] = [batch for batch, _ in seen.sample(args.samples, 0).loader(args.batch)]
    others: list[Any] = [batch for batch, _ in held.sample(args.held_out, 1).loader(args.batch)]
    graph = tp.trace(model, scored[0][:1])
    scores = tp.score(model, scored, graph, tp.TPV(sensitivities=args.samples, probes=args.probes))
    assert scores.sensitivities is not None

    def kl(plan: tp.Plan) -> str:
        return f"{compare({'cut': tp.apply(model, plan)}, model, others)[0]['cut']['kl']:.4f}"

    print(f"{args.net}, {args.samples} images, estimated shrinkage {estimated_shrinkage(scores.sensitivities):.2f}\n")
    heads = ["multiply-adds", "estimated", *map(str, args.shrinkages), "chosen by measuring"]
    print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
    for share in args.macs:
        budget = tp.Budget(macs=share, round_to=1)
        plans = [tp.allocate(scores, graph, budget, shrinkage=value) for value in (None, *args.shrinkages)]
        plans.append(tp.plan_for(model, scored, graph, budget, scores=scores))
        print(f"| {share:g} | {' | '.join(map(kl, plans))} |", flush=True)
    for drift in args.drift:
        budget = tp.Budget(drift=drift, round_to=1)
        fixed = tp.Planning(shrinkage=estimated_shrinkage(scores.sensitivities))
        for name, planning in (("estimated", fixed), ("chosen by measuring", None)):
            plan = tp.plan_for(model, scored, graph, budget, scores=scores, planning=planning)
            share = plan.macs / graph.macs()
            print(f"drift={drift:g}, {name}: {share:.3f} of the multiply-adds, KL {kl(plan)}", flush=True)


if __name__ == "__main__":
    main()
