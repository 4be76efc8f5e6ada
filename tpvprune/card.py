"""The model card (`README.md`) and timm's `config.json` of a saved folder, so that it can be pushed to a hub as it is.

Neither names a path of the machine it was written on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from tpvprune.files import read_text, write_text
from tpvprune.measures import scored_on
from tpvprune.plan import Plan
from tpvprune.version import __version__

CARD, CONFIG = "README.md", "config.json"
MARK = "<!-- Written by tpvprune, and written anew until this line is taken out. -->"
MODELS = ("before", "pruned", "recovered")
_LABELS = {
    "params": "parameters",
    "macs": "multiply-adds",
    "latency_ms": "milliseconds",
    "kl": "KL to the dense model, nats",
    "agreement": "same answer as the dense model",
    "top1": "accuracy",
    "mse": "mean squared distance",
}
_SHARES = ("agreement", "top1")
_CONFIG_KEYS = (
    "tag",
    "input_size",
    "test_input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "mean",
    "std",
    "pool_size",
    "first_conv",
    "classifier",
    "license",
    "origin_url",
    "paper_ids",
)


def figure(name: str, value: Any) -> str:
    """A number as people read it: thousands apart, four digits, shares in percent, a dash for None."""
    if value is None:
        return "-"
    if name in _SHARES:
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def numbers(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table before / pruned / recovered of a report's JSON form."""
    models = [name for name in MODELS if report.get(name)]
    costs = ("params", "macs", "latency_ms")
    keys = dict.fromkeys(key for name in models for key in report[name]["metrics"])
    rows = [[_LABELS[key], *(figure(key, report[name][key]) for name in models)] for key in costs]
    rows += [[_LABELS.get(k, k), *(figure(k, report[name]["metrics"].get(k)) for name in models)] for k in keys]
    return ["", *models], rows


def bounds(report: Mapping[str, Any]) -> list[list[str]]:
    """Per bounded quantity: its name, what was asked as it was written, the bound, what came out, its share."""
    rows = []
    for name, asked in report["asked"].items():
        got = report["got"][name]
        value, share = got.get("measured", got["value"]), got["share"]
        told = figure("", value) + (f" (predicted {figure('', got['value'])})" if "measured" in got else "")
        written, bound = str(asked["as_written"]), figure("", asked["at_most"])
        rows.append([_LABELS.get(name, name), written, bound, told, "-" if share is None else f"{share:.1%}"])
    return rows


def verdict(plan: Plan, report: Mapping[str, Any] | None) -> str:
    """One sentence: what is left of the model, and what it still says."""
    graph = plan.graph
    shares = {"multiply-adds": (plan.macs, graph.macs()), "parameters": (plan.params, graph.params())}
    left = " and ".join(f"{now / dense:.1%} of the {name}" for name, (now, dense) in shares.items() if dense)
    told = [f"{left} are left"]
    if plan.zeros:
        told.append(f"{plan.sparsity:.1%} of the masked weights are zero")
    if report is not None:
        final = next(report[name] for name in reversed(MODELS) if report.get(name))["metrics"]
        before = report["before"]["metrics"]
        if "agreement" in final:
            told.append(f"{final['agreement']:.1%} of the answers are the dense model's")
        if "top1" in final:
            told.append(f"accuracy went from {before['top1']:.1%} to {final['top1']:.1%}")
    return "; ".join(told)


def name_of(source: Mapping[str, Any]) -> str:
    """What a model is called: by name where it has one, by its class where not."""
    return str(source.get("timm") or source.get("tpvprune") or str(source.get("class", "model")).rpartition(".")[2])


