"""Single weights: accuracy of masks by TPV and by magnitude, at the same sparsity, without recovery and with it.

    python benchmarks/sparsity.py --data cifar10/ --checkpoint resnet20_cifar10.safetensors --refit
    python benchmarks/sparsity.py --data cifar10/ --checkpoint resnet20_cifar10.safetensors --scope layer
    python benchmarks/sparsity.py --data cifar10/ --checkpoint resnet20_cifar10.safetensors --steps 10

Scores 1,280 unlabeled training images, masks the weights at several sparsities and 2:4, and measures accuracy and KL
to the dense model on 2,000 test images. `--refit` adds the closed form on the same images, `--steps` scores what is
left again on the way to each sparsity. Prints the table in Markdown.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from torch import nn

import tpvprune as tp
from tpvprune.report import compare
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model

CRITERIA: dict[str, Any] = {
    "magnitude": tp.L1(),
    "tpv": tp.TPV(),
    "tpv, per sample": tp.TPV(engine="per_sample"),
    "tpv, factored": tp.TPV(engine="factored"),
    "tpv, compensated alone": tp.TPV(compensated="alone"),
    "tpv, compensated": tp.TPV(compensated=True),
    "tpv, compensated 2:4": tp.TPV(compensated="2:4"),
}
WAYS: dict[str, dict[str, Any]] = {
    "0.5": {"sparsity": 0.5},
    "0.7": {"sparsity": 0.7},
    "0.9": {"sparsity": 0.9},
    "2:4": {"pattern": "2:4"},
}


def plan_of(
    dense: nn.Module,
    batches: list[Any],
    graph: tp.Graph,
    scores: tp.Scores,
    criterion: Any,
    asked: dict[str, Any],
    scope: Any,
    steps: int,
) -> tp.Plan:
    """In each step the same share of the weights that are left leaves; patterns take one step."""
    if "pattern" in asked:
        return tp.sparsify(scores, graph, **asked)
    plan = None
    for step in range(1, steps + 1):
        share = 1 - (1 - asked["sparsity"]) ** (step / steps)
        if plan is not None:
            scores = tp.score(tp.apply(dense, plan), batches, graph, criterion)
        plan = tp.sparsify(scores, graph, share, scope=scope, after=plan)
    assert plan is not None
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/ and test/, images by class")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--scored", type=int, default=1280)
    parser.add_argument("--measured", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scope", choices=["global", "layer"], default="global")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--refit", action="store_true", help="measure after the closed form too")
    args = parser.parse_args()
    dense = create_model(args.model, str(args.checkpoint))
    train = list(open_pool(args.data / "train", dense, labels="folders").sample(args.scored, args.seed).loader(128))
    test = list(open_pool(args.data / "test", dense, labels="folders").sample(args.measured, args.seed).loader(128))
    graph = tp.weight_graph(dense)
    whole, _ = compare({"dense": dense}, dense, test)
    print(f"dense: {whole['dense']['top1']:.4f}\n")
    columns = ["top-1", "KL", *(["top-1, refitted", "KL, refitted"] if args.refit else [])]
    print(f"| masked | zeros | criterion | seconds | {' | '.join(columns)} |")
    print(f"|{' --- |' * (4 + len(columns))}")
    scored = {}
    for name in args.criteria:
        start = time.perf_counter()
        scored[name] = tp.score(dense, train, graph, CRITERIA[name]), time.perf_counter() - start
    for way in args.ways:
        asked = WAYS[way]
        for name, (scores, seconds) in scored.items():
            plan = plan_of(dense, train, graph, scores, CRITERIA[name], asked, args.scope, args.steps)
            models = {"masked": tp.apply(dense, plan)}
            if args.refit:
                models["refitted"] = tp.reconstruct(models["masked"], train, dense)
            found, _ = compare(models, dense, test)
            cells = [f"{found[m]['top1']:.4f} | {found[m]['kl']:.4f}" for m in models]
            print(f"| {way} | {plan.sparsity:.4f} | {name} | {seconds:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
