"""The verbs `tpvprune plans show`, `diff` and `compose`: plans without their models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tpvprune.checkpoint import PLAN
from tpvprune.console import number, out, print_json, print_table
from tpvprune.errors import PlanError
from tpvprune.members import KINDS
from tpvprune.options import AsJson
from tpvprune.plan import Plan, drift_of

plans_app = typer.Typer(help="Show, compare and compose plans.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(help="A plan, or the folder of a run or a saved model.")]


@plans_app.command("show")
def show(file: File, as_json: AsJson = False) -> None:
    """What a plan removes, what it was asked for, and how it came about."""
    plan = _read(file)
    if as_json:
        print_json(_about(plan))
        return
    print_table(["plan", "dense", "kept"], _totals(plan))
    bounds = [
        [name, number(asked), number(got)]
        for step in _steps(plan.made_by)
        for name, asked in _mapping(step, "asked").items()
        for got in [_got(plan, name, step)]
    ]
    if bounds:
        print_table(["bounded", "asked", "got"], bounds)
    rows = [[r["group"], r["kind"], number(r["units"]), number(r["kept"])] for r in plan.summary()]
    print_table(["group", "unit", "of", "kept"], rows)
    for step in _steps(plan.made_by):
        facts = [[name, _text(value)] for name, value in step.items() if name not in ("asked", "got")]
        if facts:
            print_table(["made by", "value"], facts)


@plans_app.command("diff")
def diff(one: File, other: File, as_json: AsJson = False) -> None:
    """How many units of each group only one of two plans keeps; with --json, which ones."""
    found = _read(one).diff(_read(other))
    if as_json:
        print_json(found)
        return
    rows = [[name, number(len(d["only_here"])), number(len(d["only_there"]))] for name, d in found.items()]
    print_table(["group", f"only {one}", f"only {other}"], rows)


@plans_app.command("compose")
def compose(
    first: File,
    later: Annotated[Path, typer.Argument(help="A plan of the model that the first one leaves.")],
    out_file: Annotated[Path, typer.Option("--out", "-o", help="The plan to write; a file that exists is kept.")],
    as_json: AsJson = False,
) -> None:
    """Write the one plan that does what two plans do one after the other."""
    if out_file.exists():
        raise PlanError(f"{out_file} exists; choose another name")
    plan = _read(first).compose(_read(later))
    plan.save(out_file)
    if as_json:
        print_json({"out": str(out_file), **_about(plan)})
        return
    print_table(["plan", "dense", "kept"], _totals(plan))
    out.print(f"{first} + {later} -> {out_file}", highlight=False, markup=False)


def _read(file: Path) -> Plan:
    return Plan.load(file / PLAN if file.is_dir() else file)


def _counts(plan: Plan) -> dict[str, dict[str, int]]:
    """Dense and kept, per quantity that there is any of; a graph of weights counts no multiply-adds."""
    graph = plan.graph
    found = {
        "params": {"dense": graph.params(), "kept": plan.params},
        "macs": {"dense": graph.macs(), "kept": plan.macs},
    }
    for kind in (kind for kind in KINDS if kind != "weight"):
        groups = [group for group in graph.groups if group.kind == kind]
        kept = sum(int(plan.mask(group.id).sum()) for group in groups)
        found[f"{kind}s"] = {"dense": sum(group.units for group in groups), "kept": kept}
    return {name: pair for name, pair in found.items() if pair["dense"]}


def _totals(plan: Plan) -> list[list[str]]:
    rows = [[name, number(pair["dense"]), number(pair["kept"])] for name, pair in _counts(plan).items()]
    if plan.weights:
        rows += [["zeros", "0", number(plan.zeros)], ["nonzero", number(plan.graph.params()), number(plan.nonzero)]]
        rows.append(["sparsity of masked tensors", "0", number(plan.sparsity)])
    return rows


def _about(plan: Plan) -> dict[str, Any]:
    bounds = [
        {"quantity": name, "asked": asked, "got": _got(plan, name, step)}
        for step in _steps(plan.made_by)
        for name, asked in _mapping(step, "asked").items()
    ]
    return {
        **_counts(plan),
        "weights": {"zeros": plan.zeros, "nonzero": plan.nonzero, "sparsity": plan.sparsity},
        "bounds": bounds,
        "groups": plan.summary(),
        "made_by": dict(plan.made_by),
        "stays_whole": dict(plan.graph.skipped),
    }


def _steps(made_by: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What each plan that was composed says of itself, in order."""
    parts = made_by.get("composed")
    if not isinstance(parts, list):
        yield made_by
        return
    for part in parts:
        if isinstance(part, Mapping):
            yield from _steps(part)


def _mapping(step: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = step.get(key)
    return found if isinstance(found, Mapping) else {}


def _got(plan: Plan, name: str, step: Mapping[str, Any]) -> Any:
    """What the whole plan comes to; what its step said of itself where that cannot be told from the plan."""
    if name in ("macs", "params", "bytes", "units"):
        return plan.graph.cost(name, plan.keep)
    if name == "drift":
        return drift_of(step)
    return plan.sparsity if name == "sparsity" else _mapping(step, "got").get(name)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_text(part)}" for name, part in value.items()) or "-"
    return ", ".join(map(_text, value)) if isinstance(value, list) else number(value)
