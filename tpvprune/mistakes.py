"""What is wrong with a recipe, and where it was written."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


def place_of(
    message: str, origin: str, set_by: Mapping[tuple[str, ...], str], lines: Mapping[tuple[str, ...], int]
) -> str:
    """Where the value that a settings class refused (`section: ... key=value ...`) was written."""
    section = tuple(message.partition(":")[0].split("."))
    for written in (set_by, lines):
        for path in written:
            if path[: len(section)] == section and len(path) > len(section) and f"{path[-1]}=" in message:
                return f"override {set_by[path]!r}" if path in set_by else f"{origin}, line {lines[path]}"
    return f"{origin}, line {lines[section]}" if section in lines else origin


def explained(
    error: ValidationError,
    kind: type[BaseModel],
    origin: str,
    set_by: Mapping[tuple[str, ...], str],
    lines: Mapping[tuple[str, ...], int],
) -> str:
    """One line a mistake: file, line or override, key, what is wrong, near keys."""
    told: dict[str, None] = {}
    for problem in error.errors():
        path = tuple(str(part) for part in problem["loc"])
        known = next((path[:end] for end in range(len(path), 0, -1) if path[:end] in lines or path[:end] in set_by), ())
        by = next((set_by[path[:end]] for end in range(len(path), 0, -1) if path[:end] in set_by), None)
        where = f"override {by!r}" if by else f"{origin}, line {lines[known]}" if known else origin
        # Alternatives of a union stand behind the key and mean nothing to the reader.
        key = ".".join(known if known and problem["type"] != "missing" else path)
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(path[-1], _fields_at(kind, path[:-1]), n=1)
            text = f"unknown key {'.'.join(path)!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        elif problem["type"] == "missing":
            text = f"key {key!r} is missing"
        else:
            text = f"key {key!r}: {_wanted(problem, kind, path)} (got {problem['input']!r})"
        told[f"{where}: {text}"] = None
    return "\n".join(told)


def _wanted(problem: Any, kind: type[BaseModel], path: tuple[str, ...]) -> str:
    """What should stand there, as one would write it; in pydantic's words where those say so."""
    given, name = problem["input"], ".".join(path)
    if problem["type"] == "tuple_type" and isinstance(given, str):
        return f"give a list, as [{given}]"
    if problem["type"] != "model_type":
        return f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
    if name == "model" and isinstance(given, str):
        return f"the model's name is a key of it: write model: {{name: {given}}}, or model.name={given}"
    if name == "recover" and given is None:
        return "its steps are left out one by one, as recover.reconstruct=null and recover.finetune=null"
    keys = ", ".join(f"{name}.{field}" for field in _fields_at(kind, path))
    return f"it is a section, of which keys are set: {keys}"


def _fields_at(kind: Any, path: tuple[str, ...]) -> list[str]:
    for part in path:
        field = kind.model_fields.get(part)
        options = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        kind = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if kind is None:
            return []
    return list(kind.model_fields)
