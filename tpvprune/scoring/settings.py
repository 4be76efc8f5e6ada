"""What a criterion was set to, written down so that another process, or a later run, knows it again."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

from torch import nn

from tpvprune.described import attributes, described, place
from tpvprune.scoring.heads import HEADS
from tpvprune.scoring.perturb import PERTURBATIONS


def settings_of(criterion: Any) -> dict[str, Any]:
    """The settings of a criterion, and of what it is made of, as JSON writes them, by dotted names."""
    found = dict[str, Any]()
    for name, value in attributes(criterion).items():
        if name not in ("engine", "sensitivities"):  # its words name an engine that matters, rows are looked at apart
            found |= _written(name, value)
    return found


def _written(name: str, value: Any) -> dict[str, Any]:
    if not is_dataclass(value) or isinstance(value, (type, nn.Module)) or _word(value):
        return {name: described(value, _word)}
    found: dict[str, Any] = {name: place(type(value))}
    for part, inner in attributes(value).items():
        found |= _written(f"{name}.{part}", inner)
    return found


def _word(value: Any) -> str:
    """The name that makes a head or perturbation what it is, if there is one."""
    return next((word for word, kind in (HEADS | PERTURBATIONS).items() if type(value) is kind and value == kind()), "")
