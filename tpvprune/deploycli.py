"""Verbs for what comes after pruning: `export`, `bench` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn

from tpvprune.checkpoint import image_shape, load
from tpvprune.console import number, out, print_json, print_table
from tpvprune.deploy.bench import DENSE, PRUNED, RUNTIMES, Bench, bench
from tpvprune.deploy.export import SUFFIXES, Exported, Format, export
from tpvprune.deploy.page import markdown, write_page
from tpvprune.deploy.story import Story
from tpvprune.errors import InputError
from tpvprune.options import (
    AsJson,
    Bytes,
    Checkpoint,
    Data,
    Drift,
    Labels,
    Latency,
    Macs,
    Out,
    Overrides,
    Params,
    Target,
)
from tpvprune.processes import launched
from tpvprune.report import stored_report
from tpvprune.runfolder import PRODUCTS
from tpvprune.showing import finish, print_report
from tpvprune.targets import flags, resolve
from tpvprune.zoo.data import input_size
from tpvprune.zoo.models import build_source, create_model, source_of

Folder = Annotated[Path, typer.Argument(help="A run's folder, or one that tpvprune.save wrote.", metavar="DIR")]
Size = Annotated[
    int | None, typer.Option(min=1, help="Height and width of the input in pixels; the plan's, or the model's own.")
]


def add_deploy_verbs(app: typer.Typer) -> None:
    """Register `export`, `bench` and `report`."""
    app.command("report")(report)
    app.command("export")(export_)
    app.command("bench")(bench_)


def report(
    target: Target,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    data: Data = None,
    labels: Labels = None,
    macs: Macs = None,
    params: Params = None,
    size: Bytes = None,
    latency_ms: Latency = None,
    drift: Drift = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print it as a model card, in Markdown.")] = False,
    out_dir: Out = None,
    as_json: AsJson = False,
) -> None:
    """Print the report of a run, and write it as a page: report.html in its folder."""
    if as_markdown and as_json:
        raise InputError("--markdown and --json are two forms of one report; give one of them")
    bounds = {"macs": macs, "params": params, "bytes": size, "latency_ms": latency_ms, "drift": drift}
    given = flags(overrides, checkpoint=checkpoint, data=data, labels=labels, **bounds)
    stored = Path(target) / PRODUCTS["eval"]
    if stored.is_file() and not (given or out_dir):
        if launched()[0]:
            return
        told = stored_report(stored)  # looking at a result needs neither its images nor its weights
        if as_markdown:
            out.print(markdown(Story.of(target)), highlight=False, markup=False)
            return
        write_page(target)
        print_json(told) if as_json else print_report(told, Path(target))
        return
    if as_markdown:
        raise InputError(f"--markdown reads a finished run, and {target} holds no report; run it first")
    finish(resolve(target, given, out_dir), "report", as_json)


def export_(
    folder: Folder,
    format: Annotated[str, typer.Option("--format", "-f", help="onnx, torch-export or timm-state-dict.")] = "onnx",
    file: Annotated[Path | None, typer.Option("--out", "-o", help="The file; DIR/export/model.* by default.")] = None,
    size: Size = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0.0, help="Largest difference allowed, as a share of the largest output.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a pruned model for another runtime, with a free batch, and check what it gives."""
    if format not in SUFFIXES:
        raise InputError(f"--format {format} is none of {', '.join(SUFFIXES)}")
    kind: Format = format
    model, dense = load(folder), None
    if source_of(model) is not None:
        dense = build_source(source_of(model) or {})
    target = file or folder / "export" / f"model{SUFFIXES[kind]}"
    example = torch.randn(2, *_shape(model, size), generator=torch.Generator().manual_seed(0))
    told = export(model, target, example, format=kind, tolerance=tolerance, dense=dense)
    print_json(told.to_json()) if as_json else _print_export(told)


