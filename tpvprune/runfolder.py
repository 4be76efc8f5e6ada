"""What a run's folder holds: stages, their products, and what each stage's result depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tpvprune.checkpoint import ABOUT, PLAN, WEIGHTS
from tpvprune.errors import RecipeError, TpvpruneError
from tpvprune.files import PART, read_text, write_bytes, write_text
from tpvprune.lock import LOCK
from tpvprune.recipe import Recipe, Suite, parse_recipe
from tpvprune.scoring.registry import LABELLED
from tpvprune.types import read_json
from tpvprune.zoo.data import source_state
from tpvprune.zoo.models import checkpoint_path

STAGES = ("trace", "score", "plan", "apply", "recover", "eval", "report")
PRODUCTS = {
    "trace": "graph.json",
    "score": "scores.safetensors",
    "plan": "plan.json",
    "apply": f"pruned/{ABOUT}",
    "recover": ABOUT,
    "eval": "report.json",
    "report": "report.html",
}
RECIPE, STATE = "recipe.yaml", "stages.json"
PARTIAL = ".partial"  # in the names of what a stopped stage goes on from
STATE_FORMAT = 4  # raised when a stage's result is no longer what an older version made


def stage_keys(recipe: Recipe, last: str) -> dict[str, str]:
    """A name for each stage's result, up to `last`: changes with all that it and the stages before depend on."""
    keys, key = {}, ""
    for stage in STAGES[: STAGES.index(last) + 1]:
        parts = [STATE_FORMAT, stage, key, _matters(recipe, stage)]
        keys[stage] = key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return keys


def _matters(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What a stage's result depends on, beside the stages before it."""
    sections = recipe.model_dump(mode="json")
    data, held = sections["data"] or {}, sections["eval"]
    # Of one source both halves have the labels that are given for measuring.
    scored = data.get("labels") if held["images"] else held["labels"] or data.get("labels")
    if stage == "trace":
        weights = f"drawn from {recipe.seed}"
        if recipe.model.checkpoint is not None:
            weights = hashlib.sha256(checkpoint_path(str(recipe.model.checkpoint)).read_bytes()).hexdigest()
        depth = {"depth": True} if recipe.plan.depth else {}
        return {"model": sections["model"], "size": data.get("size"), "weights": weights, **depth}
    if stage == "score":
        return {
            "images": _source(data.get("images")),
            "half": held["images"] is None,  # of them are scored, or all
            "batch_size": data.get("batch_size"),
            "criterion": repr(recipe.criterion()),
            "labels": _labels(scored) if recipe.score.criterion in LABELLED else None,
            **{name: sections[name] for name in ("score", "device", "seed")},
        }
    if stage == "recover":
        tuning = sections["recover"]["finetune"]
        labels = _labels(scored) if tuning and tuning["label_weight"] else None
        return {"recover": sections["recover"], "labels": labels, **({"kept_back": True} if tuning else {})}
    if stage == "eval":
        return {
            "images": _source(held["images"]),
            "labels": [_labels(data.get("labels")), _labels(held["labels"])],
            "samples": held["samples"],
            "examples": held["examples"],
            "latency": sections["latency"],
        }
    if stage != "plan":
        return {}
    timed = sections["budget"]["latency_ms"] is not None or sections["plan"]["per"] == "latency_ms"
    plan = {name: value for name, value in sections["plan"].items() if name != "depth"}  # is in the trace's key
    recover = sections["recover"]
    kept_back = {"kept_back": True} if recover["finetune"] else {}  # images that nothing is refitted on
    refit = {"refit_with": recover["reconstruct"], **kept_back} if plan["refit"] else {}
    by = {"criterion_of_weights": repr(recipe.criterion_of_weights())}
    zeros = {"sparsify": sections["sparsify"], **by} if sections["sparsify"] else {}
    latency = sections["latency"] if timed else None
    return {"budget": sections["budget"], "plan": plan, "latency": latency, **refit, **zeros}


def _source(given: str | None) -> list[str] | None:
    """Images as they are named, and the state that they are in."""
    return None if given is None else [given, source_state(given)]


def _labels(given: str | None) -> str | list[str] | None:
    """Labels as they are named, and what a class map holds."""
    path = None if given is None else Path(given).expanduser()
    if given is None or path is None or not path.is_file():
        return given
    return [given, hashlib.sha256(path.read_bytes()).hexdigest()]


def lacking(folder: Path, stage: str) -> list[str]:
    """Files that a stage leaves and that are not in a run's folder; of a saved model those that loading reads."""
    if stage not in PRODUCTS:
        return []
    product = Path(PRODUCTS[stage])
    files = [product.with_name(name) for name in (WEIGHTS, PLAN, ABOUT)] if product.name == ABOUT else [product]
    return [str(file) for file in files if not (folder / file).is_file()]


def refuse_finished(folder: Path, stage: str, same: bool) -> None:
    """Leave a finished model as it is where a stage before it would be done again.

    Args:
        folder: of the run.
        stage: the first one that is not done.
        same: whether it was done with the same settings, and lacks a file.

    Raises:
        RecipeError: always; says what is to be done.
    """
    if same:
        raise RecipeError(
            f"{folder} holds a finished model and lacks {lacking(folder, stage)[0]} of its stage {stage}; put the file "
            "back, or give another --out"
        )
    raise RecipeError(
        f"{folder} holds a finished model of other settings or images ({stage} would change); give another --out (what "
        "is still valid is taken along), or delete the folder"
    )


def one_line(told: dict[str, Any]) -> str:
    """The plain values of what a stage said, and the lengths of the others."""

    def short(value: Any) -> str:
        if isinstance(value, dict) and value and all(isinstance(v, (int, float)) for v in value.values()):
            return "(" + ", ".join(f"{k} {short(v)}" for k, v in value.items()) + ")"
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            return "+".join(value)
        if isinstance(value, (dict, list)):
            return str(len(value))
        if isinstance(value, bool):
            return "yes" if value else "no"
        return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)

    return "; ".join(f"{key.replace('_', ' ')} {short(value)}" for key, value in told.items())


