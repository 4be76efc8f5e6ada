"""What `Tr(H_eff)` costs to a stated precision, against the estimator that takes one sample at a time.

    python benchmarks/tpv_cost.py --checkpoint resnet20_cifar10.safetensors --data cifar10/train

Both run in turns, on the same images, one thread. Each way has a time for an image and a spread for an image, the
spread with all that is drawn in it (products of different samples, where gradients of several are added up). What
counts is their product: seconds to a relative standard error of 5 %. `--net mlp` takes a small net and random inputs.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tpvprune import analysis
from tpvprune.scoring.heads import head_named
from tpvprune.zoo.data import open_pool
from tpvprune.zoo.models import create_model

TARGET = 0.05
AT_ONCE = 8  # batches in a turn
WAYS: dict[str, dict[str, object]] = {
    "default": {},
    "batched, rows 1": {"engine": "batched", "rows": 1},
    "batched, rows 2": {"engine": "batched", "rows": 2},
    "batched, rows 4": {"engine": "batched", "rows": 4},
    "batched, rows 8": {"engine": "batched", "rows": 8},
    "batched, rows 16": {"engine": "batched", "rows": 16},
    "per sample": {"engine": "per_sample"},
}


def one_by_one(model: nn.Module, batch: Tensor, head: str, seed: int) -> list[float]:
    """A forward and a backward pass with gradients of all parameters for every sample, one cotangent each."""
    parameters, metric, generator = list(model.parameters()), head_named(head), torch.Generator().manual_seed(seed)
    found = []
    for sample in batch.split(1):
        output = model(sample)
        cotangent = metric.cotangent(output.detach(), generator)
        gradients = torch.autograd.grad(output, parameters, cotangent)
        found.append(float(sum(torch.linalg.vecdot(g.flatten(), g.flatten()) for g in gradients)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="cifar_resnet20")
    parser.add_argument("--checkpoint")
    parser.add_argument("--data")
    parser.add_argument("--size", type=int, default=32, help="of random images, where no --data is given")
    parser.add_argument("--heads", nargs="+", default=["softmax", "logits"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=16, help="batches that every way meets")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.net == "mlp":
        model: nn.Module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        model = nn.Sequential(model, nn.Linear(256, 10)).eval()
        batches = [torch.randn(args.batch, 64) for _ in range(args.rounds)]
    else:
        model = create_model(args.net, args.checkpoint)
        if args.data:
            pool = open_pool(args.data, model).sample(args.batch * args.rounds)
            batches = [images for images, _ in pool.loader(args.batch)]
        else:
            batches = [torch.randn(args.batch, 3, args.size, args.size) for _ in range(args.rounds)]
    threads = torch.get_num_threads()
    print(f"{args.net}, {threads} thread(s), {args.rounds} batches of {args.batch}, torch {torch.__version__}")
    for head in args.heads:
        compare(model, batches, head)


def compare(model: nn.Module, batches: list[Tensor], head: str) -> None:
    seconds = dict.fromkeys(["one at a time", *WAYS], 0.0)
    singles: list[float] = []
    estimates: dict[str, list[analysis.Estimate]] = {way: [] for way in WAYS}

    def timed(way: str, run: Callable[[], object]) -> object:
        start = time.perf_counter()
        found = run()
        seconds[way] += time.perf_counter() - start
        return found

    one_by_one(model, batches[0][:4], head, 0)  # libraries make their own buffers on first use
    for options in WAYS.values():
        analysis.trace_heff(model, batches[:1], head, rtol=None, **options)  # type: ignore[arg-type]
    for number in range(0, len(batches), AT_ONCE):
        some = batches[number : number + AT_ONCE]
        singles += timed("one at a time", lambda b=some, n=number: one_by_one(model, torch.cat(b), head, n))  # type: ignore
        for way, options in WAYS.items():
            found = timed(
                way,
                lambda b=some, n=number, o=options: analysis.trace_heff(model, b, head, rtol=None, seed=n, **o),
            )
            estimates[way].append(found)  # type: ignore[arg-type]
    images = sum(map(len, batches))
    values = torch.tensor(singles, dtype=torch.float64)
    rows = {"one at a time": (float(values.mean()), float(values.std() / values.mean()) / math.sqrt(images))}
    for way, some in estimates.items():
        mean = sum(e.value * e.samples for e in some) / images
        error = math.sqrt(sum((e.stderr * e.samples) ** 2 for e in some)) / images
        rows[way] = (mean, error / mean)
    base = None
    print(f"\n{head} head\n\n| estimator | Tr(H) | error, {images} images | ms an image | s to 5 % | times cheaper |")
    print("| --- | --- | --- | --- | --- | --- |")
    for way, (mean, error) in rows.items():
        cost = seconds[way] * (error / TARGET) ** 2
        base = cost if base is None else base
        each = seconds[way] / images * 1e3
        print(f"| {way} | {mean:.4g} | {error:.3f} | {each:.2f} | {cost:.3g} | {base / cost:.1f} |", flush=True)


if __name__ == "__main__":
    main()
