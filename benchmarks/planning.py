"""Seconds and memory of a plan (trace, magnitude scores, allocate, apply), beside torch-pruning's own pruner.

    python benchmarks/planning.py --nets resnet50 resnet152 convnext_tiny

Every row runs in a process of its own, in turns, on random weights; seconds are medians, memory is the most that the
process held above what it held with the model loaded. Both tools remove channels to half of the multiply-adds by L1
norm, ours to a budget of multiply-adds and torch-pruning globally in steps until as much is gone. `--joint` times the
joint allocator alone, on made-up sensitivities of 12,000 units and 1,280 samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import Any

import timm
import torch
from torch import nn

import tpvprune as tp

NETS = (
    "resnet50",
    "resnet152",
    "convnext_tiny",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "efficientnet_b0",
)
SHARE = 0.5


def ours(model: nn.Module, example: torch.Tensor) -> dict[str, float]:
    marks = [time.perf_counter()]
    graph = tp.trace(model, example)
    marks.append(time.perf_counter())
    plan = tp.allocate(tp.score(model, [example], graph, tp.L1()), graph, tp.Budget(macs=SHARE))
    marks.append(time.perf_counter())
    small = tp.apply(model, plan)
    marks.append(time.perf_counter())
    small(example)
    names = ("trace", "plan", "apply")
    return {n: b - a for n, a, b in zip(names, marks, marks[1:], strict=False)} | {"macs": plan.macs / graph.macs()}


def peer_pruner(model: nn.Module, example: torch.Tensor, **settings: Any) -> Any:
    """torch-pruning's pruner by L1 norm, with the settings of its own timm example."""
    import torch_pruning

    for module in model.modules():
        if hasattr(module, "fused_attn"):  # which a trace does not see through
            module.fused_attn = False
    heads = {m.qkv: m.num_heads for m in model.modules() if _attends(m)}
    found = model.get_classifier()  # type: ignore[operator]  # a timm model
    ends = found if isinstance(found, list | tuple) else [found]
    kept = {"ignored_layers": [end for end in ends if isinstance(end, nn.Module)], "num_heads": heads}
    importance = torch_pruning.importance.MagnitudeImportance(p=1)
    return torch_pruning.pruner.BasePruner(model, example, importance=importance, **kept, **settings)


def step_of_peer(model: nn.Module, pruner: Any) -> None:
    """One step, after which attention is told its new sizes, as that example does."""
    pruner.step()
    for module in filter(_attends, model.modules()):
        module.num_heads = pruner.num_heads[module.qkv]
        width = module.qkv.out_features // 3  # type: ignore[union-attr]  # a linear layer
        module.head_dim = width // module.num_heads  # type: ignore[operator]
        if hasattr(module, "attn_dim"):
            module.attn_dim = width


def _attends(module: nn.Module) -> bool:
    return hasattr(module, "num_heads") and isinstance(getattr(module, "qkv", None), nn.Linear)


def theirs(model: nn.Module, example: torch.Tensor) -> dict[str, float]:
    """torch-pruning's pruner, globally in steps."""
    import torch_pruning

    dense = torch_pruning.utils.count_ops_and_params(model, example)[0]
    start = time.perf_counter()
    pruner = peer_pruner(
        model,
        example,
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,
        iterative_steps=40,
        round_to=8,
    )
    built = time.perf_counter()
    spent = 0.0
    macs = 1.0
    for _ in range(40):
        begin = time.perf_counter()
        step_of_peer(model, pruner)
        spent += time.perf_counter() - begin
        macs = torch_pruning.utils.count_ops_and_params(model, example)[0] / dense  # not counted
        if macs <= SHARE:
            break
    return {"trace": built - start, "plan": spent, "apply": 0.0, "macs": macs}


def joint() -> dict[str, float]:
    """The joint allocator on a chain of 12,000 units."""
    widths = [1000] * 12
    layers = [nn.Linear(a, b) for a, b in zip([8, *widths], [*widths, 8], strict=True)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())])
    graph = tp.trace(model, torch.randn(1, 8))
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1280, 40, generator=generator) @ torch.randn(40, graph.units, generator=generator)
    rows = common + torch.randn(1280, graph.units, generator=generator)
    known = tp.Sensitivities(
        tuple((g.id, g.units) for g in graph.groups), rows, torch.zeros(graph.units, dtype=torch.float64), 1280
    )
    values = dict(zip((g.id for g in graph.groups), rows.double().square().mean(0).split(1000), strict=True))
    scores = tp.Scores(values, None, "made up", 1280, 1, 0, graph.model_id, sensitivities=known)
    found = {}
    for round_to in (8, 1):
        start = time.perf_counter()
        plan = tp.allocate(scores, graph, tp.Budget(macs=SHARE, round_to=round_to))
        found[f"round_to={round_to}"] = time.perf_counter() - start
        found[f"macs, round_to={round_to}"] = plan.macs / graph.macs()
    return found


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(net: str, which: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = timm.create_model(net).eval()
    example = torch.randn(1, *model.default_cfg["input_size"])
    with torch.no_grad():
        model(example)
    before = peak()
    found = {"ours": ours, "torch-pruning": theirs}[which](model, example)
    return {**found, "peak": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--joint", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    if args.joint:
        for name, value in joint().items():
            print(f"{name}: {value:.2f}")
        return
    print("| net | tool | trace, s | plan, s | apply, s | in all, s | peak MiB | multiply-adds kept |")
    print("| --- " * 8 + "|")
    for net in args.nets:
        rows: dict[str, list[dict[str, Any]]] = {"ours": [], "torch-pruning": []}
        wrong: dict[str, str] = {}
        for _ in range(args.rounds):
            for which in rows:
                done = subprocess.run(
                    [sys.executable, __file__, "--one", net, which], capture_output=True, text=True, timeout=1200
                )
                if done.returncode:
                    wrong[which] = done.stderr.strip().splitlines()[-1]
                else:
                    rows[which].append(json.loads(done.stdout.splitlines()[-1]))
        for which, found in rows.items():
            if not found:
                print(f"| {net} | {which} | fails: {wrong[which]} |", flush=True)
                continue
            value = {key: statistics.median(row[key] for row in found) for key in found[0]}
            whole = statistics.median(row["trace"] + row["plan"] + row["apply"] for row in found)
            print(
                f"| {net} | {which} | {value['trace']:.2f} | {value['plan']:.2f} | {value['apply']:.2f} | {whole:.2f} "
                f"| {value['peak']:.0f} | {value['macs']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
