"""What pruning is worth in milliseconds: two models in turns, in several runtimes, and why where it is little."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tpvprune.batches import device_of, evaluation_mode
from tpvprune.calls import Arguments, arguments_of
from tpvprune.copies import copied
from tpvprune.deploy import runtime
from tpvprune.deploy.export import rows_of
from tpvprune.deploy.reasons import Case, causes_of, findings_of
from tpvprune.errors import InputError
from tpvprune.kinds import as_verb
from tpvprune.planning.cost import Usage
from tpvprune.timing import Clock, all_milliseconds, device_name

Runtime = Literal["eager", "compiled", "onnxruntime"]
RUNTIMES: tuple[Runtime, ...] = ("eager", "compiled", "onnxruntime")
DENSE, PRUNED = "dense", "pruned"
Run = Callable[[Arguments], object]


@dataclass(frozen=True)
class Timing:
    """One model in one runtime at one batch size.

    Attributes:
        model: `dense` or `pruned`.
        runtime: what ran it.
        batch: examples at once.
        ms: median milliseconds of a forward pass.
        low: first quartile.
        high: third quartile.
    """

    model: str
    runtime: str
    batch: int
    ms: float
    low: float
    high: float


@dataclass(frozen=True)
class Bench:
    """What `bench` measured.

    Attributes:
        timings: one a runtime, batch size and model.
        models: per model `params`, `bytes` (parameters and buffers in memory) and `macs` (multiply-adds per example).
        findings: in words, where milliseconds fell by much less than multiply-adds, and why; empty where they did not.
        skipped: runtimes that could not be measured, with the reason.
        measured: device, threads, input, rounds, versions.
    """

    timings: tuple[Timing, ...]
    models: Mapping[str, Mapping[str, int]]
    findings: tuple[str, ...]
    skipped: Mapping[str, str]
    measured: Mapping[str, Any]

    def at(self, model: str, runtime: str, batch: int) -> Timing:
        """One of `timings`.

        Raises:
            InputError: it was not measured.
        """
        for timing in self.timings:
            if (timing.model, timing.runtime, timing.batch) == (model, runtime, batch):
                return timing
        raise InputError(f"{model} was not measured in {runtime} at batch {batch}")

    def speedup(self, runtime: str, batch: int) -> float:
        """How many times faster the pruned model is: dense over pruned medians."""
        return self.at(DENSE, runtime, batch).ms / self.at(PRUNED, runtime, batch).ms

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return asdict(self)


@as_verb
def bench(
    model: nn.Module,
    example: Any,
    *,
    against: nn.Module,
    batches: Sequence[int] = (1, 8),
    runtimes: Iterable[Runtime] = RUNTIMES,
    rounds: int = 30,
    warmup: int = 5,
    clock: Clock = time.perf_counter,
) -> Bench:
    """Time a pruned model and its dense original, in turns, so that both meet the same disturbances.

    Runtimes and batch sizes come one after the other, because the threads of one disturb another. Threads are those
    that torch is set to (`torch.set_num_threads`); onnxruntime gets as many.

    Args:
        model: the pruned one; it is left as it was.
        example: one batch, as the model takes it, with the batch first in every tensor: a tensor `(batch, ...)`, a
            tuple of positional or a dict of keyword arguments. Batches of all sizes are made of its rows.
        against: the dense one, on the same device. Its weights need not be trained.
        batches: batch sizes.
        runtimes: `eager`, `compiled` (`torch.compile`; compiling is not timed), `onnxruntime`. What this machine does
            not have is skipped, with the reason.
        rounds: timed passes of each model.
        warmup: passes of each before that, which do not count.
        clock: what tells the time.

    Raises:
        InputError: no such runtime, a batch size below one, or models on two devices.
        ModelError: a model does not run on the example.
    """
    kinds = tuple(runtimes)
    unknown = [name for name in kinds if name not in RUNTIMES]
    if unknown or not kinds:
        raise InputError(f"runtime {unknown[0] if unknown else None!r} is none of {', '.join(RUNTIMES)}")
    if not batches or min(batches) < 1 or rounds < 1:
        raise InputError(f"batches={list(batches)}, rounds={rounds}: each must be at least 1")
    device = device_of(model)
    if device_of(against) != device:
        raise InputError(f"the pruned model is on {device}, the dense one on {device_of(against)}; move one of them")
    models = {DENSE: against, PRUNED: model}
    arguments = arguments_of(example, device)
    timings: list[Timing] = []
    skipped: dict[str, str] = {}
    with evaluation_mode(*models.values()), torch.no_grad():
        one, two = rows_of(arguments, 1), rows_of(arguments, 2)
        usage = {name: Usage(found, *one) for name, found in models.items()}
        sized = {batch: rows_of(arguments, batch) for batch in batches}
        for kind in kinds:
            try:
                with ExitStack() as stack:
                    runs = {name: _MAKERS[kind](found, two, stack) for name, found in models.items()}
                    for batch, rows in sized.items():
                        passes = {name: partial(run, rows) for name, run in runs.items()}
                        taken = all_milliseconds(passes, device, rounds=rounds, warmup=warmup, clock=clock)
                        timings += [_timing(name, kind, batch, ms) for name, ms in taken.items()]
            except Exception as error:  # whatever a compiler or another runtime raises
                if kind == "eager":
                    raise
                skipped[kind] = runtime.said_by(error)
                timings = [timing for timing in timings if timing.runtime != kind]
        causes = causes_of(model, against, usage[PRUNED], sized, clock=clock)
    costs = {name: _costs(found, usage[name].total) for name, found in models.items()}
    return Bench(
        timings=tuple(timings),
        models=costs,
        findings=findings_of(_cases(timings), costs[DENSE]["macs"], costs[PRUNED]["macs"], causes),
        skipped=skipped,
        measured={
            "device": f"{device.type}: {device_name(device)}",
            "threads": torch.get_num_threads(),
            "input": [list(v.shape[1:]) for v in (*one[0], *one[1].values()) if isinstance(v, torch.Tensor)],
            "rounds": rounds,
            "warmup": warmup,
            "versions": {"torch": torch.__version__, "python": platform.python_version(), **runtime.versions()},
        },
    )


def _eager(model: nn.Module, example: Arguments, stack: ExitStack) -> Run:
    return lambda arguments: model(*arguments[0], **arguments[1])


def _compiled(model: nn.Module, example: Arguments, stack: ExitStack) -> Run:
    # Code that is free in its batch is made for no size in particular.
    compiled = torch.compile(copied(model), dynamic=False)
    stack.callback(torch._dynamo.reset)
    stack.enter_context(torch.compiler.set_stance("default"))
    return lambda arguments: compiled(*arguments[0], **arguments[1])


def _onnxruntime(model: nn.Module, example: Arguments, stack: ExitStack) -> Run:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    runtime.check_installed()
    device = device_of(model)
    on_cpu = copied(model).cpu().eval()
    positional, by_name = example
    moved = arguments_of(positional, _CPU)[0] if positional else (), arguments_of(by_name, _CPU)[1] if by_name else {}
    runtime.write_onnx(on_cpu, moved, Path(folder) / "model.onnx")
    return runtime.session(Path(folder) / "model.onnx", threads=torch.get_num_threads(), device=device)


_CPU = torch.device("cpu")
_MAKERS: dict[str, Callable[[nn.Module, Arguments, ExitStack], Run]]
_MAKERS = {"eager": _eager, "compiled": _compiled, "onnxruntime": _onnxruntime}


def _timing(name: str, kind: str, batch: int, taken: Sequence[float]) -> Timing:
    low, middle, high = statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else [*taken] * 3
    return Timing(name, kind, batch, round(middle, 4), round(low, 4), round(high, 4))


def _costs(model: nn.Module, macs: int) -> dict[str, int]:
    kept = (*model.parameters(), *model.buffers())
    return {"params": sum(p.numel() for p in model.parameters()), "bytes": sum(t.nbytes for t in kept), "macs": macs}


def _cases(timings: Sequence[Timing]) -> list[Case]:
    """Dense and pruned together, per runtime and batch."""
    by_place = {(t.model, t.runtime, t.batch): t for t in timings}
    return [
        Case(t.runtime, t.batch, (t.low, t.ms, t.high), (p.low, p.ms, p.high))
        for t in timings
        for p in [by_place[PRUNED, t.runtime, t.batch]]
        if t.model == DENSE
    ]
