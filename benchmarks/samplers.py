"""How noisy one probe is: samplers of the softmax metric against the exact sum over classes, on the same images.

    python benchmarks/samplers.py --checkpoint resnet20_cifar10.safetensors --data cifar10/train

All samplers have `E[u u^T] = diag(p) - p p^T`. The error is the root mean square over seeds of a channel's relative
deviation from its exact score, averaged over channels; `tau` is Kendall's rank correlation with the exact ranking.
Antithetic draws (`u` and `-u`) have equal squares, and are no second draw. What the choice of images does to a score is
its own row: the exact scores' relative standard error, which no number of probes makes smaller.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import tpvprune as tp
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model


@dataclass(frozen=True)
class Labels(tp.Softmax):
    """`e_y - p` with the class `y` drawn from `p`: the gradient of a sampled label's log likelihood."""

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """`(batch, classes)`, as `output`."""
        p = output.double().softmax(1)
        drawn = torch.rand(len(p), 1, generator=generator, dtype=torch.float64).to(p.device)
        y = torch.searchsorted(p.cumsum(1), drawn).clamp(max=p.shape[1] - 1)
        return (torch.zeros_like(p).scatter_(1, y, 1.0) - p).to(output.dtype)


@dataclass(frozen=True)
class Gaussian(tp.Softmax):
    """`sqrt(p) g - p <sqrt(p), g>` with `g` standard normal."""

    def cotangent(self, output: Tensor, generator: torch.Generator) -> Tensor:
        """`(batch, classes)`, as `output`."""
        p = output.double().softmax(1)
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        root = p.sqrt() * g
        return (root - p * root.sum(1, keepdim=True)).to(output.dtype)


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(values.values()))


def tau(a: Tensor, b: Tensor) -> float:
    signs = [(value.unsqueeze(1) - value).sign() for value in (a, b)]
    return float((signs[0] * signs[1]).sum() / (len(a) * (len(a) - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--checkpoint")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    model = create_model(args.model, args.checkpoint).eval()
    batches = list(open_pool(args.data, model).sample(args.images, 0).loader(128))
    graph = tp.trace(model, batches[0][:1])
    exact = tp.score(model, batches, graph, tp.TPV(probes="exact", sensitivities=0))
    assert exact.stderr is not None
    truth = flat(exact.values)
    live = truth > 1e-6 * truth.max()
    truth = truth[live]
    images = float((flat(exact.stderr)[live] / truth).mean())
    print("| sampler | probes | relative error | tau | seconds |\n| --- | --- | --- | --- | --- |")
    print(f"| exact sum | {args.images} images | {images:.3f} (of the images) | 1 | |")
    for name, head in (("Rademacher", tp.Softmax()), ("sampled label", Labels()), ("Gaussian", Gaussian())):
        for probes in (1, 2, 4):
            start = time.perf_counter()
            found = [
                flat(tp.score(model, batches, graph, tp.TPV(head, probes, seed=seed, sensitivities=0)).values)[live]
                for seed in range(args.seeds)
            ]
            spent = (time.perf_counter() - start) / args.seeds
            error = torch.stack([(one / truth - 1).square() for one in found]).mean(0).sqrt().mean()
            ranks = sum(tau(one, truth) for one in found) / args.seeds
            print(f"| {name} | {probes} | {float(error):.3f} | {ranks:.3f} | {spent:.1f} |", flush=True)


if __name__ == "__main__":
    main()
