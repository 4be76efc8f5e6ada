"""Recipes: everything a run needs, as strict YAML.

Unknown keys, wrong values and YAML tags are errors that name the file, the key and the line. Nothing
in a recipe can name code to import.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from tpvprune.budget import BOUNDS, Budget
from tpvprune.errors import InputError, RecipeError
from tpvprune.files import packaged, read_text
from tpvprune.mistakes import explained, place_of
from tpvprune.recovery.optimisation import check_optimizer
from tpvprune.recovery.reconstruct import Reconstruct
from tpvprune.recovery.settings import Finetune, GaussNewton
from tpvprune.schedule import Planning
from tpvprune.scoring.criteria import Criterion
from tpvprune.scoring.probing import probes_for
from tpvprune.scoring.registry import CRITERIA, criterion_named
from tpvprune.scoring.tpv import TPV
from tpvprune.sections import (
    BudgetSection,
    DataSection,
    EvalSection,
    LatencySection,
    ModelSection,
    PlanSection,
    RecoverSection,
    ScoreSection,
    SparsifySection,
    Strict,
)


class Recipe(Strict):
    """One run, fully described."""

    name: str
    description: str = ""
    model: ModelSection
    data: DataSection | None = None
    eval: EvalSection = Field(default_factory=EvalSection)
    score: ScoreSection = Field(default_factory=ScoreSection)
    budget: BudgetSection = Field(default_factory=BudgetSection)  # macs=0.5 where nothing is bounded
    plan: PlanSection = Field(default_factory=PlanSection)
    sparsify: SparsifySection | None = None
    latency: LatencySection = Field(default_factory=LatencySection)
    recover: RecoverSection = Field(default_factory=RecoverSection)
    device: str = "auto"
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _half_by_default(cls, data: Any) -> Any:
        budget = data.get("budget", {}) if isinstance(data, dict) else None
        if isinstance(budget, dict) and not set(BOUNDS) & set(budget):
            return {**data, "budget": {"macs": 0.5, **budget}}
        return data

    def criterion(self, images: int | None = None) -> Criterion:
        """How to score: the settings that the criterion has, and no other that was written down.

        Args:
            images: how many are scored, where that is known.
        """
        section = self.score
        own = {name for name in _fields_of(CRITERIA[section.criterion]) if hasattr(section, name)}
        written = section.model_fields_set - {"criterion", "samples"}
        extra = {name for name in written - own if getattr(section, name) != ScoreSection.model_fields[name].default}
        extra -= {"probes"} if section.probes == 1 else set()  # as recipes of earlier versions write it out
        settings = {name: getattr(section, name) for name in own | extra}
        if settings.get("probes", 1) is None:
            settings["probes"] = 1 if images is None else probes_for(images)
        if settings.get("compensated", True) is None:
            possible = section.over == "consume" and section.engine in ("auto", "activations")
            refitted = self.recover.reconstruct is not None
            whole = self.plan.allocator == "joint" or self.budget.drift is not None  # need effects of the cut itself
            settings["compensated"] = possible and refitted and not section.sensitivities and not whole
        if settings.get("compensated") and settings.get("engine", "auto") not in ("auto", "activations"):
            raise RecipeError("score: compensated scores of channels are made by engine 'activations' alone")
        try:
            return criterion_named(section.criterion, settings)
        except InputError as error:
            raise RecipeError(f"score: {error}") from error

    def criterion_of_weights(self, images: int | None = None) -> Criterion:
        """How to score single weights: compensated TPV where a refit makes up for them, else by magnitude."""
        section, refitted = self.sparsify or SparsifySection(sparsity=0.5), self.recover.reconstruct is not None
        name = section.criterion or ("tpv" if refitted else "l1")
        if name == "l1":
            return criterion_named(name)
        score, probes = self.score, 1 if images is None else probes_for(images)
        settings = {"head": score.head, "seed": score.seed, "probes": score.probes or probes}
        return criterion_named(name, {**settings, "compensated": refitted and (section.pattern or True)})

    def limits(self) -> Budget:
        """What the result may cost.

        Raises:
            RecipeError: a bound on drift, beside zeros that nothing would count in it.
        """
        if self.sparsify is not None and self.budget.drift is not None:
            told = f"budget: drift={self.budget.drift} bounds what leaves, and what `sparsify` holds at zero would add"
            raise RecipeError(f"{told} to it uncounted; bound a cost instead, or leave sparsify out")
        return _settings(Budget, self.budget, "budget")

    def planning(self) -> Planning:
        """How the plan is made.

        Raises:
            RecipeError: an allocator that needs what the criterion does not give.
        """
        criterion = self.criterion()
        if self.plan.allocator == "joint" and not (isinstance(criterion, TPV) and criterion.cap):
            told = "plan: allocator=joint needs effects sample by sample, which score.criterion=tpv keeps in its usual"
            raise RecipeError(f"{told} settings, not compensated; take that, or another allocator")
        return _settings(Planning, self.plan, "plan")

    def closed_form(self) -> Reconstruct | None:
        """How to refit, or None."""
        section = self.recover.reconstruct
        return None if section is None else _settings(Reconstruct, section, "recover.reconstruct")

    def gauss_newton(self) -> GaussNewton | None:
        """How to refit all layers at once, or None."""
        section = self.recover.refine
        return None if section is None else _settings(GaussNewton, section, "recover.refine")

    def distillation(self) -> Finetune | None:
        """How to fine-tune, or None."""
        section = self.recover.finetune
        if section is None:
            return None
        settings: Finetune = _settings(Finetune, section, "recover.finetune")
        try:
            check_optimizer(settings)
        except InputError as error:
            raise RecipeError(f"recover.{error}") from error
        return settings

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class Suite(Strict):
    """A list of recipes that are run one after the other."""

    name: str
    description: str = ""
    runs: tuple[str, ...] = Field(min_length=1)


def _fields_of(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _settings(kind: type, section: Any, where: str) -> Any:
    try:
        return kind(**{f.name: getattr(section, f.name) for f in dataclasses.fields(kind)})
    except InputError as error:
        raise RecipeError(f"{where}: {error}") from error


def builtin_recipes() -> dict[str, str]:
    """Name and YAML text of every recipe that ships with the package."""
    folder = packaged("recipes")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name[: -len(".yaml")]: file.read_text(encoding="utf-8") for file in files}


def find_recipe(target: str) -> tuple[str, str]:
    """(where it is from, YAML text) of a recipe's file or built-in name.

    Raises:
        RecipeError: neither is there (with near names).
    """
    path = Path(target).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return str(path), read_text(path)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {target} cannot be read: {error}") from error
    builtin = builtin_recipes()
    if target in builtin:
        return f"{target} (built-in)", builtin[target]
    near = difflib.get_close_matches(target, builtin, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"built-in are {', '.join(builtin)}"
    raise RecipeError(f"there is no recipe {target!r}; {hint}")


def load_recipe(target: str, overrides: Sequence[str] = ()) -> Recipe | Suite:
    """Read and validate a recipe or a suite.

    Args:
        target: a YAML file or a built-in name.
        overrides: `key=value`, dotted keys, YAML values: `budget.macs=0.4`, `recover.finetune=null`.

    Raises:
        RecipeError: names the file, the key and the line.
    """
    origin, text = find_recipe(target)
    return parse_recipe(text, origin, overrides)


def parse_recipe(text: str, origin: str, overrides: Sequence[str] = ()) -> Recipe | Suite:
    """Validate YAML text; `origin` names it in errors.

    Raises:
        RecipeError: names the origin, the key and the line.
    """
    data, lines = _read_yaml(text, origin)
    return validate_recipe(data, origin, overrides, lines)


def validate_recipe(
    data: Mapping[str, Any],
    origin: str,
    overrides: Sequence[str] = (),
    lines: Mapping[tuple[str, ...], int] | None = None,
) -> Recipe | Suite:
    """Apply overrides to plain data and validate it.

    Raises:
        RecipeError: names the origin, the key and, where known, the line.
    """
    kind: type[Recipe] | type[Suite] = Suite if "runs" in data else Recipe
    merged = copy.deepcopy(dict(data))
    set_by: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys, value = _read_override(override)
        if kind is Suite:
            raise RecipeError(f"{origin} is a list of recipes; override a single one, not the list ({override})")
        _put(merged, keys, value)
        set_by[keys] = override
    try:
        recipe = kind.model_validate(merged)
    except ValidationError as error:
        raise RecipeError(explained(error, kind, origin, set_by, lines or {})) from error
    if isinstance(recipe, Recipe):
        try:
            recipe.criterion(), recipe.criterion_of_weights(), recipe.limits(), recipe.planning()
            recipe.closed_form(), recipe.gauss_newton(), recipe.distillation()
        except RecipeError as error:
            raise RecipeError(f"{place_of(str(error), origin, set_by, lines or {})}: {error}") from error
    return recipe


class _Loader(yaml.SafeLoader):
    """Plain data. 2:4 stays as it is written, which YAML 1.1 takes for a number to base 60."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as it is in yaml.SafeLoader
        first: [("tag:yaml.org,2002:str", re.compile(r"\d+:\d+$")), *others] if first.isdigit() else others
        for first, others in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _read_yaml(text: str, origin: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Plain data and the line (from 1) of every key."""
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise RecipeError(f"{origin}: aliases (*name) are not taken; write the value out")
        node = yaml.compose(text, Loader=_Loader)
        lines: dict[tuple[str, ...], int] = {}
        if node is not None:
            _walk(node, (), lines, origin)
        data = yaml.load(text, Loader=_Loader)
    except yaml.constructor.ConstructorError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(
            f"{origin}, line {line}: {error.problem}; recipes are plain data, a tag that would run code is refused"
        ) from error
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{origin}: a value cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{origin}{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping with name, model, ...; this is {type(data).__name__}")
    return data, lines


def _walk(node: yaml.Node, path: tuple[str, ...], lines: dict[tuple[str, ...], int], origin: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                raise RecipeError(f"{origin}, line {key.start_mark.line + 1}: key {'.'.join(here)!r} stands twice")
            lines[here] = key.start_mark.line + 1
            _walk(value, here, lines, origin)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            here = (*path, str(number))
            lines[here] = value.start_mark.line + 1
            _walk(value, here, lines, origin)


def _read_override(override: str) -> tuple[tuple[str, ...], Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"override {override!r} is not key=value, as in budget.macs=0.4")
    try:
        return tuple(key.strip().split(".")), yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: the value is no YAML: {error}") from error


def _put(data: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(data.get(key), dict):
            data[key] = {}
        data = data[key]
    data[keys[-1]] = value
