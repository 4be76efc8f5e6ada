"""What products cost besides what the shapes of weights tell: work tensors, which leave with the groups along them.

A product of activations holds no parameter, and a weight may be applied to as many rows as a group has units, as the
layers are that mix tokens. Such a product costs what the lengths of its axes come to. Along an axis lie all units of
some groups, each equally often, and what no group holds; so the cost is a sum over one of these for each axis.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tpvprune.members import WORK, Member
from tpvprune.planning.seen import Product
from tpvprune.planning.units import STATIC

if TYPE_CHECKING:
    from tpvprune.planning.traced import Traced

UNEQUAL = "what is left in {!r} depends on which of its units leave"


class _Unequal(Exception):
    """Internal: some units of a group lie along an axis more often than others."""


def add_products(traced: Traced) -> dict[tuple[str, int, int], str]:
    """Count each weight's multiply-adds, and give work tensors to the groups that other products depend on.

    Args:
        traced: its groups are known.

    Returns:
        Entries of units that cannot be counted, with the reason, as in `Policy.kept`.
    """
    spent: Counter[tuple[str, tuple[str, ...]]] = Counter()
    kept: dict[tuple[str, int, int], str] = {}
    for product in _not_by_weight(traced):
        module = product.module
        if product.weight in traced.shapes:  # all that one layer's weight costs stands beside it
            module = str(product.weight).rpartition(".")[0]
        try:
            axes = [_segments(traced, slots) for slots in product.slots]
        except _Unequal:
            kept |= _entries(traced, product)
            continue
        whole = math.prod(sum(axis.values()) for axis in axes)
        for parts in itertools.product(*(axis.items() for axis in axes)):
            names = tuple(sorted(name for name, _ in parts if name is not None))
            if names:
                spent[module, names] += product.macs * math.prod(length for _, length in parts) // whole
    for (module, names), macs in spent.items():
        _add(traced, module, names, macs)
    return kept


def _not_by_weight(traced: Traced) -> list[Product]:
    """Count the weights that are used as a whole equally often, whatever leaves; the products that are left."""
    left: list[Product] = []
    fixed: dict[str, list[Product]] = {}
    for product in traced.follower.products:
        held = any(root in traced.place for slots in product.rows for root in traced.roots(slots.unique()))
        if product.weight in traced.shapes and not held:
            fixed.setdefault(str(product.weight), []).append(product)
        else:
            left.append(product)
    for name, products in fixed.items():
        numel = torch.Size(traced.shapes[name]).numel()
        times, rest = divmod(sum(product.macs for product in products), numel * traced.usage.batch)
        if rest:  # its parts are used unequally often
            left += products
        else:
            traced.reuse[name] = times
    return left


def _segments(traced: Traced, slots: Tensor) -> Counter[str | None]:
    """How much of an axis each group holds, and, under None, what no group does.

    Raises:
        _Unequal: not every unit of a group holds as much.
    """
    found: Counter[str | None] = Counter()
    units: Counter[tuple[str, int]] = Counter()
    for slot, times in zip(*(each.tolist() for each in slots.unique(return_counts=True)), strict=True):
        place = traced.place.get(traced.units.find(slot)) if slot > STATIC else None
        found[None if place is None else place[0]] += times
        if place is not None:
            units[place] += times
    sizes = {group.id: group.units for group in traced.groups}
    if any(times * sizes[name] != found[name] for (name, _), times in units.items()):
        raise _Unequal
    return found


def _entries(traced: Traced, product: Product) -> dict[tuple[str, int, int], str]:
    """All entries, in the first tensor that writes them, of groups along a product's axes."""
    roots = (root for slots in product.slots for root in traced.roots(slots.unique()))
    names = {traced.place[root][0] for root in roots if root in traced.place}
    kept = {}
    for group in traced.groups:
        if group.id in names:
            member = group.of_role("produce", "affine")[0]
            for entry in member.entries(group.units)[:, 0].tolist():
                kept[member.param, member.axis, entry] = UNEQUAL.format(product.module or type(traced.model).__name__)
    return kept


def _add(traced: Traced, module: str, names: tuple[str, ...], macs: int) -> None:
    """A work tensor with an axis for each of some groups."""
    numbers = {group.id: number for number, group in enumerate(traced.groups)}
    groups = [traced.groups[numbers[name]] for name in names]
    units = [group.units for group in groups]
    wide = [max((m.width() for m in g.of_role("consume")), default=1) for g in groups]
    each = [width if group.kind == "head" else 1 for group, width in zip(groups, wide, strict=True)]
    if macs % (math.prod(units) * math.prod(each) * traced.usage.batch):  # keys and values of different widths
        each = [1] * len(groups)
    shape = tuple(count * width for count, width in zip(units, each, strict=True))
    times, rest = divmod(macs, math.prod(shape) * traced.usage.batch)
    if rest:
        return
    work = f"{module}{WORK}{'attention' if all(group.kind == 'head' for group in groups) else 'product'}"
    work = next(name for name in (work, *(f"{work}{n}" for n in range(2, 99))) if name not in traced.shapes)
    traced.shapes[work], traced.reuse[work] = shape, times
    for dim, (name, width) in enumerate(zip(names, each, strict=True)):
        group = traced.groups[numbers[name]]
        index = None if width == 1 else torch.arange(group.units * width).reshape(group.units, width)
        member = Member(work, dim, index, "work")
        traced.groups[numbers[name]] = replace(group, members=(*group.members, member))
