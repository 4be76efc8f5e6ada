"""What following a network is told and what it notes, as values."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tpvprune.errors import ModelError
from tpvprune.members import Opening
from tpvprune.planning.labels import State

Site = tuple[type[Any], str, int]


@dataclass(frozen=True)
class Policy:
    """What may be cut, as far as running the network has shown.

    Attributes:
        bundles: whether units around a grouped convolution are its groups.
        loose: grouped convolutions of which they are not all the same, with the reason.
        whole: attention modules that keep all of their heads, with the reason.
        still: modules that keep the lengths of all axes their code takes apart, with the reason.
        parts: modules that keep the lengths of uneven parts they cut channels into.
        sealed: modules that keep the width of whatever comes in or goes out, with the reason.
        openings: sizes that modules' code leaves open.
        kept: `(param, dim, entry)` of units that stay, with the reason.
        uncounted: numbers of modules that only happen to be as many as units.
    """

    bundles: bool = False
    loose: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    still: Mapping[str, str] = field(default_factory=dict)
    parts: frozenset[str] = frozenset()
    sealed: Mapping[str, str] = field(default_factory=dict)
    openings: Mapping[str, tuple[Opening, ...]] = field(default_factory=dict)
    kept: Mapping[tuple[str, int, int], str] = field(default_factory=dict)
    uncounted: frozenset[str] = frozenset()


class Limit:
    """A time by which tracing is to end.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def check(self, at: str) -> None:
        """Go on if there is time left.

        Args:
            at: what is done at the moment, in words.

        Raises:
            ModelError: it is past the time.
        """
        if time.monotonic() > self._end:
            raise ModelError(
                f"tracing takes more than {self.seconds:g} s; the last it did was {at}. Trace on a smaller input, or "
                "give it more seconds"
            )


@dataclass(frozen=True, eq=False)
class Width:
    """A place in a module's code that depends on how many entries an axis has.

    Attributes:
        module: qualified name.
        author: likewise, of the module whose method it is; another one if that is called from the module's code.
        length: of the axis, or of each of the equal parts it is cut into.
        slots: along the axis.
        heads: whether it tells the heads of an attention apart.
        shape: what a tensor is brought to there.
        axis: of that shape.
        must: whether nothing can be cut unless an attribute tells the length.
        named: attributes of its own that the module reads in that statement.
    """

    module: str
    author: str
    length: int
    slots: Tensor
    heads: bool = False
    shape: tuple[int, ...] = ()
    axis: int = 0
    must: bool = False
    named: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Reshaped:
    """What a call of `reshape` or `view` did.

    Attributes:
        before: the shape of what it was given.
        after: of what it gave.
        axes: of the latter, along which slots lie.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    axes: set[int]

    def source(self, axis: int) -> int | None:
        """The axis of what was given that an axis of what came out is, unchanged; None if it is none."""
        for other, length in enumerate(self.before):
            same = math.prod(self.before[:other]) == math.prod(self.after[:axis])
            if same and length == self.after[axis] and length > 1:
                return other
        return None


@dataclass(frozen=True, eq=False)
class Product:
    """A product of activations with each other, or with a parameter or buffer.

    Attributes:
        module: in which it stands.
        macs: of the whole batch.
        slots: of the axes that units lie along, in what comes out and in what is summed over.
        weight: name of the parameter or buffer, if it is with one.
        rows: those of the slots that the weight does not hold: along what it is applied to, again and again.
    """

    module: str
    macs: int
    slots: tuple[Tensor, ...]
    weight: str | None = None
    rows: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Call:
    """One operation: what it is, what it was given, what was known of that, and what came out."""

    func: Any
    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    given: Sequence[Tensor]
    before: Sequence[State]
    shapes: Sequence[tuple[int, ...]]
    out: Sequence[Tensor]

    def argument(self, name: str, default: Any = None) -> Any:
        """The value of an argument by its name in the operation's schema."""
        for number, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if number < len(self.args):
                    return self.args[number]
                return self.kwargs.get(name, default)
        return default
