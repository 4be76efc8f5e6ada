"""What scoring costs, as a ratio to one plain forward and backward pass (parameter gradients) over the same batches.

    python benchmarks/score_cost.py --nets resnet50 vit_small_patch16_224 --batch 32

Every row is timed in turns with the plain pass, in one process; the ratio is of medians. The estimator that takes one
sample at a time is timed on a few samples and scaled up, and says so. Peak memory is that of a process of its own
(`--memory`): what it holds at most while it scores, above what it held before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpvprune as tp
from tpvprune.scoring.activations import Tapped

ONE_BY_ONE = 4  # samples that the one-at-a-time estimator is timed on


def plain(model: nn.Module, batch: Tensor, labels: Tensor) -> None:
    """Forward and backward with gradients of all parameters."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss = F.cross_entropy(model(batch), labels)
    loss.backward()
    model.zero_grad(set_to_none=True)


def to_the_inputs(model: nn.Module, batch: Tensor) -> None:
    """What one probe costs at least where launching is all there is: no gradient of a parameter, nothing looked at."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs = batch.detach().requires_grad_(True)
    output = model(inputs)
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def one_by_one(model: nn.Module, batch: Tensor, graph: tp.Graph) -> None:
    """One backward pass a sample, with parameter gradients, squared per unit."""
    parameters = dict(model.named_parameters())
    names = list(dict.fromkeys(m.param for g in graph.groups for m in g.of_role("consume")))
    for sample in batch[:ONE_BY_ONE]:
        output = model(sample.unsqueeze(0))
        p = output.detach().softmax(1)
        root = p.sqrt() * (torch.randint(0, 2, p.shape).to(p) * 2 - 1)
        gradients = torch.autograd.grad(output, [parameters[n] for n in names], root - p * root.sum(1, keepdim=True))
        found = dict(zip(names, gradients, strict=True))
        for group in graph.groups:
            for member in group.of_role("consume"):
                (parameters[member.param] * found[member.param]).movedim(member.axis, 0).flatten(1).sum(1).square()


def rows(model: nn.Module, batch: Tensor, graph: tp.Graph, count: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """Name to (what to time, what its time is multiplied by), over the batch `count` times."""
    labels = torch.randint(0, 1000, (len(batch),), device=batch.device)
    batches, labelled = [batch] * count, [(batch, labels)] * count
    scale = count * len(batch) / ONE_BY_ONE
    return {
        "plain forward + backward": (lambda: plain(model, batch, labels), count),
        "forward alone": (lambda: forward(model, batch), count),
        "forward + backward to the inputs, no taps": (lambda: to_the_inputs(model, batch), count),
        "forward + backward to the layers that read units": (lambda: no_reduction(model, batches, graph), 1.0),
        "tpv, 1 probe": (lambda: tp.score(model, batches, graph), 1.0),
        "tpv, 1 probe, sensitivities": (lambda: tp.score(model, batches, graph, tp.TPV(sensitivities=10**6)), 1.0),
        "tpv, all members": (lambda: tp.score(model, batches, graph, tp.TPV(over="all")), 1.0),
        "tpv, per weight, batched": (lambda: tp.score(model, batches, tp.weight_graph(model)), 1.0),
        "jbr": (lambda: tp.score(model, batches, graph, tp.JBR(confidence=0.0)), 1.0),
        "taylor": (lambda: tp.score(model, labelled, graph, tp.Taylor()), 1.0),
        "wanda": (lambda: tp.score(model, batches, graph, tp.Wanda()), 1.0),
        "one sample at a time (scaled up)": (lambda: one_by_one(model, batch, graph), scale),
    }


def no_reduction(model: nn.Module, batches: list[Tensor], graph: tp.Graph) -> None:
    """What one probe costs without the products of activations and gradients."""
    tapped = Tapped(model, graph, "consume")
    tapped.sink.add = lambda *args: None  # type: ignore[method-assign]
    tapped._told, tapped._raw = True, {}  # of layers whose products are not there, and nothing to check them by
    for batch in batches:
        with tapped() as taps:
            output = taps.forward(batch)
            taps.backward(output, torch.randn_like(output), keep_graph=False)


@torch.no_grad()
def forward(model: nn.Module, batch: Tensor) -> None:
    model(batch)


def timed(device: torch.device, run: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def build(args: argparse.Namespace, name: str) -> tuple[nn.Module, Tensor, tp.Graph]:
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(args.device)
    batch = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    if args.channels_last:
        model, batch = model.to(memory_format=torch.channels_last), batch.contiguous(memory_format=torch.channels_last)
    return model, batch, tp.trace(model, batch[:1])


def peak(args: argparse.Namespace, name: str, row: str) -> float:
    """MiB that a process of its own holds at most while it runs a row, above what it held before."""
    command = [sys.executable, __file__, "--nets", name, "--row", row, "--batch", str(args.batch)]
    command += ["--size", str(args.size), "--device", args.device] + ["--channels-last"] * args.channels_last
    # Freed memory goes back to the system at once, or the peak would be that of the allocator's habits.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def one_row(args: argparse.Namespace) -> None:
    model, batch, graph = build(args, args.nets[0])
    run = rows(model, batch, graph, 1)[args.row][0]
    small = rows(model, batch[:1], graph, 1)[args.row][0]
    small()  # libraries make their own buffers on first use
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    run()
    print((_status("VmHWM") - before) / 1024)


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) for line in file if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=4, help="batches that one scoring takes")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too, each row in its own process")
    parser.add_argument("--only", nargs="+", help="rows to time beside the plain pass")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        one_row(args)
        return
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    for net in args.nets:
        model, batch, graph = build(args, net)
        layout = "channels last" if args.channels_last else "contiguous"
        where = f"{device.type} ({name}), {layout}, torch {torch.__version__}"
        print(f"\n{net}, {args.batches} batches of {args.batch} at {args.size} px, {where}")
        every = rows(model, batch, graph, args.batches)
        if unknown := set(args.only or ()) - set(every):
            parser.error(f"--only: no row {', '.join(sorted(unknown))}; choose of {', '.join(every)}")
        chosen = {k: v for k, v in every.items() if not args.only or k in args.only or "plain" in k}
        times: dict[str, list[float]] = {row: [] for row in chosen}
        for number in range(args.rounds + 1):
            for row, (run, scale) in chosen.items():
                precision: Any = (
                    torch.autocast(device.type, getattr(torch, args.autocast)) if args.autocast else nullcontext()
                )
                with precision:
                    spent = timed(device, run) * scale
                if number:
                    times[row].append(spent)
        base = statistics.median(times["plain forward + backward"])
        memory = {row: peak(args, net, row) for row in chosen} if args.memory else {}
        print("| | seconds | ratio | peak MiB | ratio |" if memory else "| | seconds | ratio |")
        print("| --- " * (5 if memory else 3) + "|")
        for row, taken in times.items():
            median = statistics.median(taken)
            more = ""
            if memory:
                more = f" {memory[row]:.0f} | {memory[row] / memory['plain forward + backward']:.2f} |"
            print(f"| {row} | {median:.3f} | {median / base:.2f} |{more}")


if __name__ == "__main__":
    main()
