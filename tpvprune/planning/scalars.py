"""The numbers that a network's code puts into its operations: a cut must not change them.

`q * (C // heads) ** -0.5` follows a width that the code reads off its input. Where a norm before it pools over the
units, no comparison of outputs tells; the number itself does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tpvprune.elastic import Place, numbers_at
from tpvprune.members import Opening
from tpvprune.planning.seen import Site
from tpvprune.source import running

PRODUCTS = frozenset(("addmm", "baddbmm", "addbmm", "addmv", "addr"))


@dataclass(frozen=True)
class Used:
    """The numbers of one operation.

    Attributes:
        name: of the operation.
        numbers: in order.
        module: whose code runs, by name.
        site: class, method or function, and line of that code; None if it is not known.
        places: per number, the operands in that statement that are it.
    """

    name: str
    numbers: tuple[float, ...]
    module: str = ""
    site: Site | None = None
    places: tuple[tuple[Place, ...], ...] = ()


class Scalars(TorchDispatchMode):
    """Runs with a network and notes the numbers that its operations are given.

    Args:
        model: whose code is looked at; None where only the numbers are wanted.

    Attributes:
        used: what was noted, in order.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.used: list[Used] = []
        self._names = {} if model is None else {id(m): name for name, m in model.named_modules()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note its numbers."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__.rstrip("_")
        if torch.Tag.pointwise in func.tags or name in PRODUCTS:
            numbers = tuple(v for v in (*args, *kwargs.values()) if type(v) in (int, float) and math.isfinite(v))
            if numbers:
                self.used.append(self._noted(name, numbers))
        return func(*args, **kwargs)

    def _noted(self, name: str, numbers: tuple[float, ...]) -> Used:
        found = running(sys._getframe(2), lambda module: id(module) in self._names) if self._names else None
        if found is None:
            return Used(name, numbers)
        owner, _, where = found
        if where is None:
            return Used(name, numbers, self._names[id(owner)])
        site = type(owner), where[0], where[1].f_lineno
        places = tuple(tuple(numbers_at(*site, number, where[1])) for number in numbers)
        return Used(name, numbers, self._names[id(owner)], site, places)


def changed(dense: Iterable[Used], cut: Iterable[Used], free: Collection[str] = ()) -> tuple[Used, int] | None:
    """The first operation to which a cut network gives another number, and which; None as far as both do the same.

    Args:
        dense: the operations of the network as it is.
        cut: those of the cut one.
        free: modules whose numbers may follow their widths.
    """
    for one, other in zip(dense, cut, strict=False):
        if one.name != other.name or len(one.numbers) != len(other.numbers):
            return None  # the code goes another way, and nothing can be told of what follows
        for number, (a, b) in enumerate(zip(one.numbers, other.numbers, strict=True)):
            if a != b and one.module not in free:
                return one, number
    return None


def keeping(dense: Iterable[Used], at: Used, number: int) -> Mapping[str, tuple[Opening, ...]]:
    """How the modules with the code of an operation keep one of its numbers; empty where it cannot be written so.

    Args:
        dense: all operations of the network as it is.
        at: the operation.
        number: which of its numbers.
    """
    if at.site is None:
        return {}
    for place in at.places[number]:
        found: dict[str, set[float]] = {}
        for used in dense:
            if used.site == at.site and any(place in places for places in used.places):
                numbers = zip(used.numbers, used.places, strict=True)
                found.setdefault(used.module, set()).update(n for n, places in numbers if place in places)
        if all(len(of) == 1 for of in found.values()):  # a number of each module, in all of its calls
            return {name: (Opening(at.site[1], *place, number=min(of)),) for name, of in found.items()}
    return {}
