"""The nouns that every stage shares: frozen values that can be saved, printed and loaded.

Nothing here holds an `nn.Module`, so a `Graph` can be read on a machine that has never seen the model.
`Member`, `Group`, `Scores` and `Budget` have files of their own beside this one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from tpvprune.errors import PlanError
from tpvprune.files import read_text, write_text
from tpvprune.members import WORK, Group, Member, Opening, whole

GRAPH_FORMAT = 1
FEATURES = "feature_info"  # timm's list of what a model's stages give

DAMAGED = (LookupError, TypeError, AttributeError, ValueError, RuntimeError, OverflowError)  # what such files lead to
REST = "#rest"  # the multiply-adds that belong to no layer, and that no plan changes


@dataclass(frozen=True, eq=False)
class Graph:
    """What can leave a network together, and what every tensor of it costs.

    Attributes:
        groups: the prunable groups, in execution order.
        shapes: shape of every parameter, of every buffer that a group touches, and of work tensors.
        reuse: multiply-adds per entry of a tensor and example. A convolution's weight is used once per
            output position, a linear layer's once per row.
        model_id: fingerprint of the architecture (names and shapes), see `fingerprint`.
        skipped: modules whose outputs cannot be pruned, or whose weights are no units of a `weight_graph`, with the
            reason. A parameter that belongs to the model itself stands under its own name.
        itemsize: bytes per entry of every tensor in `shapes` that is kept in memory; what no group touches besides
            parameters stands under `#rest`.
        counts: whole numbers among the attributes of modules that count entries of a group's units, by qualified
            name: `(group, entries per unit)`; the place in a tuple or list follows in brackets. A cut sets them anew.
        openings: of modules whose code writes out a width that a cut changes.
        told: where the model says how wide something is, timm's `feature_info` and the like: entries per unit of each
            group. A cut sets them anew.
        inputs: shape of each tensor of the example that multiply-adds are counted for, without its first dimension;
            empty where there was none, and in graphs of earlier versions.
    """

    groups: tuple[Group, ...]
    shapes: Mapping[str, tuple[int, ...]]
    reuse: Mapping[str, int]
    model_id: str
    skipped: Mapping[str, str]
    itemsize: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    openings: Mapping[str, tuple[Opening, ...]] = field(default_factory=dict)
    told: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...] = ()
    _by_id: Mapping[str, Group] = field(init=False, repr=False)
    _within: Mapping[str, tuple[str, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_id", {group.id: group for group in self.groups})
        if len(self._by_id) != len(self.groups):
            raise PlanError("two groups of the graph share an id")
        object.__setattr__(self, "_within", _groups_within(self.groups))
        taken: dict[tuple[str, int | None], Tensor] = {}
        for group in self.groups:
            for member in group.members:
                shape = self.shapes.get(member.param)
                if shape is None or (member.dim is not None and member.dim >= len(shape)):
                    raise PlanError(f"group {group.id!r} names {member.param!r}[{member.dim}], which the graph lacks")
                length = math.prod(shape) if member.dim is None else shape[member.dim]
                entries = member.entries(group.units).flatten()
                if int(entries.min()) < 0 or int(entries.max()) >= length:
                    raise PlanError(f"group {group.id!r}: entries of {member.param!r} lie outside {shape}")
                used = taken.setdefault((member.param, member.dim), torch.zeros(length, dtype=torch.int64))
                used.index_add_(0, entries, torch.ones_like(entries))
                if int(used.max()) > 1:
                    raise PlanError(f"entries of {member.param!r}[{member.dim}] belong to two units")

    def __repr__(self) -> str:
        return (
            f"Graph({self.units:,} units in {len(self.groups):,} groups; {self.params():,} parameters, "
            f"{self.macs():,} multiply-adds; {len(self.skipped):,} layers stay whole)"
        )

    def __getitem__(self, group_id: str) -> Group:
        try:
            return self._by_id[group_id]
        except KeyError:
            raise PlanError(f"the graph has no group {group_id!r}") from None

    def __contains__(self, group_id: str) -> bool:
        return group_id in self._by_id

    @property
    def units(self) -> int:
        """All units of all groups."""
        return sum(group.units for group in self.groups)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the tensors in `shapes` that are parameters."""
        other = {m.param for g in self.groups for m in g.of_role("stat", "work")} | {REST}
        return tuple(name for name in self.shapes if name not in other and WORK not in name)

    def within(self, group_id: str) -> tuple[str, ...]:
        """Ids of the groups that leave with a block: all of their tensors lie in it. Empty for other groups."""
        return self._within.get(group_id, ())

    def closed(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same masks, in which all units of groups within skipped blocks are gone too."""
        out = dict(keep)
        for group_id in keep:
            if self.within(group_id) and not bool(keep[group_id].any()):
                out |= {name: torch.zeros(self[name].units, dtype=torch.bool) for name in self.within(group_id)}
        return out

    def lost(self, gone: Mapping[str, Tensor]) -> frozenset[str]:
        """Ids of the groups that lie in skipped blocks.

        Args:
            gone: bool mask `(units,)` per group id of what has left.
        """
        return frozenset(n for name, mask in gone.items() if bool(mask.any()) for n in self.within(name))

    def vanished(self, keep: Mapping[str, Tensor]) -> frozenset[str]:
        """Names of all tensors that lie in skipped blocks."""
        gone = [self[name] for name, mask in keep.items() if not bool(mask.any())]
        return frozenset(m.param for group in gone if group.kind == "block" for m in group.members)

    def sizes(self, keep: Mapping[str, Tensor] | None = None) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor once only the units in `keep` are left; `(0,)` for those of skipped blocks.

        Args:
            keep: bool mask `(units,)` per group id; a group that is missing stays whole.
        """
        sizes = {name: list(shape) for name, shape in self.shapes.items()}
        for group_id, mask in (keep or {}).items():
            group = self[group_id]
            gone = group.units - int(mask.sum())
            for member in group.members:
                if member.dim is not None:
                    sizes[member.param][member.dim] -= gone * member.width()
        return {name: tuple(size) for name, size in sizes.items()} | dict.fromkeys(self.vanished(keep or {}), (0,))

    def params(self, keep: Mapping[str, Tensor] | None = None) -> int:
        """Number of parameters left, exact."""
        return self.cost("params", keep)

    def macs(self, keep: Mapping[str, Tensor] | None = None) -> int:
        """Multiply-adds per example left, exact for every layer that a group touches."""
        return self.cost("macs", keep)

    def times(self, quantity: str) -> Mapping[str, int]:
        """What each entry of a tensor counts for: multiply-adds, bytes, or one parameter.

        Raises:
            PlanError: another quantity.
        """
        if quantity == "macs":
            return self.reuse
        if quantity == "params":
            return dict.fromkeys(self.parameters, 1)
        if quantity != "bytes":
            raise PlanError(f"cost {quantity!r} is none of macs, params, bytes and units")
        return self.itemsize or dict.fromkeys(self.parameters, 4)  # graphs of earlier versions: float32

    def cost(self, quantity: str, keep: Mapping[str, Tensor] | None = None) -> int:
        """What is left of macs, params, bytes or units.

        Raises:
            PlanError: another quantity.
        """
        if quantity == "units":
            return self.units - sum(int((~mask).sum()) for mask in self.closed(keep or {}).values())
        sizes = self.sizes(keep)
        return sum(times * math.prod(sizes[name]) for name, times in self.times(quantity).items())

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form; `from_json` is its inverse."""
        return {
            "format": GRAPH_FORMAT,
            "model_id": self.model_id,
            "groups": [
                {
                    "id": g.id,
                    "kind": g.kind,
                    "units": g.units,
                    "exact_mask": g.exact_mask,
                    "signature": g.signature,
                    "members": [m.to_json() for m in g.members],
                }
                for g in self.groups
            ],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "reuse": dict(self.reuse),
            "skipped": dict(self.skipped),
            "itemsize": dict(self.itemsize),
            **self._optional(),
        }

    def _optional(self) -> dict[str, Any]:
        """The example's shapes, and what a cut sets anew besides tensors; where there is any."""
        found = {
            "counts": {name: list(what) for name, what in self.counts.items()},
            "openings": {name: [_of_opening(opening) for opening in all_of] for name, all_of in self.openings.items()},
            "told": {name: dict(groups) for name, groups in self.told.items()},
            "inputs": [list(shape) for shape in self.inputs],
        }
        return {key: value for key, value in found.items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Graph:
        """Rebuild a graph from `to_json`.

        Raises:
            PlanError: the data is of another format, or incomplete.
        """
        check_format(data, GRAPH_FORMAT, "graph")
        try:
            groups = tuple(
                Group(
                    id=g["id"],
                    kind=g["kind"],
                    units=whole(g["units"]),
                    exact_mask=bool(g["exact_mask"]),
                    signature=g["signature"],
                    members=tuple(map(Member.from_json, g["members"])),
                )
                for g in data["groups"]
            )
            return cls(
                groups=groups,
                shapes={name: tuple(map(whole, shape)) for name, shape in data["shapes"].items()},
                reuse={name: whole(times) for name, times in data["reuse"].items()},
                model_id=data["model_id"],
                skipped=dict(data["skipped"]),
                itemsize={name: whole(size) for name, size in data.get("itemsize", {}).items()},
                counts={name: (str(group), whole(each)) for name, (group, each) in data.get("counts", {}).items()},
                told={n: {g: whole(k) for g, k in groups.items()} for n, groups in data.get("told", {}).items()},
                inputs=tuple(tuple(map(whole, shape)) for shape in data.get("inputs", [])),
                openings={n: tuple(map(_opening, all_of)) for n, all_of in data.get("openings", {}).items()},
            )
        except PlanError:
            raise
        except DAMAGED as error:
            raise PlanError(f"the graph is incomplete or damaged ({error!r}); trace the model again") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the graph as JSON."""
        write_text(path, json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Graph:
        """Read a graph written by `save`."""
        return cls.from_json(read_json(path, "graph"))


def _groups_within(groups: Iterable[Group]) -> dict[str, tuple[str, ...]]:
    """Per block, the ids of the other groups of which every tensor lies in it."""
    groups = tuple(groups)
    found = {}
    for block in groups:
        if block.kind == "block":
            tensors = {m.param for m in block.members}
            others = (g for g in groups if g.kind != "block")
            found[block.id] = tuple(g.id for g in others if all(m.param in tensors for m in g.members))
    return found


def _of_opening(opening: Opening) -> dict[str, Any]:
    return {key: value for key, value in asdict(opening).items() if key != "number" or value is not None}


def _opening(data: Mapping[str, Any]) -> Opening:
    given, number = data.get("given"), data.get("number")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
        raise TypeError(f"{number!r} is no number")
    told = given and (whole(given[0]), whole(given[1]))
    return Opening(data["method"], data["call"], whole(data["size"]), told, number)


def fingerprint(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """Name of an architecture: a hash of its tensors' names and shapes, whatever their values."""
    lines = sorted(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def check_format(data: Mapping[str, Any], known: int, what: str, older: tuple[int, ...] = ()) -> None:
    """Refuse a file whose format number this version does not know.

    Args:
        data: what the file holds.
        known: the format that is written.
        what: the file, in words.
        older: formats that are read too.

    Raises:
        PlanError: no format number, or another one.
    """
    found = data.get("format") if isinstance(data, Mapping) else None
    if found != known and found not in older:
        raise PlanError(f"{what}: format {found!r} is not {known}, the one this version of tpvprune reads")


def read_json(path: str | PathLike[str], what: str) -> Any:
    """Read a JSON file, or say which file is missing or broken.

    Raises:
        PlanError: the file is missing or is no JSON.
    """
    try:
        return json.loads(read_text(path))
    except OSError as error:
        raise PlanError(f"no {what} at {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise PlanError(f"{path} is no {what}: {error}") from error
