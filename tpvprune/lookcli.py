"""Verbs that look before anything is cut: what a model is made of, and which of its groups are robust."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from typer.core import TyperCommand

from tpvprune import plots
from tpvprune.console import bars, log_line, number, out, print_json, print_table
from tpvprune.curves import SensitivityCurve, SensitivityCurves
from tpvprune.errors import InputError
from tpvprune.files import write_bytes
from tpvprune.groupwise import SHARES, checked_shares
from tpvprune.groupwise import sensitivity as curves_of
from tpvprune.options import AsJson, Bytes, Checkpoint, Data, Latency, Macs, Overrides, Params, Target
from tpvprune.planning.graph import trace
from tpvprune.planning.inspection import Ask, InspectedGroup, Inspection, reasons_of
from tpvprune.planning.inspection import inspect as inspected
from tpvprune.planning.latency import LatencyCost, default_cache, latency_table
from tpvprune.planning.widths import Costs
from tpvprune.recipe import Recipe, validate_recipe
from tpvprune.runfolder import PRODUCTS, branch
from tpvprune.scores import Scores
from tpvprune.scoring.tpv import TPV
from tpvprune.showing import stoppable
from tpvprune.targets import flags, resolve
from tpvprune.types import Graph
from tpvprune.workflow import Run
from tpvprune.zoo.data import input_size
from tpvprune.zoo.models import create_model, is_model

CURVES, PLOT = "sensitivity.json", "sensitivity.svg"

Size = Annotated[int | None, typer.Option(min=1, help="Height and width of the input in pixels; the model's own.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Images to predict from and, as many others, to measure on.")]
Beside = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the results; runs/NAME/sensitivity.")]
Shares = Annotated[
    list[float] | None, typer.Option(help="Shares of a group's units that stay, as --shares 0.9 0.5.", metavar="SHARES")
]


class Many(TyperCommand):
    """Takes all numbers that follow an option as its values."""

    option = "--shares"

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Say the option before each of its values, which is how the parser below knows them."""
        spread: list[str] = []
        for place, word in enumerate(args):
            follows = place > 0 and spread[-2:-1] == [self.option] and _is_number(args[place - 1])
            spread += [self.option, word] if follows and _is_number(word) else [word]
        return super().parse_args(ctx, spread)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def add_verbs(app: typer.Typer) -> None:
    """Register `inspect` and `sensitivity`."""
    app.command("inspect")(inspect)
    app.command("sensitivity", cls=Many)(sensitivity)


