"""How long things take: medians, in turns, with the device's work waited for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import nn


def milliseconds(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int = 15, warmup: int = 2
) -> dict[str, float]:
    """Median milliseconds of each of `runs`, taken in turns so that all meet the same disturbances.

    Args:
        runs: by name.
        device: where they run.
        rounds: timed runs of each.
        warmup: runs of each before that, which are not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warmup):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if number >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}


def milliseconds_inside(
    modules: Mapping[str, nn.Module], run: Callable[[], object], device: torch.device, *, rounds: int, warmup: int = 2
) -> dict[str, float]:
    """Median milliseconds that each module takes in one `run` of what it is part of, all of its calls together.

    Args:
        modules: by name.
        run: calls them.
        device: where they run; waited for before and after each call.
        rounds: timed runs.
        warmup: runs before that, which are not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in modules}
    starts: dict[str, float] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            _wait(device)
            starts[name] = time.perf_counter()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            _wait(device)
            times[name][-1] += (time.perf_counter() - starts[name]) * 1e3

        return hook

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(before(name)))
            hooks.enter_context(module.register_forward_hook(after(name)))
        for _ in range(rounds + warmup):
            for taken in times.values():
                taken.append(0.0)
            run()
    return {name: statistics.median(taken[warmup:]) for name, taken in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
