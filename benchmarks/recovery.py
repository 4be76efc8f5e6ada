"""What each way of recovery brings back: top-1 and agreement after a cut to a share of the multiply-adds.

    python benchmarks/recovery.py --data cifar10/ --checkpoints checkpoints/ --net resnet20 --macs 0.5 --seeds 0 1 2
    python benchmarks/recovery.py --images imagenet-600/ --labels imagenet_synsets.txt --checkpoints checkpoints/ \
        --net tf_efficientnet_lite0 --macs 0.9 0.8 0.7 0.6 --seeds 0
    python benchmarks/recovery.py --report --results benchmarks/results/recovery.jsonl

CIFAR-10: a seed draws 2,000 unlabeled training images, which are scored and refitted on ("varied": flipped and
shifted, otherwise in each step); everything is measured on the 10,000 test images. Distillation takes all training
images, without labels unless the row says so. "Alone": compensated scores of what each unit costs while all others are
there, "compensated": when its turn comes. ImageNet: images at even positions for all of that, those at odd positions to
measure on. Every row is appended to the results file as soon as it is done, and not run again; networks
that another way goes on from are kept in a folder beside it. Seconds are of the whole way from the dense model to the
recovered one, without measuring.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from train_small import MODELS, ROOT
from varied import Varied, tensors

import tpvprune as tp
from tpvprune.plan import plan_of
from tpvprune.recovery.teacher import Teacher
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model

IMAGES = 2000
FAST = {"positions": 64}
BEST = tp.Reconstruct(sums=True, **FAST)
COMPENSATED, ALONE, PLAIN = tp.TPV(compensated=True), tp.TPV(compensated="alone"), tp.TPV(sensitivities=0)
JOINT, BOTH = tp.TPV(), tp.TPV(compensated="alone", sensitivities=1280)
ONE, FOUR = tp.Planning(per="macs"), tp.Planning(steps=4, refit=True, per="macs")
DISTILL = tp.Finetune(
    epochs=10, lr=0.025, optimizer="momentum", weight_decay=5e-4, temperature=4.0, clip=5.0, norms="train"
)
# As benchmarks/distilling.py found it on training images that were held back.
MATCHED = replace(DISTILL, optimizer="sgd", weight_decay=1e-4, temperature=8.0)
MIRRORED = replace(DISTILL, mirrored=True)
GENTLE = tp.Finetune()  # for few images


@dataclass(frozen=True)
class Way:
    """A cut with a closed form ("fold" or settings) behind it, or what follows after another way."""

    criterion: tp.TPV = COMPENSATED
    planning: tp.Planning = ONE
    closed: tp.Reconstruct | str | None = None
    after: str | None = None
    then: tp.GaussNewton | tp.Finetune | None = None
    varied: bool = False  # images of a Gauss-Newton refit


WAYS = {
    "cut, not recovered": Way(JOINT),
    "cut, means folded": Way(JOINT, closed="fold"),
    "cut, closed form": Way(JOINT, closed=BEST),
    "cut, Gauss-Newton": Way(after="cut, closed form", then=tp.GaussNewton(), varied=True),
    "cut, distilled gently": Way(after="cut, closed form", then=GENTLE),
    "alone, not recovered": Way(ALONE),
    "alone, means folded": Way(ALONE, closed="fold"),
    "alone, dense inputs": Way(ALONE, closed=tp.Reconstruct(inputs="dense", **FAST)),
    "alone, no sums": Way(ALONE, closed=tp.Reconstruct(sums=False, **FAST)),
    "alone, ridge auto": Way(ALONE, closed=tp.Reconstruct(ridge="auto", sums=True, **FAST)),
    "alone, closed form": Way(ALONE, closed=BEST),
    "4 steps, no refit between": Way(ALONE, planning=replace(FOUR, refit=False), closed=BEST),
    "4 steps, refitted between": Way(ALONE, planning=FOUR, closed=BEST),
    "8 steps, refitted between": Way(ALONE, planning=replace(FOUR, steps=8), closed=BEST),
    "4 steps, not compensated": Way(PLAIN, replace(FOUR, allocator="global"), BEST),
    "4 steps, joint": Way(JOINT, replace(FOUR, allocator="joint"), BEST),
    "4 steps, joint and compensated": Way(BOTH, replace(FOUR, allocator="joint"), BEST),
    "4 steps, Gauss-Newton": Way(after="4 steps, refitted between", then=tp.GaussNewton()),
    "4 steps, Gauss-Newton, varied": Way(after="4 steps, refitted between", then=tp.GaussNewton(), varied=True),
    "alone, Gauss-Newton": Way(after="alone, closed form", then=tp.GaussNewton(), varied=True),
    "alone, distilled gently": Way(after="alone, closed form", then=GENTLE),
    "alone, distilled": Way(after="alone, closed form", then=DISTILL),
    "alone, Gauss-Newton, distilled": Way(after="alone, Gauss-Newton", then=DISTILL),
    "alone, Gauss-Newton, distilled with labels": Way(
        after="alone, Gauss-Newton", then=replace(DISTILL, label_weight=0.3)
    ),
    "compensated, closed form": Way(closed=BEST),
    "compensated, 4 steps": Way(planning=FOUR, closed=BEST),
    "compensated, Gauss-Newton": Way(after="compensated, closed form", then=tp.GaussNewton(), varied=True),
    "compensated, Gauss-Newton, distilled": Way(after="compensated, Gauss-Newton", then=DISTILL),
    "compensated, Gauss-Newton, distilled at 8": Way(after="compensated, Gauss-Newton", then=MATCHED),
    "compensated, Gauss-Newton, distilled from both views": Way(after="compensated, Gauss-Newton", then=MIRRORED),
    "compensated, Gauss-Newton, distilled from both views with labels": Way(
        after="compensated, Gauss-Newton", then=replace(MIRRORED, label_weight=0.3)
    ),
    "compensated, Gauss-Newton, distilled with labels": Way(
        after="compensated, Gauss-Newton", then=replace(DISTILL, label_weight=0.3)
    ),
    "compensated, Gauss-Newton, trained with labels": Way(
        after="compensated, Gauss-Newton", then=replace(DISTILL, label_weight=0.9)
    ),
    "compensated, Gauss-Newton, trained with labels, 20 epochs": Way(
        after="compensated, Gauss-Newton", then=replace(DISTILL, label_weight=0.9, epochs=20)
    ),
    "compensated, Gauss-Newton, distilled, statistics kept": Way(
        after="compensated, Gauss-Newton", then=replace(DISTILL, lr=0.01, norms="freeze")
    ),
    "compensated, distilled": Way(after="compensated, closed form", then=DISTILL),
    "compensated, distilled from both views": Way(after="compensated, closed form", then=MIRRORED),
    "compensated, distilled from both views with labels": Way(
        after="compensated, closed form", then=replace(MIRRORED, label_weight=0.3)
    ),
    "compensated, distilled at 8": Way(after="compensated, closed form", then=MATCHED),
    "compensated, distilled gently": Way(after="compensated, closed form", then=GENTLE),
}
CLOSED = [name for name, way in WAYS.items() if not isinstance(way.then, tp.Finetune)]
Images = Callable[[int], Any]


class Cifar:
    """Images of the CIFAR benchmarks: 2,000 to refit on, all training images to distil on, the test images."""

    def __init__(self, folder: Path, dense: nn.Module, device: str) -> None:
        self.folder, self.dense, self.device = folder, dense, device

    def test(self, count: int | None) -> tuple[list[Tensor], Tensor]:
        """Batches to measure on, and their labels."""
        images, labels = tensors(
            open_pool(self.folder / "test", self.dense, size=32, labels="folders").sample(count, 0)
        )
        return list(images.to(self.device).split(250)), labels.to(self.device)

    def drawn(self, seed: int) -> list[Tensor]:
        """The unlabeled batches of a seed."""
        pool = open_pool(self.folder / "train", self.dense, size=32).sample(IMAGES, seed)
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))
        return list(tensors(pool)[0][order].to(self.device).split(125))

    def varied(self, seed: int) -> Varied:
        """The same images, otherwise each time."""
        images = torch.cat(self.drawn(seed))
        return Varied(images, torch.zeros(len(images), device=self.device), 125)

    @cached_property
    def labelled(self) -> tuple[Tensor, Tensor]:
        """All training images, and their labels."""
        pool = open_pool(self.folder / "train", self.dense, size=32, labels="folders")
        images, labels = tensors(pool)
        return images.to(self.device), labels.to(self.device)

    def train(self, seed: int) -> Varied:
        """All images to distil on, otherwise each time."""
        return Varied(*self.labelled, 125)


class ImageNet:
    """Images of one folder: even positions to score, refit and distil on, odd ones to measure on."""

    def __init__(self, folder: Path, labels: Path, dense: nn.Module, device: str) -> None:
        self.device = device
        self.mine, self.held = open_pool(folder, dense, labels=labels).split()

    def test(self, count: int | None) -> tuple[list[Tensor], Tensor]:
        """Batches to measure on, and their labels."""
        images, labels = tensors(self.held.sample(count, 0))
        return list(images.to(self.device).split(50)), labels.to(self.device)

    def drawn(self, seed: int) -> list[Tensor]:
        """The unlabeled batches of a seed."""
        return list(tensors(self.mine)[0].to(self.device).split(25))

    def varied(self, seed: int) -> Any:
        """The same images, otherwise each time."""
        return self.mine.loader(25, shuffle=True, augment=True, seed=seed)

    train = varied


@dataclass(frozen=True)
class Run:
    """One network, budget and seed: makes the recovered models, each from what it goes on from."""

    dense: nn.Module
    images: Cifar | ImageNet
    batches: list[Tensor]
    macs: float
    seed: int
    kept: Path
    precision: Any = "no"

    def made(self, name: str) -> tuple[nn.Module, float]:
        """The recovered model and the seconds it took; read back if it was kept."""
        folder = self.kept / name.replace(", ", "_").replace(" ", "-")
        told = folder.with_suffix(".json")
        if told.is_file():
            device = next(self.dense.parameters()).device
            return tp.load(folder).to(device, memory_format=torch.channels_last), json.loads(told.read_text())[
                "seconds"
            ]
        way = WAYS[name]
        before, spent = self.made(way.after) if way.after else (None, 0.0)
        start = time.perf_counter()
        small = self._cut(way) if before is None else self._followed(before, way)
        spent += time.perf_counter() - start
        if any(other.after == name for other in WAYS.values()):
            tp.save(small, folder)
            told.write_text(json.dumps({"seconds": spent}))
        return small, spent

    def _cut(self, way: Way) -> nn.Module:
        graph = tp.trace(self.dense, self.batches[0][:1])
        seeded = tp.TPV(**{**vars(way.criterion), "seed": self.seed})
        settings = way.closed if isinstance(way.closed, tp.Reconstruct) else None
        budget = tp.Budget(macs=self.macs, round_to=1)
        plan = tp.plan_for(
            self.dense, self.batches, graph, budget, criterion=seeded, planning=way.planning, refit_with=settings
        )
        return tp.recover(
            tp.apply(self.dense, plan),
            self.batches,
            teacher=self.dense,
            fold=way.closed == "fold",
            reconstruct_with=settings,
            finetune_with=None,
        )

    def _followed(self, small: nn.Module, way: Way) -> nn.Module:
        torch.manual_seed(self.seed)
        if isinstance(way.then, tp.GaussNewton):
            images = self.images.varied(self.seed) if way.varied else self.batches
            return tp.refine(small, images, self.dense, way.then, log=print)
        log: Any = lambda told: print(told, flush=True)  # noqa: E731
        settings = with_precision(way.then, self.precision)
        return tp.finetune(small, self.images.train(self.seed), self.dense, settings, log=log)


def with_precision(then: Any, precision: Any) -> Any:
    """What follows a way, distillation in that precision."""
    return replace(then, precision=precision) if isinstance(then, tp.Finetune) else then


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
        half = f" ({row['precision']})" if "precision" in row else ""
        tables[row["net"], row["macs"]][row["way"] + half].append(row)
    for (net, macs), ways in sorted(tables.items()):
        print(f"\n{net}, {macs:g} of the multiply-adds\n\n| way | seeds | top-1 | agreement | KL | s |")
        print("| --- " * 6 + "|")
        for name in sorted(ways, key=lambda found: list(WAYS).index(found.partition(" (")[0])):
            rows = ways[name]

            def mean(key: str, digits: int = 4, rows: list[dict[str, Any]] = rows) -> str:
                values = [row[key] for row in rows]
                spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
                return f"{np.mean(values):.{digits}f}{spread}"

            cells = [mean("top1"), mean("agreement"), mean("kl", 3), f"{np.mean([r['seconds'] for r in rows]):.0f}"]
            print(f"| {name} | {len(rows)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--images", type=Path, help="in its place, a folder of images for an ImageNet network")
    parser.add_argument("--labels", type=Path, help="class map of those images")
    parser.add_argument("--checkpoints", type=Path, help="folder with resnet20_cifar10.safetensors and the like")
    parser.add_argument("--net", default="resnet20", help="of the checkpoints, or a network of train_small.py")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=CLOSED, choices=list(WAYS))
    parser.add_argument("--test", type=int, default=None, help="measure on so many test images; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="mixed precision of distillation")
    parser.add_argument("--results", type=Path, default=Path("runs/recovery.jsonl"))
    parser.add_argument("--kept", type=Path, help="folder of networks that others go on from; beside the results")
    parser.add_argument("--report", action="store_true", help="print what the results file holds, run nothing")
    args = parser.parse_args()
    if not args.report:
        run(args)
    report(args.results)


def run(args: argparse.Namespace) -> None:
    small = MODELS.get(args.net)
    if small is not None:
        dense = create_model(small.model, ROOT / "benchmarks" / "checkpoints" / f"{args.net}.safetensors", small.args)
    else:
        name, weights = (args.net, args.net) if args.images else (f"cifar_{args.net}", f"{args.net}_cifar10")
        dense = create_model(name, args.checkpoints / f"{weights}.safetensors")
    dense = dense.to(args.device, memory_format=torch.channels_last)
    images: Cifar | ImageNet = (
        ImageNet(args.images, args.labels, dense, args.device) if args.images else Cifar(args.data, dense, args.device)
    )
    test, labels = images.test(args.test)
    for views, mirrored in (("image", False), ("image and mirror image", True)):
        teacher = Teacher(dense, None, mirrored)
        right = torch.cat([teacher(batch).argmax(1) for batch in test]) == labels
        print(f"dense, answers to the {views}: top-1 {right.float().mean():.4f}", flush=True)
    drawn = cache(images.drawn)
    for seed in args.seeds:
        for way in args.ways:
            for macs in args.macs:
                about = {"net": args.net, "macs": macs, "way": way, "seed": seed}
                then = with_precision(WAYS[way].then, args.precision)
                if isinstance(then, tp.Finetune) and then.precision != "no":
                    about["precision"] = then.precision
                if any(about.items() <= row.items() for row in read(args.results)):
                    continue
                kept = (args.kept or args.results.with_suffix("")) / f"{args.net}-{macs:g}-{seed}"
                found, seconds = Run(dense, images, drawn(seed), macs, seed, kept, args.precision).made(way)
                plan = plan_of(found)
                row = {
                    **about,
                    "test": len(labels),
                    "kept": plan.macs / plan.graph.macs(),
                    **measured(found, dense, test, labels),
                    "seconds": seconds,
                    "then": repr(then),
                    "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
                }
                args.results.parent.mkdir(parents=True, exist_ok=True)
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    main()
