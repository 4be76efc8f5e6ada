"""What a name on the command line stands for: a recipe, a run's folder, a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpvprune.budget import BOUNDS
from tpvprune.checkpoint import ABOUT
from tpvprune.errors import RecipeError
from tpvprune.processes import launched
from tpvprune.recipe import Recipe, Suite, builtin_recipes, load_recipe, validate_recipe
from tpvprune.runfolder import RECIPE, branch, stored_recipe
from tpvprune.zoo.models import is_model, near_models

OF_PLANS = ("show", "diff", "compose")  # commands of `plans`


def flags(overrides: Sequence[str] | None, **given: str | None) -> list[str]:
    """Options as overrides, then the overrides; quoted as YAML strings, so that a path is never anything else."""
    written = list(overrides or ())
    keys = {"checkpoint": "model.checkpoint", "data": "data.images", "labels": "data.labels"}
    keys |= {name: f"budget.{name}" for name in BOUNDS}
    found = [f"{keys[name]}={json.dumps(value)}" for name, value in given.items() if value is not None]
    if any(given.get(name) is not None for name in BOUNDS):  # what a recipe bounds besides gives way
        named = {_key(override) for override in written}
        gone = [f"budget.{name}" for name in BOUNDS if given.get(name) is None]
        found = [f"{key}=null" for key in gone if key not in named] + found
    return [*found, *written]


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _check_once(overrides: Sequence[str]) -> None:
    """Refuse two values of one key, of which it is not known which one is meant."""
    by_key: dict[str, str] = {}
    for override in overrides:
        if _key(override) in by_key:
            first = by_key[_key(override)]
            raise RecipeError(f"override {override!r}: {_key(override)} is set by {first!r} too; set it once")
        part = next((before for key, before in by_key.items() if key.startswith(f"{_key(override)}.")), None)
        if part is not None and not any(one.endswith("=null") for one in (part, override)):
            raise RecipeError(f"override {override!r} would undo {part!r}, a part of it; give it first, or only one")
        by_key[_key(override)] = override


def resolve(
    target: str, overrides: Sequence[str], folder: Path | None, inside: tuple[Path, ...] = ()
) -> list[tuple[Recipe, Path]]:
    """The recipe (or several) a target stands for, and the folder each result goes to.

    Args:
        target: what is named.
        overrides: `key=value`.
        folder: where results go; a place under `runs` by default.
        inside: the lists of recipes that name it.

    Raises:
        RecipeError: there is no such recipe, folder or model, or an override is wrong, or sets what another one does.
    """
    _check_once(overrides)
    path = Path(target).expanduser()
    stored = stored_recipe(path) if path.is_dir() else None
    if stored is not None:
        again = _as_recipe(stored.model_dump(mode="json"), f"{path / RECIPE}", overrides)
        before, now = (stored.name, stored.model.name), (again.name, again.model.name)
        if before != now:
            raise RecipeError(
                f"{path} holds a run of {before[0]!r} ({before[1]}), which keeps its name and its model; for a run of "
                f"{now[0]!r} ({now[1]}) give {path / RECIPE} in its place, and another --out"
            )
        if folder is not None and launched()[0] == 0:
            branch(path, folder)
        return [(again, folder or path)]
    if path.suffix not in (".yaml", ".yml") and target not in builtin_recipes():
        if is_model(target):
            return resolve_model(target, overrides, folder)
        if path.is_dir():
            raise RecipeError(f"{target} is no folder of a run (it holds no {RECIPE})")
    try:
        recipe = load_recipe(target, overrides)
    except RecipeError as error:
        if path.suffix in (".yaml", ".yml") or path.exists() or target in builtin_recipes():
            raise
        near = f"; for a plan that is there: tpvprune plans {target}" if target in OF_PLANS else near_models(target)
        raise RecipeError(f"{error}; nor is it a model{near}") from error
    base = folder or Path("runs") / recipe.name
    if isinstance(recipe, Recipe):
        return [(recipe, base)]
    found = []
    for name in recipe.runs:
        beside = path.parent / name  # as a reader of the list takes it
        one = beside if beside.is_file() else Path(name)
        if one.resolve() in [above.resolve() for above in (*inside, path)]:
            raise RecipeError(f"{target} lists {name}, which lists {target} in turn; take one of them out")
        found += resolve(str(one), (), base / one.stem, (*inside, path))
    folders = [place for _, place in found]
    shared = next((place for place in folders if folders.count(place) > 1), None)
    if shared is not None:
        raise RecipeError(f"two recipes of {target} would write to {shared}; give their files different names")
    return found


def resolve_model(name: str, overrides: Sequence[str], folder: Path | None) -> list[tuple[Recipe, Path]]:
    """A recipe of nothing but a model's name and overrides.

    Raises:
        RecipeError: an override is wrong, or sets what another one does.
    """
    _check_once(overrides)
    recipe = _as_recipe({"name": name, "model": {"name": name}}, "command line", overrides)
    return [(recipe, folder or Path("runs") / name)]


def _as_recipe(data: Mapping[str, Any], origin: str, overrides: Sequence[str]) -> Recipe:
    recipe = validate_recipe(data, origin, overrides)
    if isinstance(recipe, Suite):
        raise RecipeError(f"{origin} is a list of recipes, not one run")
    return recipe


def is_saved_model(target: str) -> bool:
    """Whether a folder holds a saved model and is no run's folder."""
    return (Path(target) / ABOUT).is_file() and not (Path(target) / RECIPE).is_file()