def bench_(
    folder: Folder,
    against: Annotated[
        str | None, typer.Option(help="What to compare with: a saved folder or a model's name; the dense original.")
    ] = None,
    batches: Annotated[str, typer.Option("--batch", help="Batch sizes, as 1,8.")] = "1,8",
    runtimes: Annotated[str, typer.Option("--runtime", help="Of eager, compiled, onnxruntime.")] = ",".join(RUNTIMES),
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes of each model.")] = 30,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one operator; torch's choice.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    size: Size = None,
    as_json: AsJson = False,
) -> None:
    """Time a pruned model and the dense one in turns, and say why where fewer multiply-adds save no time."""
    try:
        counts = [int(part) for part in batches.split(",")]
    except ValueError as error:
        raise InputError(f"--batch {batches} is no list of sizes; write it as 1,8") from error
    model = load(folder)
    dense = _dense_of(model, against)
    shape = _shape(model, size)
    where = _device(device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        told = bench(
            model.to(where),
            torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)),
            against=dense.to(where),
            batches=counts,
            runtimes=cast(Any, runtimes.split(",")),
            rounds=rounds,
        )
    finally:
        torch.set_num_threads(before)
    if not told.timings:
        reasons = "; ".join(f"{name} was skipped: {why}" for name, why in told.skipped.items())
        raise InputError(f"--runtime {runtimes} leaves nothing to time: {reasons}; name another one, as eager")
    print_json(told.to_json()) if as_json else _print_bench(told)


def _shape(model: nn.Module, size: int | None) -> tuple[int, ...]:
    """What one image is: as asked, as the plan was made for, or as the model says."""
    return input_size(model, size) if size else image_shape(model)


def _dense_of(model: nn.Module, against: str | None) -> nn.Module:
    """A saved model, a model by name, or what the pruned one was; its weights do not matter."""
    if against is None:
        return build_source(source_of(model) or {})
    if Path(against).is_dir():
        return load(against)
    return create_model(against)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}; try cpu") from error
    return device


def _print_export(told: Exported) -> None:
    def row(name: str, dense: int | None, now: int) -> list[str]:
        return [name, number(dense), number(now), f"{now / dense:.1%}" if dense else "-"]

    rows = [row("bytes of the file", told.dense_bytes, told.bytes), row("params", told.dense_params, told.params)]
    print_table([told.format, "dense", "pruned", "share"], rows)
    batches = ", ".join(map(str, told.batches))
    out.print(
        f"largest difference from the model {told.difference:.3g}, largest output {told.largest:.3g} "
        f"(batches of {batches}; at most {told.tolerance:g} of it is allowed)\n{told.path}",
        highlight=False,
        markup=False,
    )


def _print_bench(told: Bench) -> None:
    def ms(model: str, runtime: str, batch: int) -> str:
        found = told.at(model, runtime, batch)
        return f"{found.ms:.3g} ({found.low:.3g} to {found.high:.3g})"

    rows = [
        [
            t.runtime,
            str(t.batch),
            ms(DENSE, t.runtime, t.batch),
            ms(PRUNED, t.runtime, t.batch),
            f"{told.speedup(t.runtime, t.batch):.2f}x",
        ]
        for t in told.timings
        if t.model == DENSE
    ]
    print_table(["runtime", "batch", "dense ms", "pruned ms", "faster"], rows)
    costs = told.models
    rows = [
        [
            name,
            number(costs[DENSE][name]),
            number(costs[PRUNED][name]),
            f"{costs[PRUNED][name] / costs[DENSE][name]:.1%}",
        ]
        for name in ("macs", "params", "bytes")
    ]
    print_table(["cost", "dense", "pruned", "share"], rows)
    measured = told.measured
    shapes = " and ".join("x".join(map(str, shape)) for shape in measured["input"])
    lines = [
        f"median (quartiles) of {measured['rounds']} passes in turns after {measured['warmup']} to warm up; "
        f"{measured['device']}, {measured['threads']} thread(s), input {shapes}",
        *(f"{name} was skipped: {why}" for name, why in told.skipped.items()),
        *told.findings,
    ]
    out.print("\n".join(lines), highlight=False, markup=False)
