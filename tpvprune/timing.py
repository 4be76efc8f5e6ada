"""How long things take: medians, in turns, with the device's work waited for."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import device_of, evaluation_mode
from tpvprune.calls import arguments_of, check_rows
from tpvprune.kinds import as_verb

Clock = Callable[[], float]
"""Seconds that have passed since some moment."""
LEAST_MS = 0.5  # what is shorter is repeated, so that neither the clock nor the waiting counts
MOST_REPEATS = 20


def milliseconds(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 15,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """The medians of `all_milliseconds`."""
    times = all_milliseconds(runs, device, rounds=rounds, warmup=warmup, clock=clock)
    return {name: statistics.median(taken) for name, taken in times.items()}


def all_milliseconds(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 15,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each of `runs`, taken in turns so that all meet the same disturbances; `rounds` of each.

    Args:
        runs: by name. One that takes less than half a millisecond is timed several times in a row.
        device: where they run; its work is waited for.
        rounds: timed runs of each.
        warmup: runs of each before that, which do not count.
        clock: what tells the time.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    repeats = dict.fromkeys(runs, 1)
    for number in range(rounds + warmup):
        for name, run in runs.items():
            _wait(device)
            start = clock()
            for _ in range(repeats[name]):
                run()
            _wait(device)
            taken = (clock() - start) * 1e3 / repeats[name]
            if number >= warmup:
                times[name].append(taken)
            else:
                repeats[name] = max(1, min(MOST_REPEATS, round(LEAST_MS / max(taken, 1e-6))))
    return times


def milliseconds_inside(
    modules: Mapping[str, nn.Module],
    run: Callable[[], object],
    device: torch.device,
    *,
    rounds: int,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds that each module takes in one `run` of what it is part of, all of its calls together.

    What one of `modules` takes while another one of them runs counts for the inner one alone.

    Args:
        modules: by name.
        run: calls them.
        device: where they run; waited for before and after each call.
        rounds: timed runs.
        warmup: runs before that, which do not count.
        clock: what tells the time.
    """
    times: dict[str, list[float]] = {name: [] for name in modules}
    open_calls: list[tuple[float, list[float]]] = []  # when each began, and what was spent in inner ones

    def before(*_: object) -> None:
        _wait(device)
        open_calls.append((clock(), []))

    def after(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            _wait(device)
            start, inner = open_calls.pop()
            taken = (clock() - start) * 1e3
            times[name][-1] += taken - sum(inner)
            if open_calls:
                open_calls[-1][1].append(taken)

        return hook

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(before))
            hooks.enter_context(module.register_forward_hook(after(name)))
        for _ in range(rounds + warmup):
            for taken in times.values():
                taken.append(0.0)
            run()
    return {name: statistics.median(taken[warmup:]) for name, taken in times.items()}


@torch.no_grad()
def latencies(models: Mapping[str, nn.Module], inputs: Tensor, *, rounds: int = 15) -> dict[str, float]:
    """Median milliseconds of one eager forward pass of each model, taken in turns.

    Args:
        models: by name.
        inputs: one batch, `(batch, ...)`.
        rounds: timed passes of each model, after two that do not count.
    """
    with evaluation_mode(*models.values()):
        runs = {name: partial(model, inputs) for name, model in models.items()}
        return {name: round(ms, 3) for name, ms in milliseconds(runs, inputs.device, rounds=rounds).items()}


@as_verb
@torch.no_grad()
def measured_latency(
    model: nn.Module, example: Any, *, compiled: bool = False, rounds: int = 15, clock: Clock = time.perf_counter
) -> float:
    """Median milliseconds of one forward pass of a whole model, in eval mode and without gradients.

    Args:
        model: any module; its modes are given back.
        example: one batch: a tensor `(batch, ...)`, a tuple of positional or a dict of keyword arguments.
        compiled: the model runs under `torch.compile`; compiling is not timed.
        rounds: timed passes, after three that do not count.
        clock: what tells the time.

    Raises:
        ModelError: the example is nothing a model can be called on, or holds no row.
    """
    device = device_of(model)
    args, kwargs = arguments = arguments_of(example, device)
    check_rows(arguments)
    run = partial(torch.compile(model) if compiled else model, *args, **kwargs)
    with evaluation_mode(model), torch.compiler.set_stance("default"):
        return milliseconds({"": run}, device, rounds=rounds, warmup=3, clock=clock)[""]


def device_name(device: torch.device) -> str:
    """What a device is called, as far as the system says."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        described = ""
    found = re.search(r"^model name\s*:\s*(.+)$", described, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
