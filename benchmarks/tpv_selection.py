"""Does label-noise TPV on unlabeled training inputs find the checkpoint with the least test loss?

    python benchmarks/tpv_selection.py

Two families of small networks on scikit-learn's digits, 400 images to train on with a fifth of the labels wrong and 898
clean ones to test on: one width stopped at 14 moments of its training, and 12 widths trained for long. A family's test
losses make a U, and so the ranking is judged on both branches of it. A few seconds on one thread.
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune import analysis

STEPS = (5, 10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 400, 600, 800)
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
Row = tuple[str, nn.Module, float, float]


def data(seed: int, samples: int = 400, wrong: float = 0.2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 8 - 1
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images[::2]), generator=generator)[:samples]
    x, y = images[::2][chosen], labels[::2][chosen]
    flipped = torch.rand(samples, generator=generator) < wrong
    y = torch.where(flipped, torch.randint(0, 10, (samples,), generator=generator), y)
    return x, y, images[1::2], labels[1::2]


def train(width: int, stops: tuple[int, ...], seed: int, sets: tuple[Tensor, ...]) -> list[Row]:
    x, y, new, clean = sets
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found: list[Row] = []
    for step in range(1, max(stops) + 1):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in stops:
            with torch.no_grad():
                losses = [float(F.cross_entropy(model(a), b)) for a, b in ((x, y), (new, clean))]
            found.append((f"width {width}, {step} steps", copy.deepcopy(model).eval(), *losses))
    return found


def judge(title: str, rows: list[Row], batches: list[Tensor]) -> None:
    found = analysis.select({name: model for name, model, *_ in rows}, batches)
    print(f"\n{title} ({found.method} form, ridge {found.ridge:.3g}, {sum(map(len, batches))} unlabeled images)\n")
    print("| checkpoint | label-noise TPV | ± | training loss | clean test loss |")
    print("| --- | --- | --- | --- | --- |")
    for name, _, fitted, clean in rows:
        value = found.tpv[name]
        print(f"| {name} | {value.value:.3f} | {value.stderr:.3f} | {fitted:.3f} | {clean:.3f} |")
    bottom = min(range(len(rows)), key=lambda i: rows[i][3])
    branches = {"all": rows, "from the least test loss on": rows[bottom:], "up to it": rows[: bottom + 1]}
    print()
    for branch, some in branches.items():
        if len(some) > 2:
            link = analysis.correlation([found.tpv[r[0]].value for r in some], [r[3] for r in some])
            told = f"rank correlation {link.value:.2f}, 95 % between {link.low:.2f} and {link.high:.2f}"
            print(f"* {branch}, {link.pairs} checkpoints: {told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fitted", type=int, default=100, help="training images whose noise is followed")
    args = parser.parse_args()
    for seed in args.seeds:
        sets = data(seed)
        batches = list(sets[0][: args.fitted].split(50))
        judge(f"Seed {seed}: width 48, stopped early", train(48, STEPS, seed, sets), batches)
        widths = [row for width in WIDTHS for row in train(width, (400,), seed, sets)]
        judge(f"Seed {seed}: widths, 400 steps", widths, batches)


if __name__ == "__main__":
    main()
