"""How well latency tables predict: plans of half the multiply-adds or milliseconds, predicted and measured.

    python benchmarks/latency.py resnet18 resnet50 vit_tiny_patch16_224

`--cpu-clock` counts the seconds that one thread works, which other jobs on the machine hardly change. `error` compares
milliseconds; `relative` compares shares of the dense model's, which was measured again beside the pruned ones.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import timm
import torch

import tpvprune as tp
from tpvprune.timing import milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--cpu-clock", action="store_true", help="one thread, and the time that it works")
    given = parser.parse_args()
    if given.cpu_clock:
        torch.set_num_threads(1)
    for name in given.models:
        compare(name, given)


def compare(name: str, given: argparse.Namespace) -> None:
    clock = time.thread_time if given.cpu_clock else time.perf_counter
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    inputs = torch.randn(given.batch, *model.default_cfg["input_size"])
    graph = tp.trace(model, inputs[:1])
    start = time.perf_counter()
    table = tp.latency_table(model, graph, inputs, compiled=given.compiled, clock=clock)
    took = time.perf_counter() - start
    print(f"{name}: table of {len(table.layers)} layers in {took:.0f} s, {table.fixed:.1f} ms fixed")
    scores = tp.score(model, [inputs], graph, tp.L1())
    plans = {"dense": tp.Plan({}, graph)}
    for budget in ({"macs": 0.7}, {"macs": 0.5}, {"latency_ms": 0.7}, {"latency_ms": 0.5}):
        start = time.perf_counter()
        plan = tp.allocate(scores, graph, tp.Budget(**budget), allocator="global", latency=table)
        (quantity, share) = next(iter(budget.items()))
        plans[f"{quantity} {share}"] = plan
        print(f"  {quantity} {share}: planned in {time.perf_counter() - start:.2f} s")
    nets = {what: tp.apply(model, plan) for what, plan in plans.items()}
    with torch.no_grad():
        runs = {
            w: partial(torch.compile(net, dynamic=False) if given.compiled else net, inputs) for w, net in nets.items()
        }
        got = milliseconds(runs, inputs.device, rounds=given.rounds, clock=clock)
    told = {what: table.latency(graph, plan.keep) for what, plan in plans.items()}
    print(f"  {'plan':16}{'macs':>6}{'predicted':>11}{'measured':>10}{'error':>8}{'relative':>10}")
    for what, plan in plans.items():
        error = told[what] / got[what] - 1
        relative = (told[what] / told["dense"]) / (got[what] / got["dense"]) - 1
        share = plan.macs / graph.macs()
        print(f"  {what:16}{share:6.2f}{told[what]:11.1f}{got[what]:10.1f}{error:+8.1%}{relative:+10.1%}", flush=True)


if __name__ == "__main__":
    main()
