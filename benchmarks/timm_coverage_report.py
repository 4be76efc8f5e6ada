"""The pages that `timm_coverage.py --report` writes, of timm and of torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm_coverage_check import CHECKS, LARGE, SHARE, TOLERANCE, TRACE_LIMIT
from timm_coverage_models import Target

Record = dict[str, Any]
HEADINGS = {"families": "Architecture modules, the smallest model of each", "popular": "Much-used models"}
COUNTS_APART = 0.01  # of the multiply-adds, between the plan and torch's counter


def amount(count: float) -> str:
    """Multiply-adds in three digits: 1.81 G, 56.3 M."""
    scaled, unit = (count / 1e9, "G") if count >= 1e9 else (count / 1e6, "M")
    return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"


def failed(record: Record) -> list[str]:
    """Checks that failed or could not be run, in order."""
    return [check for check in CHECKS if not record["checks"].get(check, {}).get("ok", False)]


def reason(record: Record) -> str:
    """Why checks failed, by check; those that could not be run for it are not named."""
    checks = record["checks"]
    return "; ".join(f"{c}: {checks[c].get('why', 'failed')}" for c in failed(record) if c in checks)


def left_alone(record: Record) -> str:
    """What was skipped while tracing, by reason, besides the layers that write the model's outputs."""
    reasons = record.get("skipped", {}).get("reasons", [])
    return "; ".join(f"{count} x {why}" for count, why in reasons if why != "its outputs are the model's outputs")


def notes(record: Record) -> str:
    """All that a reader should know of a row, in one cell."""
    checks, macs = record["checks"], record.get("macs", {})
    said = [f"**{reason(record)}**"] if failed(record) else []
    exported = checks.get("export", {})
    if exported.get("ok") and "why" in exported:
        said.append(f"export: {exported['why']}")
    if checks.get("mask", {}).get("ok") and "why" in checks["mask"]:
        said.append(f"mask: {checks['mask']['why']}")
    if macs.get("counted") and abs(macs["counted"] / macs["planned"] - 1) > COUNTS_APART:
        said.append(f"torch counts {amount(macs['counted'])} where the plan says {amount(macs['planned'])}")
    said += [f"{model} {why}" for model, why in record.get("passed_over", {}).items()]
    if left_alone(record):
        said.append(f"left alone: {left_alone(record)}")
    return "; ".join(said).replace("|", "\\|").replace("\n", " ")


def row(target: Target, record: Record | None) -> str:
    """One line of a table."""
    if record is None:
        return f"| {target.module} | {target.models[0] if target.models else ''} |" + " |" * 5 + " not run |"
    macs = record.get("macs", {})
    costs = [
        amount(macs[key]) + (f" ({macs[key] / macs['before']:.1%})" if key == "got" else "") if key in macs else "-"
        for key in ("before", "asked", "got")
    ]
    size = "x".join(map(str, record.get("input", ["-", "-"])[1:]))
    usual = "x".join(map(str, record.get("input_of_timm", [])[1:]))
    size += f" (timm: {usual})" if usual and usual != size else ""
    bad = failed(record)
    good = [check for check in CHECKS if check not in bad]
    few = ", ".join(good) or "nothing"
    passed = few if len(good) < len(bad) else f"all but {', '.join(bad)}" if bad else "all"
    traced = f"{record['seconds']['trace']:.1f}" if "trace" in record["seconds"] else "-"
    cells = (target.module, record["model"], size, " / ".join(costs), traced, record.get("groups", "-"), passed)
    return "| " + " | ".join(str(cell) for cell in (*cells, notes(record))) + " |"


def summary(rows: Sequence[tuple[Target, Record | None]]) -> str:
    """How many of a list pass, and which checks the others fail."""
    records = [record for _, record in rows if record]
    passed = sum(record["passed"] for record in records)
    said = f"{passed} of {len(rows)} pass"
    if len(records) < len(rows):
        said += f" ({len(rows) - len(records)} were not run)"
    first: dict[str, int] = {}
    for record in records:
        if failed(record):
            first[failed(record)[0]] = first.get(failed(record)[0], 0) + 1
    if first:
        said += "; the others first fail at " + ", ".join(f"{c} ({first[c]})" for c in CHECKS if c in first)
    return said


INPUTS = {
    "timm": (f"Inputs of {LARGE} pixels", "or more are made smaller where the model takes it."),
    "torchvision": (
        "Inputs are as small",
        "as the models take well. Detectors are checked without what chooses boxes, on the outputs of their heads, as",
        "the number of boxes is no function to compare; those of two stages look at boxes that are given, and RAFT",
        "makes one update. `quantized_*` are left out: not quantized, they are the same networks, and quantized",
        "weights are no parameters.",
    ),
}


def report(library: str, which: str, rows: Sequence[tuple[Target, Record | None]]) -> str:
    """The whole page."""
    lists = {name: [(t, r) for t, r in rows if t.list == name] for name in HEADINGS}
    records = [record for _, record in rows if record]
    versions = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records})
    limits = sorted({f"{r['limits']['seconds']:.0f} s and {r['limits']['gib']:g} GiB" for r in records})
    command = "python benchmarks/timm_coverage.py" + ("" if library == "timm" else f" --library {library}")
    out = [
        f"# Coverage of {library}",
        "",
        *(f"* **{HEADINGS[name]}**: {summary(own)}." for name, own in lists.items() if own),
        "",
        f"Made by `{command} --list {which}` and then `--report`, on CPU, one thread a model,",
        f"with {' / '.join(versions) or 'nothing run yet'}. Random weights; what starts out constant (layer scales,",
        "norms, biases) is given random values, so that equal outputs mean something. Each model runs in a process of",
        f"its own; all checks of one together may take {' / '.join(limits) or '-'} of memory. {INPUTS[library][0]}",
        *INPUTS[library][1:],
        "",
        f"A model passes if all of this holds: it runs **dense**; **trace** takes no more than {TRACE_LIMIT:.0f} s;",
        f"**plan** meets {SHARE:.0%} of the multiply-adds (squared weights, no data; where the floor is higher, *got*",
        "is the floor, and the other checks are made halfway between floor and dense); **apply** leaves as many",
        "parameters as planned; **forward** gives finite outputs of the shape as before; **backward** reaches",
        "parameters; **mask**: a quarter of the units of every group whose mask is exact, cut or masked, gives equal",
        "outputs; **save**, and **load** in a fresh process gives equal outputs; **export** by `torch.export` works,",
        "unless the dense model cannot be exported either. A check that lacks what it needs is not run, and counts as",
        "failed.",
        "",
        f"Outputs count as equal where they differ by at most {TOLERANCE:g} of the largest one, in float32: all that",
        "cutting changes is the order of sums, which was seen to do less than a tenth of it, and one unit cut in the",
        "wrong place a hundred times as much. Where no group has an exact mask, there is nothing to compare: *notes*",
        "say so.",
        "*Left alone* are the three most frequent reasons why layers' outputs are not pruned.",
    ]
    for name, own in lists.items():
        if own:
            out += [
                "",
                f"## {HEADINGS[name]}",
                "",
                "| module | model | input | multiply-adds before / asked / got | trace, s | groups | passed | notes |",
                "| --- " * 8 + "|",
                *(row(target, record) for target, record in own),
            ]
    return "\n".join(out)