def holds(folder: Path) -> list[str]:
    """Names of what lies in a folder, but for what a run leaves that was killed before it wrote anything."""
    if not folder.is_dir():
        return []
    return sorted(p.name for p in folder.iterdir() if p.name != LOCK and not p.name.endswith(PART))


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder that a recipe cannot be run in: it must be empty, missing, or hold a run of the same recipe.

    Raises:
        RecipeError: says what is there.
    """
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file; choose another --out")
    if not holds(folder):
        return
    before = stored_recipe(folder)
    if before is None:
        raise RecipeError(f"{folder} holds files that are no run of tpvprune; choose another --out")
    if (before.name, before.model.name) != (recipe.name, recipe.model.name):
        raise RecipeError(
            f"{folder} holds a run of {before.name!r} ({before.model.name}); "
            f"choose another --out for {recipe.name!r} ({recipe.model.name})"
        )


def read_state(folder: Path) -> dict[str, Any]:
    """What is told of the stages that are done; nothing where that was damaged."""
    try:
        state = read_json(folder / STATE, "state")
    except TpvpruneError:
        return {}
    return state if isinstance(state, dict) else {}


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Keep it."""
    write_text(folder / STATE, json.dumps(state, indent=1))


def branch(source: Path, folder: Path) -> None:
    """Take graph, scores and plan of a run along into a new folder, to go on from there with other settings."""
    along = [*(PRODUCTS[stage] for stage in ("trace", "score", "plan")), STATE, RECIPE]  # the recipe last: all is there
    if folder.resolve() == source.resolve() or RECIPE in holds(folder) or set(holds(folder)) - set(along):
        return
    for name in along:
        if (source / name).is_file():
            write_bytes(folder / name, (source / name).read_bytes())


def stored_recipe(folder: str | Path) -> Recipe | None:
    """The recipe a run folder was made with; None if it is no run folder.

    Raises:
        RecipeError: the recipe there was damaged.
    """
    path = Path(folder) / RECIPE
    if not path.is_file():
        return None
    recipe = parse_recipe(read_text(path), str(path))
    if isinstance(recipe, Suite):
        raise RecipeError(f"{path} is a list of recipes, not one run")
    return recipe