def inspect(
    target: Target,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    size: Size = None,
    macs: Macs = None,
    params: Params = None,
    memory: Bytes = None,
    latency_ms: Latency = None,
    latency: Annotated[bool, typer.Option("--latency", help="Time the layers on this machine as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a model is made of, how small it can get, and what cannot be pruned. Reads no data."""
    words = overrides or []
    bounds = {"macs": macs, "params": params, "bytes": memory, "latency_ms": latency_ms}
    only_bounds = all(word.startswith("budget.") for word in words)
    asked = bool(words and only_bounds) or any(bounds.values()) or not is_model(target)
    found = []
    for recipe, folder in resolve(target, flags(words, checkpoint=checkpoint, **bounds), None):
        stored = folder / PRODUCTS["trace"]
        timed = latency or recipe.limits().latency_ms is not None
        costs: dict[str, Costs] = {}
        if not timed and Path(target).is_dir() and stored.is_file() and only_bounds and not (checkpoint or size):
            graph, shape = Graph.load(stored), ""  # looking at a run needs neither its images nor its weights
        else:
            graph, shape = _traced(recipe, size, costs if timed else None)
        told = inspected(graph, recipe.limits() if asked else None, costs=costs)
        found.append({"model": recipe.model.name, **told.to_json()})
        if not as_json:
            _print_inspection(f"{recipe.model.name}{shape}", told)
    if as_json:
        print_json(found[0] if len(found) == 1 else found)


def _traced(recipe: Recipe, size: int | None, costs: dict[str, Costs] | None) -> tuple[Graph, str]:
    """The graph, and what input it is of; `costs` receives milliseconds."""
    section = recipe.model
    model = create_model(section.name, section.checkpoint, section.args, recipe.seed)
    shape = input_size(model, size or (recipe.data.size if recipe.data else None))
    name = f" on {'x'.join(map(str, shape))}"
    with bars() as progress:
        graph = trace(
            model,
            torch.zeros(1, *shape),
            depth=recipe.plan.depth,
            seconds=recipe.plan.trace_seconds,
            progress=progress,
        )
        if costs is not None:
            batch, compiled = recipe.latency.batch_size, recipe.latency.compiled
            example = torch.zeros(batch, *shape)
            table = latency_table(model, graph, example, compiled=compiled, cache=default_cache(), progress=progress)
            costs["latency_ms"] = LatencyCost(graph, table)
            name += f", milliseconds of a batch of {batch}"
    return graph, name


def _print_inspection(name: str, told: Inspection) -> None:
    say(f"{name}: {len(told.groups)} groups of {sum(group.units for group in told.groups):,} units")
    print_table(
        ["quantity", "dense", "floor", "share", "out of reach"],
        [
            [
                q,
                number(total),
                number(told.floors[q]),
                share(told.floors[q] / total),
                share(told.untouched[q]) if q in told.untouched else "-",
            ]
            for q, total in told.totals.items()
        ],
    )
    say(
        f"floor: every group as narrow as a budget may make it (min_keep={told.min_keep:g}), in one plan.",
        "out of reach: the share of the dense model that no plan changes.",
    )
    for ask in told.asks:
        _print_ask(ask, told)
    rows, timed = [], ["latency_ms"] if "latency_ms" in told.totals else []
    for group in told.groups:
        parts = [share(side[q]) for q in ("macs", "params") for side in (group.holds, group.saves)]
        parts += [share(group.saves[q]) for q in timed]
        rows.append([group.id, _units(group), str(group.least), _reader(group), *parts])
    print_table(["group", "units", "floor", "read by", "MACs", "saves", "params", "saves", *["ms"] * len(timed)], rows)
    say(
        "MACs, params: what the units write, scale and read; a weight between two groups counts in both.",
        "saves: what is saved with this group alone at its floor. Shares of the dense model.",
    )
    wide = [group for group in told.groups if len(group.writes) > 1 or len(group.reads) > 1]
    if wide:
        rows = [[group.id, brief(group.writes), brief(group.reads)] for group in wide]
        print_table(["group of several layers", "written by", "read by"], rows)
    rows = [
        [why.reason, brief(why.layers) or "-", *(share(side["macs"]) for side in (why.holds, why.left))]
        for why in told.unprunable
    ]
    if rows:
        print_table(["cannot be pruned", "layers", "MACs", "left"], rows, first_at_most=30)
        say("left: what of those MACs stays at the floor, as other groups narrow what these layers read.")


def _units(group: InspectedGroup) -> str:
    each = group.width // group.units
    if group.kind == "head":
        return f"{group.units} heads of {each}"
    if group.kind == "block":
        return "block"
    return f"{group.units}" if each == 1 else f"{group.units} of {each}"


def _reader(group: InspectedGroup) -> str:
    """The only layer that reads a group, without what its name shares with the group's where room is short."""
    if group.kind == "block":
        return "-"
    if len(group.reads) != 1:
        return f"{len(group.reads)} layers"
    reader = group.reads[0]
    block = group.id if reader.startswith(f"{group.id}.") else group.id.rpartition(".")[0]
    inside = block and reader.startswith(f"{block}.") and out.is_terminal
    return f"..{reader[len(block) :]}" if inside else reader


def _print_ask(ask: Ask, told: Inspection) -> None:
    if ask.at_most is None or ask.floor is None:
        say(f"{ask.quantity} <= {ask.as_written}: can only be told once the model is scored")
        return
    asked = f"{ask.quantity} <= {number(ask.at_most)} ({ask.as_written})"
    least = f"{number(ask.floor)} ({share(ask.floor / told.totals[ask.quantity])})"
    if ask.reachable:
        say(f"{asked} can be reached: the floor is {least}")
    else:
        say(f"{asked} cannot be reached: the floor is {least}; ask for more, or lower budget.min_keep")


def say(*lines: str) -> None:
    """Plain sentences."""
    out.print("\n".join(lines), highlight=False, markup=False)


def share(part: float) -> str:
    """A share as people read it."""
    return f"{part:.1%}"


def brief(names: Iterable[str]) -> str:
    """Names that differ in one number as one: `layer1.{0-2}.conv3, layer1.0.downsample.0`."""
    split = [tuple(re.split(r"(\d+)", name)) for name in names]  # text at even places, numbers at odd ones
    for place in sorted({p for parts in split for p in range(1, len(parts), 2)}, reverse=True):
        alike: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for parts in split:
            alike.setdefault((*parts[:place], "", *parts[place + 1 :]) if place < len(parts) else parts, []).append(
                parts
            )
        split = []
        for same in alike.values():
            numbers = {parts[place] for parts in same if place < len(parts)}
            split.append(same[0] if len(numbers) < 2 else (*same[0][:place], _spans(numbers), *same[0][place + 1 :]))
    return ", ".join("".join(parts) for parts in split)


def _spans(numbers: Iterable[str]) -> str:
    spans: list[list[int]] = []
    for n in sorted(map(int, numbers)):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) + "}"


def sensitivity(
    target: Target,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    data: Data = None,
    measured: Annotated[bool, typer.Option("--measured", help="Cut every group for real, and measure.")] = False,
    samples: Samples = None,
    shares: Shares = None,
    at: Annotated[float | None, typer.Option(help="The share to rank at; the one nearest to 0.5.")] = None,
    out_dir: Beside = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the curves as SVG (needs matplotlib).")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how far the outputs drift when one group alone is cut, from most robust to most sensitive."""
    if plot:
        plots.check()
    wanted = checked_shares(shares or SHARES)
    if at is not None and not any(math.isclose(at, one) for one in wanted):
        raise InputError(
            f"--at {at:g} is none of the shares {', '.join(f'{one:g}' for one in wanted)}; name one of them"
        )
    found = []
    for recipe, folder in resolve(target, flags(overrides, checkpoint=checkpoint, data=data), out_dir):
        if out_dir is None:  # a run of its own beside the one it looks at, which stays as it is
            branch(folder, folder / "sensitivity")
            folder = folder / "sensitivity"
        curves = _curves(_plainly_scored(recipe, samples), folder, wanted, measured)
        rank = curves.ranked(at)
        if plot:
            write_bytes(folder / PLOT, plots.draw(curves, at))
        found.append(
            {"model": recipe.model.name, "out": str(folder), "ranked": [c.group for c in rank], **curves.to_json()}
        )
        if not as_json:
            _print_curves(recipe.model.name, curves, at, folder)
    if as_json:
        print_json(found[0] if len(found) == 1 else found)


def _plainly_scored(recipe: Recipe, samples: int | None) -> Recipe:
    """The recipe, scored so that drift of a cut alone follows in nats; as it is where it does already."""
    changed = recipe.model_dump(mode="json")
    score, held = changed["score"], changed["eval"]
    criterion = recipe.criterion()
    plain = isinstance(criterion, TPV) and criterion.head == "softmax" and not criterion.compensated and criterion.cap
    if not plain:
        changed["score"] = score = {"samples": score["samples"], "compensated": False}
    score["samples"] = samples or score["samples"]
    held["samples"] = samples or held["samples"] or score["samples"]
    again = validate_recipe(changed, recipe.name)
    assert isinstance(again, Recipe)
    return again


def _curves(recipe: Recipe, folder: Path, shares: tuple[float, ...], measured: bool) -> SensitivityCurves:
    with stoppable(folder), bars() as progress:
        run = Run(recipe, folder, progress=progress, log=log_line)
        run.until("score")
        held_out = None
        if measured:
            assert recipe.data is not None
            held_out = run.inputs.images.measured.loader(recipe.data.batch_size, workers=recipe.data.workers)
        scores = Scores.load(folder / PRODUCTS["score"])
        return curves_of(run.inputs.dense, (), run.graph, scores, shares, held_out, progress, save=folder / CURVES)


def _print_curves(name: str, curves: SensitivityCurves, at: float | None, folder: Path) -> None:
    place = curves.usual_share if at is None else at
    rows, deep = [], any(curve.kind == "block" for curve in curves.curves)

    def across(curve: SensitivityCurve, values: list[float | None]) -> list[str]:
        """A cell a share, and one for a block that is gone."""
        cells, none = [nats(value) for value in values], ["-"] * len(curves.shares)
        return [*none, *cells] if curve.kind == "block" else [*cells, "-"] if deep else cells

    for curve in curves.ranked(place):
        point = curve.at(place)
        price = point.price()
        cells = across(curve, [one.predicted_kl for one in curve.points])
        per = "-" if price is None else nats(price / 100)
        rows.append([curve.group, str(curve.units), "predicted", *cells, share(point.macs_saved), per])
        if curves.measured_images is not None:
            again = "" if out.is_terminal else curve.group
            rows.append([again, "", "measured", *across(curve, [one.measured_kl for one in curve.points]), "", ""])
    heads = [*(f"{one:g}" for one in curves.shares), *(["gone"] if deep else [])]
    say(f"{name}: KL in nats with one group alone cut to a share of its units, most robust first")
    print_table(["group", "units", "KL keeping", *heads, "saves", "per 1%"], rows)
    say(f"saves, per 1%: of all MACs when {place:g} is kept, and the predicted KL for each 1% of them; in that order.")
    if deep:
        say("gone: a block is skipped, whatever share of the other groups is kept.")
    say(f"predicted: to first order, from {curves.samples:,} images.")
    if curves.measured_images is not None:
        ratios = ", ".join(f"{one:.2g} at {at:g}" for at, one in curves.ratios().items())
        say(f"measured: on {curves.measured_images:,} others; measured over predicted, median of the groups: {ratios}.")
    rows = [[reason, brief(layers)] for reason, layers in reasons_of(curves.unprunable).items()]
    if rows:
        print_table(["cannot be pruned", "layers"], rows, first_at_most=30)
    say(f"curves: {folder / CURVES}")


def nats(value: float | None) -> str:
    """Two digits, no more than the number is worth."""
    return "-" if value is None else f"{value:.2g}"
