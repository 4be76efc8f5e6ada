"""What stays: a plan is keep-masks in the coordinates of the original, dense model.

Because every plan of a model speaks the same coordinates, plans are free of order, can be composed,
compared, and applied without tracing again. Units (channels, heads) are cut out; single weights are held at zero.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tpvprune.errors import PlanError
from tpvprune.files import write_text
from tpvprune.members import whole
from tpvprune.types import DAMAGED, Graph, check_format, read_json

PLAN_FORMAT = 2  # 1 had no weights, and masks over a weight graph among `keep`; it is read for ever
_ATTRIBUTE = "_tpvprune_plan"


@dataclass(frozen=True, eq=False)
class Plan:
    """Which units of each group stay, and which weights of what stays are zero.

    Attributes:
        keep: bool mask `(units,)` per group id; a group that is missing stays whole. What lies in a skipped block is
            gone with it, whatever was asked of it. Masks over groups of single weights (`weight_graph`) are
            rewritten as `weights`, and those groups leave the graph.
        graph: the graph of the dense model the masks speak of.
        made_by: how the plan came about, JSON-ready.
        weights: per parameter a bool mask of its original shape; False is held at zero. A tensor that is missing
            stays dense. What leaves with a unit is no zero: it is True here, whatever was given. Tensors of a
            skipped block are left out.

    Raises:
        PlanError: a mask is of another type or shape, or a group would lose all its units.
    """

    keep: Mapping[str, Tensor]
    graph: Graph
    made_by: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, mask in self.keep.items():
            group = self.graph[name]
            if mask.dtype != torch.bool or mask.shape != (group.units,):
                raise PlanError(f"plan: group {name!r} needs a bool mask of shape ({group.units},)")
        object.__setattr__(self, "keep", self.graph.closed(self.keep))
        skipped = self.graph.vanished(self.keep)
        for name, mask in self.keep.items():
            group = self.graph[name]
            whole = group.kind == "weight" or all(m.param in skipped for m in group.members)
            if not whole and not bool(mask.any()):
                raise PlanError(f"plan: group {name!r} would lose all {group.units} units; keep at least one")
        known = set(self.graph.parameters) if self.weights else set()
        for name, mask in self.weights.items():
            if name not in known:
                raise PlanError(f"plan: the graph knows no parameter {name!r} to mask")
            if mask.dtype != torch.bool or tuple(mask.shape) != self.graph.shapes[name]:
                raise PlanError(f"plan: weights of {name!r} need a bool mask of shape {self.graph.shapes[name]}")
        if any(group.kind == "weight" for group in self.graph.groups):
            self._rewrite_units_of_weights()
        if self.keep and self.weights:
            skipped = self.graph.vanished(self.keep)
            there = {name: mask for name, mask in self.weights.items() if name not in skipped}
            weights = {name: mask | ~self.left(name) for name, mask in there.items()}
            object.__setattr__(self, "weights", weights)

    def __repr__(self) -> str:
        zeros = f"{self.zeros:,} weights at zero; " if self.weights else ""
        return (
            f"Plan({self.removed:,} of {self.graph.units:,} units leave; {zeros}{self.params:,} parameters, "
            f"{self.macs:,} multiply-adds stay)"
        )

    def _rewrite_units_of_weights(self) -> None:
        weights = {name: mask.clone() for name, mask in self.weights.items()}
        for name, mask in self.keep.items():
            group = self.graph[name]
            for member in group.members if group.kind == "weight" else ():
                shape = self.graph.shapes[member.param]
                if member.dim is not None:
                    raise PlanError(f"plan: the weights of {member.param!r} lie along a dimension; use weight_graph()")
                flat = weights.setdefault(member.param, torch.ones(shape, dtype=torch.bool)).view(-1)
                flat[~mask if member.index is None else member.index[~mask].flatten()] = False
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "keep", {n: mask for n, mask in self.keep.items() if self.graph[n].kind != "weight"})
        groups = tuple(group for group in self.graph.groups if group.kind != "weight")
        object.__setattr__(self, "graph", replace(self.graph, groups=groups))

    def mask(self, group_id: str) -> Tensor:
        """Keep-mask of one group, `(units,)`."""
        if group_id in self.keep:
            return self.keep[group_id]
        return torch.ones(self.graph[group_id].units, dtype=torch.bool)

    @property
    def params(self) -> int:
        """Parameters of the model that comes out."""
        return self.graph.params(self.keep)

    @property
    def macs(self) -> int:
        """Multiply-adds per example of the model that comes out."""
        return self.graph.macs(self.keep)

    @property
    def removed(self) -> int:
        """Units that leave."""
        return sum(int((~mask).sum()) for mask in self.keep.values())

    @property
    def zeros(self) -> int:
        """Weights held at zero in the model that comes out."""
        return sum(int((~mask).sum()) for mask in self.weights.values())

    @property
    def nonzero(self) -> int:
        """Parameters of the model that comes out that are not held at zero."""
        return self.params - self.zeros

    @property
    def sparsity(self) -> float:
        """Share of zeros in what is left of the tensors that `weights` names; 0.0 where it names none."""
        sizes = self.graph.sizes(self.keep)
        left = sum(math.prod(sizes[name]) for name in self.weights)
        return self.zeros / left if left else 0.0

    def kept_entries(self, param: str, dim: int) -> Tensor:
        """Sorted entries of one dimension of one original tensor that stay, `(kept,)`."""
        left = torch.ones(self.graph.shapes[param][dim], dtype=torch.bool)
        for group_id, mask in self.keep.items():
            group = self.graph[group_id]
            for member in group.members:
                if member.param == param and member.dim == dim:
                    left[member.entries(group.units)[~mask].flatten()] = False
        return left.nonzero().flatten()

    def left(self, param: str) -> Tensor:
        """Which entries of an original tensor do not leave with a unit, a bool mask of its shape."""
        if param in self.graph.vanished(self.keep):
            return torch.zeros(self.graph.shapes[param], dtype=torch.bool)
        left = torch.ones(self.graph.shapes[param], dtype=torch.bool)
        for dim, size in enumerate(left.shape):
            kept = self.kept_entries(param, dim)
            if len(kept) != size:
                gone = torch.ones(size, dtype=torch.bool)
                gone[kept] = False
                left.index_fill_(dim, gone.nonzero().flatten(), False)
        return left

    def cut(self, param: str, tensor: Tensor) -> Tensor:
        """The part of an original tensor that does not leave with a unit; the tensor itself where that is all."""
        for dim in range(tensor.ndim):
            kept = self.kept_entries(param, dim)
            if len(kept) != tensor.shape[dim]:
                tensor = tensor.index_select(dim, kept.to(tensor.device))
        return tensor

    def weight_masks(self) -> dict[str, Tensor]:
        """`weights` in the shapes of the model that comes out."""
        return {name: self.cut(name, mask) for name, mask in self.weights.items()}

    def as_masks(self) -> Plan:
        """The same plan with nothing cut: what reads units that leave, and skipped blocks, is held at zero instead."""
        weights = {name: mask.clone() for name, mask in self.weights.items()}
        for group_id, mask in self.keep.items():
            group = self.graph[group_id]
            for member in group.of_role("consume"):
                whole = weights.setdefault(member.param, torch.ones(self.graph.shapes[member.param], dtype=torch.bool))
                whole.index_fill_(member.axis, member.entries(group.units)[~mask].flatten(), False)
        for name in self.graph.vanished(self.keep) & set(self.graph.parameters):
            weights[name] = torch.zeros(self.graph.shapes[name], dtype=torch.bool)
        return Plan({}, self.graph, self.made_by, weights)

    def compose(self, later: Plan) -> Plan:
        """The one plan that does what this plan and then `later` do.

        Args:
            later: a plan traced from, and so in the coordinates of, the model this plan leaves.

        Raises:
            PlanError: `later` speaks of another model.
        """
        graph = self.graph
        if not graph.groups and graph.model_id == later.graph.model_id:
            graph = later.graph  # a plan of weights alone cuts nothing, and the later one may know what can be cut
        # Code that only the later cut made fail: on the dense model an open size is the same as one written out.
        more = {name: all_of for name, all_of in later.graph.openings.items() if name not in graph.openings}
        graph = replace(graph, openings={**graph.openings, **more}) if more else graph
        before = Plan(self.keep, graph, self.made_by, self.weights)
        keep = {name: mask.clone() for name, mask in self.keep.items()}
        for name, mask in later.keep.items():
            if name not in graph and later.graph[name].kind == "block":
                raise PlanError(
                    f"cannot compose: the later plan skips block {name!r}, which this plan's graph was traced without; "
                    "trace the dense model with depth=True and plan again"
                )
            mine = before.mask(name).clone()
            if int(mine.sum()) != mask.numel():
                raise PlanError(
                    f"cannot compose: this plan leaves {int(mine.sum())} units of group {name!r}, "
                    f"the later plan speaks of {mask.numel()}; trace the pruned model and plan again"
                )
            mine[mine.nonzero().flatten()[~mask]] = False
            keep[name] = mine
        keep = graph.closed(keep)
        left, expected = graph.sizes(keep), later.graph.sizes(later.keep)
        for name in graph.parameters:
            if expected.get(name, (0,)) != left[name]:  # what this plan skips, the later one does not know
                raise PlanError(
                    f"cannot compose: {name!r} would be left with shape {left[name]}, the later plan "
                    f"leaves {expected.get(name)}; it was made for another model"
                )
        weights = {name: mask.clone() for name, mask in self.weights.items()}
        for name, mask in later.weights.items():
            whole = weights.setdefault(name, torch.ones(graph.shapes[name], dtype=torch.bool))
            there = before.left(name)
            whole[there] &= mask.flatten()  # cutting keeps the order of what it leaves
        return Plan(keep, graph, {"composed": [dict(self.made_by), dict(later.made_by)]}, weights)

    def diff(self, other: Plan) -> dict[str, dict[str, list[int]]]:
        """Units per group, and weights per tensor, that only one of two plans of the same model keeps.

        Returns:
            `{group or parameter: {"only_here": [...], "only_there": [...]}}`, what agrees left out. Weights are
            entries of the flattened original tensor, and are compared where both plans leave the tensor's units.

        Raises:
            PlanError: the plans speak of different models.
        """
        if self.graph.model_id != other.graph.model_id:
            raise PlanError(f"cannot compare plans of two models ({self.graph.model_id} and {other.graph.model_id})")
        out = {}
        units = {group.id: group.units for plan in (self, other) for group in plan.graph.groups}
        for name, count in units.items():
            whole = torch.ones(count, dtype=torch.bool)
            a, b = (plan.keep.get(name, whole) for plan in (self, other))
            if not torch.equal(a, b):
                out[name] = _apart(a, b)
        for name in dict.fromkeys([*self.weights, *other.weights]):
            both = self.left(name) & other.left(name)
            whole = torch.ones_like(both)
            a, b = (plan.weights.get(name, whole) & both for plan in (self, other))
            if not torch.equal(a, b):
                out[name] = _apart(a.flatten(), b.flatten())
        return out

    def summary(self) -> list[dict[str, Any]]:
        """One row a group: id, kind, units before and kept; and one a masked tensor: weights left and not zero."""
        rows = [
            {"group": g.id, "kind": g.kind, "units": g.units, "kept": int(self.mask(g.id).sum())}
            for g in self.graph.groups
        ]
        sizes = self.graph.sizes(self.keep)
        for name, mask in self.weights.items():
            left = math.prod(sizes[name])
            rows.append({"group": name, "kind": "weight", "units": left, "kept": left - int((~mask).sum())})
        return rows

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form; `from_json` is its inverse."""
        return {
            "format": PLAN_FORMAT,
            "made_by": dict(self.made_by),
            "keep": {name: mask.nonzero().flatten().tolist() for name, mask in self.keep.items()},
            "weights": {name: _packed(mask) for name, mask in self.weights.items()},
            "graph": self.graph.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from `to_json`.

        Raises:
            PlanError: the data is of another format, incomplete, or names units that do not exist.
        """
        check_format(data, PLAN_FORMAT, "plan", older=(1,))
        try:
            graph = Graph.from_json(data["graph"])
            keep = {}
            for name, units in data["keep"].items():
                mask = torch.zeros(graph[name].units, dtype=torch.bool)
                mask[torch.tensor([whole(unit) for unit in units], dtype=torch.int64)] = True
                keep[name] = mask
            written = data["weights"] if data["format"] != 1 else {}
            weights = {name: _unpacked(name, bits, graph) for name, bits in written.items()}
            return cls(keep, graph, dict(data["made_by"]), weights)
        except PlanError:
            raise
        except DAMAGED as error:
            raise PlanError(f"the plan is incomplete or damaged ({error!r}); plan again") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON."""
        write_text(path, json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan written by `save`."""
        return cls.from_json(read_json(path, "plan"))


def _apart(a: Tensor, b: Tensor) -> dict[str, list[int]]:
    return {
        "only_here": (a & ~b).nonzero().flatten().tolist(),
        "only_there": (b & ~a).nonzero().flatten().tolist(),
    }


def drift_of(made_by: Mapping[str, Any]) -> Any:
    """KL in nats from the dense model that a plan says of itself: measured and its optimism, or else predicted."""
    measured = made_by.get("measured_kl")
    return made_by.get("predicted_kl") if measured is None else measured + made_by.get("optimism", 0.0)


def _packed(mask: Tensor) -> str:
    """Eight entries a byte, first entry in the highest bit, in base64."""
    return base64.b64encode(np.packbits(mask.flatten().numpy()).tobytes()).decode("ascii")


def _unpacked(name: str, bits: str, graph: Graph) -> Tensor:
    shape = graph.shapes[name]
    count = math.prod(shape)
    try:
        found = np.frombuffer(base64.b64decode(bits, validate=True), dtype=np.uint8)
    except ValueError as error:
        raise PlanError(f"the plan's weights of {name!r} are no base64 ({error}); plan again") from error
    if len(found) != -(-count // 8):
        raise PlanError(f"the plan holds {len(found)} bytes for the {count} weights of {name!r}; plan again")
    return torch.from_numpy(np.unpackbits(found, count=count).astype(bool)).reshape(shape)


def attach(model: nn.Module, plan: Plan | None) -> None:
    """Let a pruned model carry its plan, so that it can be saved and recovered by name; None takes it away."""
    object.__setattr__(model, _ATTRIBUTE, plan)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan a pruned model carries; None for a dense model."""
    found = model.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Plan) else None
