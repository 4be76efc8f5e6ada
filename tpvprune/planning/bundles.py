"""Whole groups of grouped convolutions as units, a *bundle* each: its channels in and out leave together.

A grouped convolution ties its group `g` of channels in to its group `g` of channels out. So what the dependency graph
finds for the channels it reads and for those it writes is one group of ours, with as many units as the convolution has
groups; its weight loses rows alone, as that of a depthwise convolution does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tpvprune.types import Group, Member, Role

Item = tuple[Any, str, list[int], list[int]]
"""(node, "in" or "out", entries of its module, the root's channels they belong to)."""
Sides = tuple[list[tuple[str, int, Role]], int, bool]


class Unbundled(Exception):
    """Internal: the groups of a convolution cannot leave as a whole; carries the reason."""


def is_grouped(module: nn.Module) -> bool:
    """Whether a module is a convolution in several groups that is not depthwise."""
    if not isinstance(module, _ConvNd) or module.groups == 1 or module.transposed:
        return False
    return not module.groups == module.in_channels == module.out_channels


def joined(items: list[Item], walk: Callable[[nn.Module, str], list[Item]]) -> list[list[Item]]:
    """The items of a root, and those of all that grouped convolutions tie to them, a list for each walk.

    Args:
        items: of the root.
        walk: the items that a side of a module is tied to.
    """
    parts, seen = [items], set[tuple[int, str]]()
    for part in parts:  # grows
        convs = [(node.module, side) for node, side, _, _ in part if is_grouped(node.module)]
        seen.update((id(module), side) for module, side in convs)
        for module, side in convs:
            other = "in" if side == "out" else "out"
            if (id(module), other) not in seen:
                seen.add((id(module), other))
                found = walk(module, other)
                seen.update((id(node.module), s) for node, s, _, _ in found)
                parts.append(found)
    return parts


def bundle_group(
    name: str, parts: list[list[Item]], sides: Callable[[Item], Sides | None], sizes: Callable[[str], tuple[int, ...]]
) -> Group:
    """The group whose units are the groups of all grouped convolutions among the items.

    Args:
        name: of the root.
        parts: from `joined`.
        sides: of an item: the tensors that lose entries, the channel groups it imposes, whether it pools; None for
            what holds no weights.
        sizes: shape of a tensor by name.

    Raises:
        Unbundled: they cannot leave as a whole.
    """
    counts = {node.module.groups for part in parts for node, _, _, _ in part if is_grouped(node.module)}
    if len(counts) != 1:
        raise Unbundled("the layers it is tied to have other numbers of groups")
    count, exact = counts.pop(), True
    members: dict[tuple[str, int], Member] = {}
    for part in parts:
        of_channel = _bundles(part, count)
        for item in part:
            node, side, entries, channels = item
            found = sides(item)
            if found is None:
                continue
            tensors, share, pools = found
            grouped = is_grouped(node.module)
            if share > 1 and not grouped:
                raise Unbundled("a norm over groups of channels reads them")
            exact = exact and not pools
            if grouped and side == "in":  # the weight holds the channels of one group only, which all others share
                continue
            table: list[set[int]] = [set() for _ in range(count)]
            for entry, channel in zip(entries, channels, strict=True):
                if channel not in of_channel:
                    raise Unbundled("only part of its channels are tied to a grouped convolution")
                table[of_channel[channel]].add(entry)
            for param, dim, role in tensors:
                index = _index(table, param, sizes(param)[dim])
                members[param, dim] = Member(param, dim, index, "affine" if grouped else role)
    own = tuple(members.values())
    if not any(member.role == "consume" for member in own):
        raise Unbundled("no convolution or linear layer consumes its outputs")
    kinds = sorted(f"{member.role}:{member.dim}:{member.width()}" for member in own)
    return Group(name, "bundle", count, own, exact, "|".join(["bundle", *kinds]))


def _bundles(part: Iterable[Item], count: int) -> dict[int, int]:
    """The bundle of each of the root's channels, which all grouped convolutions of a walk must agree on."""
    found: dict[int, int] = {}
    for node, side, entries, channels in part:
        if is_grouped(node.module):
            width = (node.module.in_channels if side == "in" else node.module.out_channels) // count
            for entry, channel in zip(entries, channels, strict=True):
                if found.setdefault(channel, entry // width) != entry // width:
                    raise Unbundled("its channels run through differently grouped layers")
    return found


def _index(table: list[set[int]], param: str, size: int) -> torch.Tensor:
    if len({len(row) for row in table}) != 1 or not table[0]:
        raise Unbundled(f"only part of its channels reach {param!r}")
    index = torch.tensor([sorted(row) for row in table], dtype=torch.int64)
    if int(index.max()) >= size or index.unique().numel() != index.numel():
        raise Unbundled(f"its channels cannot be mapped to entries of {param!r}")
    return index
