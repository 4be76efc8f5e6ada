"""What each way of recovery brings back: top-1 and agreement after a cut to a share of the multiply-adds.

    python benchmarks/recovery.py --data cifar10/ --checkpoints checkpoints/ --net resnet20 --macs 0.5 --seeds 0 1 2
    python benchmarks/recovery.py --report --results benchmarks/results/recovery.jsonl

A seed draws 2,000 unlabeled training images, which are scored and refitted on ("varied": flipped and shifted,
otherwise in each step); everything is measured on 10,000 test
images. Distillation takes all training images that are not measured on, without labels unless the row says so. Every
row is appended to the results file as soon as it is done, and not run again. Seconds are of the whole way from the
dense model to the recovered one, without measuring.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tpvprune as tp
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model

IMAGES = 2000
FAST = {"positions": 64}
BEST = tp.Reconstruct(sums=True, **FAST)
COMPENSATED, PLAIN = tp.TPV(compensated=True), tp.TPV(sensitivities=0)
JOINT, BOTH = tp.TPV(), tp.TPV(compensated=True, sensitivities=1280)
STEPS = tp.Planning(steps=4, refit=True, per="macs")

# Name to (criterion, planning, closed form or "fold" or None, settings of what follows it or None).
WAYS: dict[str, tuple[tp.TPV, tp.Planning, tp.Reconstruct | str | None, tp.GaussNewton | tp.Finetune | None]] = {
    "cut, not recovered": (JOINT, tp.Planning(per="macs"), None, None),
    "cut, means folded": (JOINT, tp.Planning(per="macs"), "fold", None),
    "cut, closed form": (JOINT, tp.Planning(per="macs"), BEST, None),
    "compensated, not recovered": (COMPENSATED, tp.Planning(per="macs"), None, None),
    "compensated, means folded": (COMPENSATED, tp.Planning(per="macs"), "fold", None),
    "compensated, dense inputs": (COMPENSATED, tp.Planning(per="macs"), tp.Reconstruct(inputs="dense", **FAST), None),
    "compensated, no sums": (COMPENSATED, tp.Planning(per="macs"), tp.Reconstruct(sums=False, **FAST), None),
    "compensated, ridge auto": (
        COMPENSATED,
        tp.Planning(per="macs"),
        tp.Reconstruct(ridge="auto", sums=True, **FAST),
        None,
    ),
    "compensated, closed form": (COMPENSATED, tp.Planning(per="macs"), BEST, None),
    "4 steps, no refit between": (COMPENSATED, tp.Planning(steps=4, per="macs"), BEST, None),
    "4 steps, refitted between": (COMPENSATED, STEPS, BEST, None),
    "8 steps, refitted between": (COMPENSATED, tp.Planning(steps=8, refit=True, per="macs"), BEST, None),
    "4 steps, not compensated": (PLAIN, tp.Planning(steps=4, refit=True, per="macs", allocator="global"), BEST, None),
    "4 steps, joint": (JOINT, tp.Planning(steps=4, refit=True, per="macs", allocator="joint"), BEST, None),
    "4 steps, joint and compensated": (
        BOTH,
        tp.Planning(steps=4, refit=True, per="macs", allocator="joint"),
        BEST,
        None,
    ),
    "4 steps, Gauss-Newton": (COMPENSATED, STEPS, BEST, tp.GaussNewton()),
    "4 steps, Gauss-Newton, varied": (COMPENSATED, STEPS, BEST, tp.GaussNewton()),
    "4 steps, distilled": (COMPENSATED, STEPS, BEST, tp.Finetune(epochs=10, lr=2e-3)),
    "4 steps, distilled, labels": (COMPENSATED, STEPS, BEST, tp.Finetune(epochs=10, lr=2e-3, label_weight=0.3)),
}
CLOSED = [name for name, (*_, tuned) in WAYS.items() if not isinstance(tuned, tp.Finetune)]


def way(
    dense: nn.Module, batches: list[Tensor], name: str, macs: float, seed: int, train: Callable[..., Any]
) -> tuple[nn.Module, tp.Plan, float]:
    """The recovered model, its plan, and how many seconds it took."""
    criterion, planning, closed, tuned = WAYS[name]
    start = time.perf_counter()
    graph = tp.trace(dense, batches[0][:1])
    seeded = tp.TPV(**{**vars(criterion), "seed": seed})
    settings = closed if isinstance(closed, tp.Reconstruct) else None
    budget = tp.Budget(macs=macs, round_to=1)
    plan = tp.plan_for(dense, batches, graph, budget, criterion=seeded, planning=planning, refit_with=settings)
    small = tp.apply(dense, plan)
    small = tp.recover(
        small, batches, teacher=dense, fold=closed == "fold", reconstruct_with=settings, finetune_with=None
    )
    if isinstance(tuned, tp.GaussNewton):
        torch.manual_seed(seed)
        small = tp.refine(small, train(IMAGES) if "varied" in name else batches, dense, tuned, log=print)
    elif tuned is not None:
        torch.manual_seed(seed)
        small = tp.finetune(small, train(), dense, tuned, log=lambda told: print(told, flush=True))
    return small, plan, time.perf_counter() - start


def measured(model: nn.Module, dense: nn.Module, test: list[Tensor], labels: Tensor) -> dict[str, float]:
    with torch.no_grad():
        p, q = (torch.cat([m(batch) for batch in test]).log_softmax(1) for m in (dense, model))
    return {
        "top1": float((q.argmax(1) == labels).float().mean()),
        "agreement": float((q.argmax(1) == p.argmax(1)).float().mean()),
        "kl": float((p.exp() * (p - q)).sum(1).mean()),
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def report(path: Path) -> None:
    """A table for each network and budget, mean and standard deviation over seeds."""
    tables: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in read(path):
        tables[row["net"], row["macs"]][row["way"]].append(row)
    for (net, macs), ways in sorted(tables.items()):
        print(f"\n{net}, {macs:g} of the multiply-adds\n\n| way | seeds | top-1 | agreement | KL | s |")
        print("| --- " * 6 + "|")
        for name in (n for n in WAYS if n in ways):
            rows = ways[name]

            def mean(key: str, digits: int = 4, rows: list[dict[str, Any]] = rows) -> str:
                values = [row[key] for row in rows]
                spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
                return f"{np.mean(values):.{digits}f}{spread}"

            cells = [mean("top1"), mean("agreement"), mean("kl", 3), f"{np.mean([r['seconds'] for r in rows]):.0f}"]
            print(f"| {name} | {len(rows)} | {' | '.join(cells)} |")


def tensors(pool: Any) -> tuple[Tensor, Tensor]:
    items = [pool[i] for i in range(len(pool))]
    images = torch.stack([item[0] for item in items]).contiguous(memory_format=torch.channels_last)
    return images, torch.tensor([item[1] for item in items])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--checkpoints", type=Path, help="folder with resnet20_cifar10.safetensors and the like")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=CLOSED, choices=list(WAYS))
    parser.add_argument("--test", type=int, default=None, help="measure on so many test images; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images for distillation")
    parser.add_argument("--results", type=Path, default=Path("runs/recovery.jsonl"))
    parser.add_argument("--report", action="store_true", help="print what the results file holds, run nothing")
    args = parser.parse_args()
    if not args.report:
        checkpoint = args.checkpoints / f"{args.net}_cifar10.safetensors"
        dense = create_model(f"cifar_{args.net}", str(checkpoint)).to(args.device, memory_format=torch.channels_last)
        images, labels = tensors(open_pool(args.data / "test", dense, labels="folders").sample(args.test, 0))
        test, labels = list(images.to(args.device).split(250)), labels.to(args.device)
        drawn: dict[int, list[Tensor]] = {}
        for seed in args.seeds:
            for name in args.ways:
                for macs in args.macs:
                    about = {"net": args.net, "macs": macs, "way": name, "seed": seed}
                    if any(about.items() <= row.items() for row in read(args.results)):
                        continue
                    if seed not in drawn:
                        pool = open_pool(args.data / "train", dense).sample(IMAGES, seed)
                        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))
                        drawn = {seed: list(tensors(pool)[0][order].to(args.device).split(125))}

                    def train(images: int | None = None, seed: int = seed) -> Any:
                        whole = open_pool(args.data / "train", dense, labels="folders").sample(images, seed)
                        return whole.loader(125, shuffle=True, augment=True, workers=args.workers, seed=seed)

                    small, plan, seconds = way(dense, drawn[seed], name, macs, seed, train)
                    row = {
                        **about,
                        "test": len(labels),
                        "kept": plan.macs / plan.graph.macs(),
                        **measured(small, dense, test, labels),
                        "seconds": seconds,
                    }
                    args.results.parent.mkdir(parents=True, exist_ok=True)
                    with args.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, flush=True)
    report(args.results)


if __name__ == "__main__":
    main()
