"""What a model's attributes say of its widths: which have to be set anew after a cut, and which tell others of it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from tpvprune.multihead import Heads
from tpvprune.planning.conventions import told
from tpvprune.planning.cost import RECURRENT
from tpvprune.planning.follower import OF_ONE_HEAD, numbers, shapes
from tpvprune.planning.seen import Width
from tpvprune.source import undecorated

if TYPE_CHECKING:
    from tpvprune.planning.traced import Traced

# Set anew by `layers.refresh`.
LAYERS = (_ConvNd, nn.Linear, nn.Embedding, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU, Heads, *RECURRENT)


@dataclass(frozen=True)
class Counted:
    """Whole numbers in modules that count the units of one group, so that they can be set anew after a cut.

    Attributes:
        counts: by name of the number its group and how often each unit counts.
        doubtful: those of the names that the code reads for something else, as far as its statements tell.
        untold: modules in which a length that has to be told is not.
        torn: groups that statements count by a number by which others count what stays.
    """

    counts: dict[str, tuple[str, int]]
    doubtful: set[str]
    untold: set[str]
    torn: set[str]


def counted_attributes(traced: Traced, known: frozenset[str] | None) -> Counted:
    """The numbers that count units.

    Args:
        traced: its groups are known.
        known: the only ones to look at; None for all.
    """
    counts: dict[str, tuple[str, int]] = {}
    counted: set[int] = set()
    doubtful: set[str] = set()
    torn: set[str] = set()
    sizes = {group.id: group.units for group in traced.groups}
    kinds = {group.id: group.kind for group in traced.groups}
    sure: set[tuple[str, str, int]] = set()
    # What a statement names is what it counts by; of numbers that merely are the same nothing is known.
    others: set[tuple[str, str]] = set()  # told by a statement to be the width of something else
    for width in sorted(traced.follower.widths, key=lambda w: not w.named):
        author = traced.model.get_submodule(width.author)
        group = None if isinstance(author, LAYERS) else _counted(traced, width, sizes)
        if group is None:
            values = vars(author)
            others.update((width.author, key) for key in width.named if values.get(key) == width.length)
            continue
        each, found = width.length // sizes[group], []
        for key, value in numbers(author):
            # Where several heads of queries share one of keys, a unit is all of these.
            heads = kinds[group] == "head" and (each == 1 or (width.heads and key in width.named))
            of_one = any(part in key for part in OF_ONE_HEAD)
            tells = ("head" in key and "dim" not in key and not of_one) == heads
            one = kinds[group] == "head" and of_one
            # What a statement shapes all channels of all heads by is their number, whatever it is called.
            whole = kinds[group] == "head" and each > 1 and not width.heads and key in width.named
            if value == width.length and ((tells and not one) or whole):
                found.append(key)
        named = [key for key in found if key in width.named]
        found = [key for key in found if (width.author, key) not in others]
        if named and not set(named) & set(found):
            torn.add(group)
        place = width.author, group, width.length
        sure_of = bool(named) or (kinds[group] == "head" and each == 1)  # what is called heads, and as many as these
        if named:
            sure.add(place)
        for key in named or ([] if place in sure else found):
            name = f"{width.author}.{key}".removeprefix(".")
            if (known is None or name in known) and name not in traced.policy.uncounted:
                if name not in counts and not sure_of and runs_by(type(author), key):
                    doubtful.add(name)
                counts.setdefault(name, (group, each))
                counted.add(id(width))
        for key, shape in shapes(author):
            place_in = _place(shape, width) if key in width.named else None
            name = f"{width.author}.{key}[{place_in}]".removeprefix(".")
            if place_in is not None and (known is None or name in known):
                counts.setdefault(name, (group, each))

    lost = (width for width in traced.follower.widths if width.must and id(width) not in counted)
    return Counted(counts, doubtful, {width.module for width in lost if _cuttable(traced, width)}, torn)


def runs_by(kind: type[nn.Module], key: str) -> bool:
    """Whether the code of a module's passes, or of a method that it calls, reads an attribute."""
    waiting = [name for name in dir(kind) if name.startswith("forward") or name == "__call__"]
    for name in waiting:  # grows
        method = inspect.getattr_static(kind, name, None)
        method = undecorated(method.__func__ if isinstance(method, (staticmethod, classmethod)) else method)
        if isinstance(method, FunctionType) and method.__module__ != nn.Module.__module__:
            if key in method.__code__.co_names:
                return True
            waiting += [other for other in method.__code__.co_names if other not in waiting and hasattr(kind, other)]
    return False


def _place(shape: tuple[int, ...], width: Width) -> int | None:
    """Where a shape, or a part of one, as `nn.Unflatten` holds it, tells a width; None if not at one place only."""
    starts = range(max(0, width.axis - len(shape) + 1), width.axis + 1)
    fits = [start for start in starts if width.shape[start : start + len(shape)] == shape]
    if len(shape) == 1 and shape != width.shape:  # a number of its own, which may be any
        return None
    return width.axis - fits[0] if len(fits) == 1 else None


def _counted(traced: Traced, width: Width, sizes: Mapping[str, int]) -> str | None:
    """The group of which all units, and nothing else, lie along an axis, each as often; None if there is none."""
    if width.module in traced.policy.whole or width.module in traced.policy.still:
        return None
    places = [traced.place.get(root) for root in traced.roots(width.slots)]
    times = Counter(place for place in places if place is not None)
    groups = {place[0] for place in times}
    if len(groups) != 1 or None in places or len(set(times.values())) != 1:
        return None
    group = groups.pop()
    return group if len(times) == sizes[group] and width.length % sizes[group] == 0 else None


def _cuttable(traced: Traced, width: Width) -> bool:
    return any(root in traced.place for root in traced.roots(width.slots))


def told_widths(traced: Traced) -> dict[str, dict[str, int]]:
    """What the model says of its widths, see `conventions`."""

    def read(layer: str) -> Tensor | None:
        slots = traced.slots(f"{layer}.weight", 1)
        return slots if len(slots) else None

    found = {}
    sizes = {group.id: group.units for group in traced.groups}
    for name, slots in told(traced.model, traced.follower.outputs, read):
        units = Counter(traced.place[root] for root in traced.roots(slots) if root in traced.place)
        entries = Counter[str]()
        for (group, _), times in units.items():
            entries[group] += times
        even = all(times * sizes[group] == entries[group] for (group, _), times in units.items())
        if entries and even and name not in traced.counts:
            found[name] = {group: count // sizes[group] for group, count in entries.items()}
    return found
