"""Compare criteria by the TPV paper's protocol: global pruning in steps, re-scored each step, no recovery.

    python benchmarks/criteria.py --data cifar10/ --checkpoints checkpoints/ --net resnet20 --batches 10 --seeds 0 1 2

90 % of all channels leave in 18 steps; after each step accuracy and agreement with the dense network are measured on
3,000 test images. Every curve is appended to the results file as soon as it is done, and not run again; tables and
plots are made of whatever the file holds (`--report`). `area` is the mean test accuracy over multiply-adds kept
between 0.3 and 1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tpvprune as tp
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model

STEPS, SHARE, LEAST = 18, 0.9, 0.3
POINTS = (0.7, 0.5)
PER = {"units": "per channel", "macs": "per multiply-add"}
AT = {
    key: f"{words} at {' / '.join(f'{m:g}' for m in POINTS)}"
    for key, words in (("accuracy", "top-1"), ("agreement", "agreement"))
}

GLOBAL, JOINT = {"allocator": "global"}, {"allocator": "joint"}
EVERY = 10**9  # samples whose sensitivities are kept

# Name to (criterion of the dense model and the seed, how units are chosen, whether the seed changes anything).
CRITERIA: dict[str, tuple[Callable[[nn.Module, int], Any], dict[str, Any], bool]] = {
    "random": (lambda dense, seed: tp.Random(seed=seed), GLOBAL, True),
    "l1": (lambda dense, seed: tp.L1(), GLOBAL, False),
    "l2": (lambda dense, seed: tp.L2(), GLOBAL, False),
    "lamp": (lambda dense, seed: tp.LAMP(), GLOBAL, False),
    "fpgm": (lambda dense, seed: tp.FPGM(), GLOBAL, False),
    "bnscale": (lambda dense, seed: tp.BNScale(), GLOBAL, False),
    "whc": (lambda dense, seed: tp.WHC(), GLOBAL, False),
    "taylor (labels)": (lambda dense, seed: tp.Taylor(), GLOBAL, True),
    "fisher (labels)": (lambda dense, seed: tp.Fisher(seed=seed), GLOBAL, True),
    "jacobian (labels)": (lambda dense, seed: tp.Jacobian(), GLOBAL, True),
    "jbr": (lambda dense, seed: tp.JBR(reference=dense), GLOBAL, True),
    "variance": (lambda dense, seed: tp.Variance(), GLOBAL, True),
    "wanda": (lambda dense, seed: tp.Wanda(), GLOBAL, True),
    "tpv all members": (lambda dense, seed: tp.TPV(over="all", seed=seed), GLOBAL, True),
    "tpv": (lambda dense, seed: tp.TPV(seed=seed), GLOBAL, True),
    "tpv compensated": (lambda dense, seed: tp.TPV(compensated=True, seed=seed), GLOBAL, True),
    "tpv plan": (lambda dense, seed: tp.TPV(sensitivities=EVERY, reference=dense, seed=seed), JOINT, True),
}

# What the parts of the best are worth: "tpv plan" with one thing changed, and other heads.
ABLATIONS: dict[str, tuple[Callable[[nn.Module, int], Any], dict[str, Any], bool]] = {
    "tpv plan, no linear part": (lambda dense, seed: tp.TPV(sensitivities=EVERY, seed=seed), JOINT, True),
    "tpv plan, no exchanges": (*CRITERIA["tpv plan"][:1], JOINT | {"exchange": False}, True),
    "tpv plan, no shrinkage": (*CRITERIA["tpv plan"][:1], JOINT | {"shrinkage": 0.0}, True),
    "tpv plan, shrinkage 0.6": (*CRITERIA["tpv plan"][:1], JOINT | {"shrinkage": 0.6}, True),
    "tpv plan, no covariances": (*CRITERIA["tpv plan"][:1], JOINT | {"shrinkage": 1.0}, True),
    "tpv plan, 4 probes": (
        lambda dense, seed: tp.TPV(sensitivities=EVERY, reference=dense, probes=4, seed=seed),
        JOINT,
        True,
    ),
    "tpv plan, exact": (
        lambda dense, seed: tp.TPV(sensitivities=EVERY, reference=dense, probes="exact"),
        JOINT,
        True,
    ),
    "tpv plan, logits": (
        lambda dense, seed: tp.TPV(head="logits", sensitivities=EVERY, reference=dense, seed=seed),
        JOINT,
        True,
    ),
    "tpv plan, probabilities": (
        lambda dense, seed: tp.TPV(head="probabilities", sensitivities=EVERY, reference=dense, seed=seed),
        JOINT,
        True,
    ),
    "tpv logits": (lambda dense, seed: tp.TPV(head="logits", seed=seed), GLOBAL, True),
    "tpv probabilities": (lambda dense, seed: tp.TPV(head="probabilities", seed=seed), GLOBAL, True),
    "tpv margin": (lambda dense, seed: tp.TPV(head="margin", seed=seed), GLOBAL, True),
}
ALL = CRITERIA | ABLATIONS
FROM_WEIGHTS = ("random", "l1", "l2", "lamp", "fpgm", "bnscale", "whc")  # the number of batches changes nothing


@torch.no_grad()
def answers(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model(batch).softmax(1) for batch in batches])


def cut_to(
    small: nn.Module, batches: list[Any], criterion: Any, choice: dict[str, Any], units: int, per: Any
) -> nn.Module:
    """One step: score what is left, and remove units until `units` are left."""
    graph = tp.trace(small, batches[0][0][:1])
    scores = tp.score(small, batches, graph, criterion)
    budget = tp.Budget(units=units, round_to=1, min_keep=1e-9)
    return tp.apply(small, tp.allocate(scores, graph, budget, per=per, **choice))


def curve(
    dense: nn.Module,
    name: str,
    per: str,
    batches: list[Any],
    test: list[Tensor],
    labels: Tensor,
    seed: int,
) -> list[dict[str, float]]:
    """Accuracy, agreement and KL after every step, until fewer than `LEAST` of the multiply-adds are left."""
    make, choice, _ = ALL[name]
    graph = tp.trace(dense, batches[0][0][:1])
    whole, macs = graph.units, graph.macs()
    p, small, found = answers(dense, test), dense, []
    for step in range(STEPS + 1):
        if step:
            left = whole - round(whole * SHARE * step / STEPS)
            small = cut_to(small, batches, make(dense, seed), choice, left, per)
        q = answers(small, test)
        found.append(
            {
                "macs": tp.trace(small, batches[0][0][:1]).macs() / macs if step else 1.0,
                "accuracy": float((q.argmax(1) == labels).float().mean()),
                "agreement": float((q.argmax(1) == p.argmax(1)).float().mean()),
                "kl": float((p * (p.clamp(min=1e-12).log() - q.clamp(min=1e-12).log())).sum(1).mean()),
            }
        )
        if found[-1]["macs"] < LEAST:
            break
    return found


def at(points: list[dict[str, float]], macs: float | np.ndarray, key: str) -> Any:
    """A curve's value at a share of the multiply-adds, between its steps by straight lines."""
    ordered = sorted(points, key=lambda point: point["macs"])
    return np.interp(macs, [point["macs"] for point in ordered], [point[key] for point in ordered])


