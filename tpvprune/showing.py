"""How the command line does runs, and shows what their stages found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tpvprune.console import bars, err, log_line, number, out, print_json, print_table
from tpvprune.measures import scored_on
from tpvprune.processes import launched, met
from tpvprune.recipe import Recipe
from tpvprune.runfolder import PRODUCTS
from tpvprune.types import Graph
from tpvprune.workflow import Run

STOPPED = 130  # the exit code of a program that Ctrl-C ended


@contextmanager
def stoppable(folder: Path) -> Iterator[None]:
    """Say on Ctrl-C what is kept, and end as stopped programs do."""
    try:
        yield
    except KeyboardInterrupt:
        if launched()[0] == 0:
            err.print(
                f"tpvprune: stopped; what was done so far is kept in {folder}, and the same command goes on there",
                highlight=False,
                markup=False,
            )
        raise SystemExit(STOPPED) from None


def finish(runs: list[tuple[Recipe, Path]], stage: str, as_json: bool) -> None:
    """Do the runs up to a stage, with the other processes of a launcher, and print what that stage found."""
    found, first = [], launched()[0] == 0
    with met():
        for recipe, folder in runs:
            if len(runs) > 1 and first:
                err.print(f"{recipe.name} -> {folder}", highlight=False)
            with stoppable(folder), bars() if first else nullcontext() as progress:
                job = Run(recipe, folder, progress=progress, log=log_line)
                told = job.until(stage)
            found.append({"recipe": recipe.name, "out": str(folder), "stage": stage, **told})
            if not as_json and first:
                print_stage(stage, told, folder)
    if as_json and first:
        print_json(found[0] if len(found) == 1 else found)


def print_stage(stage: str, told: Mapping[str, Any], folder: Path) -> None:
    """What a stage says of itself, each in its own way."""
    printer: Callable[[Mapping[str, Any], Path], None] = {
        "trace": _print_trace,
        "eval": _print_metrics,
        "report": print_report,
    }.get(stage, _print_plain)
    printer(told, folder)


def _print_plain(told: Mapping[str, Any], folder: Path) -> None:
    rows = [
        [key.replace("_", " "), number(value)] for key, value in told.items() if not isinstance(value, (dict, list))
    ]
    print_table(["result", "value"], [*rows, ["folder", str(folder)]])


def _print_trace(told: Mapping[str, Any], folder: Path) -> None:
    _print_plain(told, folder)
    graph = Graph.load(folder / PRODUCTS["trace"])
    rows = [[g.id, g.kind, str(g.units), ", ".join(m.layer for m in g.of_role("consume"))] for g in graph.groups]
    print_table(["group", "unit", "units", "read by"], rows)
    if told["stays_whole"]:
        print_table(["stays whole", "because"], [[name, why] for name, why in told["stays_whole"].items()])


def _print_metrics(told: Mapping[str, Any], folder: Path) -> None:
    names = list(dict.fromkeys(key for metrics in told.values() for key in metrics))
    rows = [[name, *(number(told[m].get(name)) for m in told)] for name in names]
    print_table(["metric", *told], rows)


def print_report(told: Mapping[str, Any], folder: Path) -> None:
    """The table before / pruned / recovered, and what was asked."""
    models = [name for name in ("before", "pruned", "recovered") if told.get(name)]
    rows = [[key, *(number(told[m][key]) for m in models)] for key in ("params", "macs", "latency_ms")]
    for key in dict.fromkeys(k for m in models for k in told[m]["metrics"]):
        rows.append([key, *(number(told[m]["metrics"].get(key)) for m in models)])
    print_table(["measure", *models], rows, title=f"{folder}")
    asked, got, drift = told["asked"], told["got"], told["drift"]
    seconds = sum(told["seconds"].values())
    data = told["data"]
    for name, bound in asked.items():
        share = "" if got[name]["share"] is None else f" ({got[name]['share']:.1%})"
        out.print(
            f"asked {name} <= {number(bound['at_most'])} ({bound['as_written']}), "
            f"got {number(got[name]['value'])}{share}"
            + (f"; measured {number(got[name]['measured'])}" if "measured" in got[name] else ""),
            highlight=False,
            markup=False,
        )
    if "left_out" in data:
        out.print(f"left out {data['left_out']}", highlight=False, markup=False)
    out.print(
        f"KL to the dense model in nats: predicted {number(drift['predicted_kl'])}, "
        f"pruned {number(drift['pruned_kl'])}, recovered {number(drift['recovered_kl'])}\n"
        f"{scored_on(data['scored'])}, measured on {data['measured']:,} others, "
        f"{data.get('skipped', 0)} skipped; {seconds:.0f} s\n"
        f"load it: tpvprune.load({str(folder)!r}); look at it: {folder / PRODUCTS['report']}",
        highlight=False,
        markup=False,
    )
