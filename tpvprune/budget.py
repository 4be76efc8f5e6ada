"""What the pruned model may cost, in the words people use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tpvprune.errors import BudgetError, InputError
from tpvprune.types import Graph

QUANTITIES: tuple[Literal["macs", "params", "units"], ...] = ("macs", "params", "units")
_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def parse_amount(value: float | str, what: str) -> float:
    """Read `0.5`, `"50%"`, `"1.2G"` or `41_000_000`; at most 1 is a fraction, above is absolute.

    Raises:
        BudgetError: the value is no positive number, or a percentage above 100.
    """
    text = str(value).strip().lower().replace("_", "")
    try:
        if text.endswith("%"):
            amount = float(text[:-1]) / 100
            if amount > 1:
                raise BudgetError(f"{what}={value!r} is above 100%")
        elif text and text[-1] in _SUFFIXES:
            amount = float(text[:-1]) * _SUFFIXES[text[-1]]
        else:
            amount = float(text)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise BudgetError(f"{what}={value!r} is no amount; write 0.5, '50%', '1.2G' or a whole number") from error
    if isinstance(value, bool) or not math.isfinite(amount) or amount <= 0:
        raise BudgetError(f"{what}={value!r} must be above zero")
    return amount


@dataclass(frozen=True)
class Budget:
    """An upper bound on what the pruned model may cost, and what the planner must leave alone.

    Give exactly one of `macs`, `params` and `units`.

    Attributes:
        macs: multiply-adds per example; a fraction of the dense model's (0.5, "50%") or absolute ("1.2G").
        params: parameters, written the same way.
        units: channels and heads of all groups together, written the same way. They differ in what they cost:
            it is there to compare criteria as the literature does.
        min_keep: least share of every group's units that stays.
        round_to: kept widths are multiples of this many channels. None: 8 where a group has at least
            64 channels, less in narrower ones, so that each has eight widths to choose from.
        protect: layers whose outputs and inputs stay whole: exact name, glob, or `re:` regular expression.
        per_group: least share kept for the groups that a pattern matches, in place of `min_keep`.

    Raises:
        BudgetError: no bound, two bounds, or a value out of range.
    """

    macs: float | str | None = None
    params: float | str | None = None
    units: float | str | None = None
    min_keep: float = 0.1
    round_to: int | None = None
    protect: tuple[str, ...] = ()
    per_group: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = [name for name in QUANTITIES if getattr(self, name) is not None]
        if len(given) != 1:
            raise BudgetError(
                f"a budget bounds one of macs, params and units, not {' and '.join(given) or 'nothing'}; "
                "give one and leave the other out (null)"
            )
        parse_amount(getattr(self, given[0]), given[0])
        for name, share in {"min_keep": self.min_keep, **self.per_group}.items():
            if not 0 < share <= 1:
                raise BudgetError(f"{name}={share} is no share of units in (0, 1]")
        if self.round_to is not None and self.round_to < 1:
            raise BudgetError(f"round_to={self.round_to} must be at least 1")
        if isinstance(self.protect, str):  # type: ignore[unreachable]  # the type says so, a caller may not
            raise BudgetError(f"protect={self.protect!r} is one string; give a list of patterns")
        object.__setattr__(self, "protect", tuple(self.protect))

    @property
    def quantity(self) -> Literal["macs", "params", "units"]:
        """What is bounded."""
        return next(name for name in QUANTITIES if getattr(self, name) is not None)

    def bound(self, graph: Graph) -> int:
        """The bound in absolute numbers for this graph."""
        amount = parse_amount(getattr(self, self.quantity), self.quantity)
        dense = graph.cost(self.quantity)
        return math.floor(amount * dense + 1e-9 * dense) if amount <= 1 else math.floor(amount)