def area(points: list[dict[str, float]], key: str = "accuracy") -> float:
    return float(at(points, np.linspace(LEAST, 1, 701), key).mean())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def report(path: Path, plots: Path | None) -> None:
    """Tables of everything measured so far, the best per multiply-add first, and a plot for each ranking."""
    # Net and number of batches, criterion, ranking: the curves of all seeds.
    rows: dict[tuple[str, int], dict[str, dict[str, list[Any]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    found = read(path)
    sizes = {(row["net"], row["batches"]) for row in found if row["batches"]}
    for row in found:
        for net, batches in sizes:
            if net == row["net"] and row["batches"] in (None, batches):
                rows[net, batches][row["criterion"]][row["per"]].append(row["curve"])
    for (net, batches), named in sorted(rows.items()):
        print(f"\n{net}, {batches} batches of 128\n")
        table({name: curves for name, curves in named.items() if name in CRITERIA})
        if any(name in ABLATIONS for name in named):
            print(f"\n{net}, {batches} batches of 128, with one thing changed\n")
            table({name: curves for name, curves in named.items() if name in ("tpv plan", "tpv", *ABLATIONS)})
        for per, words in PER.items():
            if plots is not None:
                of = {name: named[name][per] for name in ordered(named, per) if name in CRITERIA and named[name][per]}
                plot(plots / f"criteria_{net}_{batches}_{per}.svg", of, f"{net}, {batches} batches, {words}")


def table(named: dict[str, dict[str, list[Any]]]) -> None:
    print(
        f"| criterion | seeds | {' | '.join(f'area, {per}' for per in PER.values())} | "
        f"{' | '.join(f'{what}, {per}' for what in AT.values() for per in PER.values())} |"
    )
    print("| --- " * 8 + "|")
    for name in ordered(named, "macs"):
        curves = named[name]
        areas = " | ".join(spread([area(points) for points in curves[per]]) for per in PER)
        values = " | ".join(
            " / ".join(f"{np.mean([at(points, m, key) for points in curves[per]]):.3f}" for m in POINTS)
            if curves[per]
            else "-"
            for key in AT
            for per in PER
        )
        counts = sorted({len(curves[per]) for per in PER if curves[per]})
        print(f"| {name} | {', '.join(map(str, counts))} | {areas} | {values} |")


def ordered(named: dict[str, dict[str, list[Any]]], per: str) -> list[str]:
    return sorted(named, key=lambda name: -np.mean([area(points) for points in named[name][per]] or [0]))


def spread(values: list[float]) -> str:
    """The mean over seeds and their standard deviation."""
    if not values:
        return "-"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def plot(path: Path, curves: dict[str, list[Any]], title: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same curves give the same file
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), sharex=True, sharey=True)
    grid = np.linspace(LEAST, 1, 141)
    for axes, (key, words) in zip(panels, (("accuracy", "top-1"), ("agreement", "agreement with dense")), strict=True):
        for number, (name, seeds) in enumerate(curves.items()):
            values = np.mean([at(points, grid, key) for points in seeds], 0)
            style = ("-", "--", ":")[number // 10]
            axes.plot(grid, values, label=name, linestyle=style, linewidth=2.4 - 0.08 * number)
        axes.set(xlabel="multiply-adds kept", ylabel=f"{words}, test images, no recovery")
        axes.grid(alpha=0.3)
    panels[0].invert_xaxis()
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def batches_of(folder: Path, dense: nn.Module, count: int, seed: int, device: str) -> list[Any]:
    """`count` batches of 128 training images drawn by `seed`, with labels (read by criteria that need them alone)."""
    pool = open_pool(folder / "train", dense, labels="folders").sample(count * 128, seed)
    # Drawn images come back sorted by class; a batch must hold a mixture.
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    items: list[Any] = [pool[i] for i in order]
    images = torch.stack([item[0] for item in items]).to(device, memory_format=torch.channels_last)
    labels = torch.tensor([item[1] for item in items], device=device)
    return list(zip(images.split(128), labels.split(128), strict=True))


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    for seed in args.seeds:
        for name in args.criteria:
            for per in args.per:
                if ALL[name][2] or seed == args.seeds[0]:
                    yield name, per, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/<class>/ and test/<class>/")
    parser.add_argument("--checkpoints", type=Path, help="folder with resnet20_cifar10.safetensors and the like")
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(ALL))
    parser.add_argument("--per", nargs="+", default=list(PER), choices=list(PER))
    parser.add_argument("--test", type=int, default=3000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=Path("runs/criteria.jsonl"))
    parser.add_argument("--plots", type=Path)
    parser.add_argument("--report", action="store_true", help="print what the results file holds, run nothing")
    args = parser.parse_args()
    if not args.report:
        checkpoint = args.checkpoints / f"{args.net}_cifar10.safetensors"
        dense = create_model(f"cifar_{args.net}", str(checkpoint)).to(args.device, memory_format=torch.channels_last)
        held = open_pool(args.data / "test", dense, labels="folders").sample(args.test, 0)
        items: list[Any] = [held[i] for i in range(len(held))]
        images = torch.stack([item[0] for item in items]).contiguous(memory_format=torch.channels_last)
        test = list(images.to(args.device).split(250))
        labels = torch.tensor([item[1] for item in items], device=args.device)
        drawn: dict[int, list[Any]] = {}
        for name, per, seed in jobs(args):
            count = None if name in FROM_WEIGHTS else args.batches
            about = {"net": args.net, "batches": count, "criterion": name, "per": per, "seed": seed}
            if any(about.items() <= row.items() for row in read(args.results)):
                continue
            if seed not in drawn:
                drawn = {seed: batches_of(args.data, dense, args.batches, seed, args.device)}
            start = time.perf_counter()
            points = curve(dense, name, per, drawn[seed], test, labels, seed)
            row = {**about, "test": args.test, "curve": points, "seconds": time.perf_counter() - start}
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{about} area {area(points):.3f} in {row['seconds']:.0f} s", flush=True)
    report(args.results, args.plots)


if __name__ == "__main__":
    main()
