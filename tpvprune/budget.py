"""What the pruned model may cost, in the words people use."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from tpvprune.errors import BudgetError, InputError

Quantity = Literal["macs", "params", "bytes", "latency_ms", "units"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
BOUNDS = (*QUANTITIES, "drift")  # all that can be bounded
_SUFFIXES = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_COUNTED = ("macs", "params", "bytes", "units")
_UNITS = {"bytes": "b", "latency_ms": "ms", "drift": "nats", "units": "units"}


def parse_amount(value: float | str, what: str) -> float:
    """Read `0.5`, `"50%"`, `"1.2G"`, `"8 ms"`, `"20 MiB"` or `41_000_000`.

    Raises:
        BudgetError: the value is no positive number, or a percentage above 100.
    """
    return _read(value, what)[0]


def n_of_m(pattern: str, what: str = "pattern") -> tuple[int, int]:
    """N and M of "N:M": how many of every M stay.

    Raises:
        BudgetError: it is none.
    """
    found = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    if found is None or not 0 < int(found[1]) < int(found[2]):
        raise BudgetError(f"{what}={pattern!r} is no N:M with N below M; write '2:4'")
    return int(found[1]), int(found[2])


def _read(value: float | str, what: str) -> tuple[float, bool]:
    """The amount, and whether it is a share: a percentage, or a bare number of at most 1."""
    text = str(value).strip().lower().replace("_", "")
    unit = _UNITS.get(what, "")
    has_unit = bool(unit) and text.endswith(unit)
    number = text.removesuffix(unit).rstrip() if has_unit else text
    short = what not in ("latency_ms", "drift")  # "50m" of these would be no bound at all
    suffix = next((s for s in sorted(_SUFFIXES, key=len, reverse=True) if short and number.endswith(s)), "")
    try:
        if number.endswith("%") and not has_unit and what != "drift":
            amount = float(number[:-1]) / 100
            if amount > 1:
                raise BudgetError(f"{what}={value!r} is above 100%")
        else:
            amount = float(number.removesuffix(suffix)) * _SUFFIXES.get(suffix, 1)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        known = {"latency_ms": "0.5, '50%' or '8 ms'", "drift": "0.05 or '0.05 nats'", "bytes": "0.5, '50%' or '20 MB'"}
        raise BudgetError(
            f"{what}={value!r} is no amount; write {known.get(what, '0.5, 50%, 1.2G or a whole number')}"
        ) from error
    if isinstance(value, bool) or not math.isfinite(amount) or amount <= 0:
        raise BudgetError(f"{what}={value!r} must be above zero")
    if what in _COUNTED and 1 < amount < 100 and amount % 1 and not has_unit and not suffix:
        raise BudgetError(f"{what}={value!r} is more than all; write a share of at most 1, 50%, 1.2G or a whole number")
    return amount, amount <= 1 and not has_unit and not suffix and what != "drift"


@dataclass(frozen=True)
class Budget:
    """Upper bounds on what the pruned model may cost, and what the planner must leave alone.

    Give at least one bound; with several, all of them hold. A bound on a cost is a fraction of the dense model's
    (0.5, "50%") or absolute. With costs the plan is the one of least drift that meets them; with a drift alone it
    is the smallest model within that drift.

    Attributes:
        macs: multiply-adds per example ("1.2G").
        params: parameters ("3M").
        bytes: weights and buffers in memory ("20 MB", "20 MiB").
        latency_ms: milliseconds of one forward pass ("8 ms"), by a `LatencyTable` of the machine at hand.
        drift: KL in nats from the dense model, on samples that the plan was not made by ("0.05 nats"): predicted to
            first order by `allocate`, measured by `plan_for`; needs TPV scores of the softmax head.
        units: channels and heads of all groups together. They differ in what they cost: it is there to compare
            criteria as the literature does.
        min_keep: least share of every group's units that stays.
        round_to: kept widths are multiples of this many channels. None: 8 where a group has at least
            64 channels, less in narrower ones, so that each has eight widths to choose from.
        protect: layers whose outputs and inputs stay whole: exact name, glob, or `re:` regular expression.
        per_group: least share kept for the groups that a pattern matches, in place of `min_keep`.

    Raises:
        BudgetError: no bound, or a value out of range.
    """

    macs: float | str | None = None
    params: float | str | None = None
    bytes: float | str | None = None
    latency_ms: float | str | None = None
    drift: float | str | None = None
    units: float | str | None = None
    min_keep: float = 0.1
    round_to: int | None = None
    protect: tuple[str, ...] = ()
    per_group: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.as_written:
            raise BudgetError(f"a budget bounds at least one of {', '.join(BOUNDS)}; give one")
        for name, value in self.as_written.items():
            parse_amount(value, name)
        for name, share in {"min_keep": self.min_keep, **self.per_group}.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
                raise BudgetError(f"{name}={share!r} is no share of units in (0, 1]")
        if self.round_to is not None and (type(self.round_to) is not int or self.round_to < 1):
            raise BudgetError(f"round_to={self.round_to!r} is no whole number of channels, 1 or more")
        if isinstance(self.protect, str):  # type: ignore[unreachable]  # the type says so, a caller may not
            raise BudgetError(f"protect={self.protect!r} is one string; give a list of patterns")
        object.__setattr__(self, "protect", tuple(self.protect))

    @property
    def as_written(self) -> dict[str, float | str]:
        """The bounds that are given, as they were given; costs first."""
        given = {name: getattr(self, name) for name in BOUNDS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The costs that are bounded."""
        return tuple(name for name in QUANTITIES if getattr(self, name) is not None)

    def only(self, **bounds: float | str) -> Budget:
        """The same roundings, floors and protected groups, with these bounds and no others."""
        return replace(self, **{**dict.fromkeys(BOUNDS), **bounds})  # type: ignore[arg-type]  # names of bounds

    @property
    def most_drift(self) -> float | None:
        """The bound on drift, in nats."""
        return None if self.drift is None else parse_amount(self.drift, "drift")

    def bound(self, quantity: Quantity, dense: float) -> float:
        """A bound in absolute numbers; whole where the quantity is counted.

        Args:
            quantity: one of `quantities`.
            dense: the dense model's cost.
        """
        amount, is_share = _read(getattr(self, quantity), quantity)
        absolute = amount * dense + 1e-9 * dense if is_share else amount
        return absolute if quantity == "latency_ms" else math.floor(absolute)
