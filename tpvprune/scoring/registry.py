"""Criteria by name, for recipes and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tpvprune.errors import InputError
from tpvprune.scoring.criteria import Criterion
from tpvprune.scoring.losses import JBR, Fisher, Jacobian, Taylor
from tpvprune.scoring.magnitude import FPGM, L1, L2, LAMP, WHC, BNScale, Random
from tpvprune.scoring.statistics import Variance, Wanda
from tpvprune.scoring.tpv import TPV

CRITERIA: dict[str, type] = {
    "tpv": TPV,
    "random": Random,
    "l1": L1,
    "l2": L2,
    "lamp": LAMP,
    "fpgm": FPGM,
    "bnscale": BNScale,
    "whc": WHC,
    "taylor": Taylor,
    "fisher": Fisher,
    "jacobian": Jacobian,
    "jbr": JBR,
    "variance": Variance,
    "wanda": Wanda,
}
LABELLED = tuple(name for name, kind in CRITERIA.items() if getattr(kind, "labelled", False))


def criterion_named(name: str, settings: Mapping[str, Any] | None = None) -> Criterion:
    """A criterion from its name.

    Args:
        name: a key of `CRITERIA`.
        settings: its attributes, in place of the defaults.

    Raises:
        InputError: no criterion of that name, or it has no such setting.
    """
    if name not in CRITERIA:
        raise InputError(f"there is no criterion {name!r}; choose one of {', '.join(CRITERIA)}")
    known = {field.name for field in dataclasses.fields(CRITERIA[name])}
    unknown = sorted(set(settings or {}) - known)
    if unknown:
        raise InputError(
            f"criterion {name!r} has no setting {unknown[0]!r}; it has {', '.join(sorted(known)) or 'none'}"
        )
    made: Criterion = CRITERIA[name](**(settings or {}))
    return made