def model_card(plan: Plan, source: Mapping[str, Any], report: Mapping[str, Any] | None = None) -> str:
    """Markdown with the front matter that hubs read.

    Args:
        plan: what was removed.
        source: how the dense original is built: `{"timm": name, "args": {...}}`, or `{"class": ...}`.
        report: a report's JSON form; without one the card has sizes alone.
    """
    name = name_of(source)
    tags = ["pruning", "tpvprune", *(["timm"] if "timm" in source else [])]
    lines = ["---", "library_name: tpvprune", "tags:", *(f"- {tag}" for tag in tags), "---", "", MARK, ""]
    lines += [f"# {name}, pruned", "", f"{verdict(plan, report)}.", ""]
    if report is None:
        sizes = {"params": (plan.graph.params(), plan.params), "macs": (plan.graph.macs(), plan.macs)}
        rows = [[_LABELS[key], figure("", dense), figure("", now)] for key, (dense, now) in sizes.items()]
        lines += [*_table(["", "before", "pruned"], rows), "", _counted(plan), ""]
    else:
        lines += [*_table(*numbers(report)), "", f"{_measured(report)} {_counted(plan)}".rstrip(), ""]
        heads = ["asked for", "as written", "at most", "got", "share of the dense model"]
        lines += ["## Budget", "", *_table(heads, bounds(report)), "", _drift(report), ""]
    skeleton = "" if "class" not in source else ", skeleton=make_model()"
    lines += ["## Use", "", "```python", "import tpvprune", "", f'model = tpvprune.load("."{skeleton})', "```", ""]
    lines += ["Nothing in the folder is run when it is loaded: `plan.json` says what was removed from "]
    lines[-1] += f"{name}, `model.safetensors` holds what is left."
    kept = [[r["group"], r["kind"], figure("", r["units"]), figure("", r["kept"])] for r in plan.summary()]
    lines += ["", "## Widths", "", *_table(["group", "unit", "before", "now"], kept), "", _made_by(plan)]
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(heads), line(["---", *["---:"] * (len(heads) - 1)]), *map(line, rows)]


def _measured(report: Mapping[str, Any]) -> str:
    data, environment = report["data"], report["environment"]
    return (
        f"Measured on {data['measured']:,} images, {scored_on(data['scored'])}. Milliseconds: "
        f"{environment['latency']}, {environment['device']}, {environment['threads']} thread(s)."
    )


def _counted(plan: Plan) -> str:
    shapes = " and ".join(" x ".join(map(str, shape)) for shape in plan.graph.inputs)
    return f"Multiply-adds are those of one input of {shapes}." if shapes else ""


def _drift(report: Mapping[str, Any]) -> str:
    drift = report["drift"]
    told = {"predicted": "predicted_kl", "measured after the cut": "pruned_kl", "after recovery": "recovered_kl"}
    known = [f"{figure('', drift[key])} {name}" for name, key in told.items() if drift.get(key) is not None]
    return f"KL from the dense model in nats: {', '.join(known)}." if known else ""


def _made_by(plan: Plan) -> str:
    made = plan.made_by
    told = [f"{key} {made[key]}" for key in ("criterion", "allocator", "rank", "shrinkage") if key in made]
    return f"Pruned with tpvprune {__version__}" + (f": {', '.join(told)}." if told else ".")


def timm_config(model: nn.Module, source: Mapping[str, Any]) -> dict[str, Any]:
    """What timm's hub folders say of a model: the dense architecture, its arguments and its preprocessing.

    `timm.create_model("local-dir:FOLDER", pretrained=False)` builds the dense original from it; the weights are of
    the pruned one, which `tpvprune.load` builds.

    Args:
        model: the pruned one.
        source: see `model_card`.
    """
    known = getattr(model, "pretrained_cfg", None) or {}
    cfg = {key: known[key] for key in _CONFIG_KEYS if isinstance(known, Mapping) and known.get(key) is not None}
    classes = getattr(model, "num_classes", None)
    found: dict[str, Any] = {"architecture": name_of(source)}
    if classes is not None:
        found["num_classes"] = cfg["num_classes"] = classes
    for key, kinds in (("num_features", int), ("global_pool", str)):
        if isinstance(getattr(model, key, None), kinds):
            found[key] = getattr(model, key)
    if source.get("args"):
        found["model_args"] = dict(source["args"])
    return found | {"pretrained_cfg": cfg, "tpvprune": {"version": __version__, "load": "tpvprune.load(folder)"}}


def write_card(folder: str | PathLike[str], plan: Plan, source: Mapping[str, Any], report: Any = None) -> None:
    """Write `README.md`, unless there is one that somebody made their own; see `model_card`."""
    path = Path(folder) / CARD
    if path.is_file() and MARK not in read_text(path):
        return
    write_text(path, model_card(plan, source, report))


def write_config(folder: str | PathLike[str], model: nn.Module, source: Mapping[str, Any]) -> None:
    """Write `config.json`; see `timm_config`."""
    write_text(Path(folder) / CONFIG, json.dumps(timm_config(model, source), indent=2))
