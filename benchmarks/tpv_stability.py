"""TPV on training inputs against held-out ones over widths and sample sizes, on synthetic data.

    python benchmarks/tpv_stability.py --out stability.json --plot docs/plots/tpv_stability.svg

A teacher (a random tanh network of 20 inputs and 3 outputs, plus noise of 0.1) is learnt by networks of one hidden
layer, 1 to 256 units wide, from 10, 100 or 1000 inputs; 1000 others are held out. Four noises: independent on every
weight, SGD by its trace and by its trajectory, rounding to 8 bits, noisy targets by their closed form.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import tpvprune as tp
from tpvprune import analysis

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SAMPLES = (10, 100, 1000)
MEASURED = (("isotropic", "trace"), ("sgd", "empirical"), ("quant", "empirical"), ("label", "closed"))


def teacher(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    first, second = torch.randn(20, 8, generator=generator) / 20**0.5, torch.randn(8, 3, generator=generator) / 8**0.5
    return torch.tanh(2 * x @ first) @ second


def make(width: int, samples: int, seed: int, steps: int = 1500) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, new = torch.randn(samples, 20, generator=generator), torch.randn(1000, 20, generator=generator)
    y = teacher(x, seed) + 0.1 * torch.randn(samples, 3, generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), list(x.split(64)), list(new.split(64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    sgd = analysis.SGD(lr=0.01, batch_size=8, penalty=0.1, burn_in=200, every=20, snapshots=5, chains=4)
    found = analysis.stability(
        make,
        analysis.grid(samples=args.samples, width=args.widths, seed=args.seeds),
        [
            lambda s: s.perturbed("isotropic, sigma 0.01", tp.Isotropic(0.01)),
            lambda s: s.sgd(sgd),
            lambda s: s.quantisation(8),
            label,
        ],
        head="logits",
        rtol=None,
        draws=8,
        progress=lambda stage, done, total: print(f"\r{done} of {total}", end="", flush=True),
    )
    if args.out:
        args.out.write_text(json.dumps(found.to_json()))
    print(f"\n\n{time.perf_counter() - start:.0f} s\n")
    names = [f"{noise}, {form}" for noise, form in MEASURED]
    print(f"| training inputs | width | {' | '.join(names)} |\n| --- | --- |{' --- |' * len(names)}")
    for samples in args.samples:
        for width in args.widths:
            cells = []
            for noise, form in MEASURED:
                try:
                    some = found.where(samples=samples, width=width).of(noise, form)
                except tp.InputError:
                    cells.append("-")
                    continue
                ratios = torch.tensor([f.ratio.value for f in some])
                cells.append(
                    f"{float(ratios.log().mean().exp()):.2f} ({float(ratios.min()):.2f} to {float(ratios.max()):.2f})"
                )
            print(f"| {samples} | {width} | {' | '.join(cells)} |")
    print(f"\n| training inputs | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}")
    for samples in args.samples:
        cells = []
        for noise, form in MEASURED:
            try:
                part = found.where(samples=samples)
                cells.append(f"{part.off_diagonal(noise, form):.2f}, {part.rank_correlation(noise, form):.2f}")
            except tp.InputError:
                cells.append("-")
        print(f"| {samples} | {' | '.join(cells)} |")
    if args.plot:
        plot(args.plot, found, args.samples)


def label(setting: analysis.Setting) -> list[analysis.Finding]:
    """The closed form, where it is small enough."""
    try:
        return [f for f in setting.labels(analysis.LabelNoise(sigma=0.1, repeats=1, steps=1)) if f.form == "closed"]
    except tp.InputError:
        return []


def plot(path: Path, found: analysis.Stability, samples: list[int]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(1, len(MEASURED), figsize=(3.4 * len(MEASURED), 3.4))
    for axis, (noise, form) in zip(axes, MEASURED, strict=True):
        edges = []
        for count in samples:
            try:
                some = found.where(samples=count).of(noise, form)
            except tp.InputError:
                continue
            train, test = [f.train.value for f in some], [f.test.value for f in some]
            axis.loglog(train, test, "o", markersize=3.5, label=f"{count} inputs", alpha=0.7)
            edges += train + test
        axis.plot([min(edges), max(edges)], [min(edges), max(edges)], color="grey", linewidth=0.8)
        axis.set_title(f"{noise} ({form})", fontsize=10)
        axis.set_xlabel("TPV on training inputs")
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("TPV on held-out inputs")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
