"""What stays: a plan is keep-masks in the coordinates of the original, dense model.

Because every plan of a model speaks the same coordinates, plans are free of order, can be composed,
compared, and applied without tracing again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.errors import PlanError
from tpvprune.files import write_text
from tpvprune.types import Graph, check_format, read_json

PLAN_FORMAT = 1
_ATTRIBUTE = "_tpvprune_plan"


@dataclass(frozen=True, eq=False)
class Plan:
    """Which units of each group stay.

    Attributes:
        keep: bool mask `(units,)` per group id; a group that is missing stays whole. What lies in a skipped block is
            gone with it, whatever was asked of it.
        graph: the graph of the dense model the masks speak of.
        made_by: how the plan came about, JSON-ready.
    """

    keep: Mapping[str, Tensor]
    graph: Graph
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, mask in self.keep.items():
            group = self.graph[name]
            if mask.dtype != torch.bool or mask.shape != (group.units,):
                raise PlanError(f"plan: group {name!r} needs a bool mask of shape ({group.units},)")
        object.__setattr__(self, "keep", self.graph.closed(self.keep))
        skipped = self.graph.vanished(self.keep)
        for name, mask in self.keep.items():
            group = self.graph[name]
            if not bool(mask.any()) and not all(m.param in skipped for m in group.members):
                raise PlanError(f"plan: group {name!r} would lose all {group.units} units; keep at least one")

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

    def kept_entries(self, param: str, dim: int) -> Tensor:
        """Sorted entries of one dimension of one original tensor that stay, `(kept,)`."""
        left = torch.ones(self.graph.shapes[param][dim], dtype=torch.bool)
        for group_id, mask in self.keep.items():
            group = self.graph[group_id]
            for member in group.members:
                if member.param == param and member.dim == dim:
                    left[member.entries(group.units)[~mask].flatten()] = False
        return left.nonzero().flatten()

    def compose(self, later: Plan) -> Plan:
        """The one plan that does what this plan and then `later` do.

        Args:
            later: a plan traced from, and so in the coordinates of, the model this plan leaves.

        Raises:
            PlanError: `later` speaks of another model.
        """
        keep = {name: mask.clone() for name, mask in self.keep.items()}
        for name, mask in later.keep.items():
            if name not in self.graph and later.graph[name].kind == "block":
                raise PlanError(
                    f"cannot compose: the later plan skips block {name!r}, which this plan's graph was traced without; "
                    "trace the dense model with depth=True and plan again"
                )
            mine = self.mask(name).clone()
            if int(mine.sum()) != mask.numel():
                raise PlanError(
                    f"cannot compose: this plan leaves {int(mine.sum())} units of group {name!r}, "
                    f"the later plan speaks of {mask.numel()}; trace the pruned model and plan again"
                )
            mine[mine.nonzero().flatten()[~mask]] = False
            keep[name] = mine
        composed = Plan(keep, self.graph, {"composed": [dict(self.made_by), dict(later.made_by)]})
        left, expected = composed.graph.sizes(composed.keep), later.graph.sizes(later.keep)
        for name in composed.graph.parameters:
            if expected.get(name, (0,)) != left[name]:  # what this plan skips, the later one does not know
                raise PlanError(
                    f"cannot compose: {name!r} would be left with shape {left[name]}, the later plan "
                    f"leaves {expected.get(name)}; it was made for another model"
                )
        return composed

    def diff(self, other: Plan) -> dict[str, dict[str, list[int]]]:
        """Units per group that only one of two plans of the same model keeps.

        Returns:
            `{group: {"only_here": [...], "only_there": [...]}}`, groups that agree left out.

        Raises:
            PlanError: the plans speak of different models.
        """
        if self.graph.model_id != other.graph.model_id:
            raise PlanError(f"cannot compare plans of two models ({self.graph.model_id} and {other.graph.model_id})")
        out = {}
        for group in self.graph.groups:
            a, b = self.mask(group.id), other.mask(group.id)
            if not torch.equal(a, b):
                out[group.id] = {
                    "only_here": (a & ~b).nonzero().flatten().tolist(),
                    "only_there": (b & ~a).nonzero().flatten().tolist(),
                }
        return out

    def summary(self) -> list[dict[str, Any]]:
        """One row a group: id, kind, units before and kept."""
        return [
            {"group": g.id, "kind": g.kind, "units": g.units, "kept": int(self.mask(g.id).sum())}
            for g in self.graph.groups
        ]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form; `from_json` is its inverse."""
        return {
            "format": PLAN_FORMAT,
            "made_by": dict(self.made_by),
            "keep": {name: mask.nonzero().flatten().tolist() for name, mask in self.keep.items()},
            "graph": self.graph.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from `to_json`.

        Raises:
            PlanError: the data is of another format, incomplete, or names units that do not exist.
        """
        check_format(data, PLAN_FORMAT, "plan")
        try:
            graph = Graph.from_json(data["graph"])
            keep = {}
            for name, units in data["keep"].items():
                mask = torch.zeros(graph[name].units, dtype=torch.bool)
                if any(unit < 0 for unit in units):
                    raise PlanError(f"the plan names unit {min(units)} of group {name!r}; plan again")
                mask[torch.tensor(units, dtype=torch.int64)] = True
                keep[name] = mask
            return cls(keep, graph, dict(data["made_by"]))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise PlanError(f"the plan is incomplete or damaged ({error!r}); plan again") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON."""
        write_text(path, json.dumps(self.to_json()))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan written by `save`."""
        return cls.from_json(read_json(path, "plan"))


def attach(model: nn.Module, plan: Plan) -> None:
    """Let a pruned model carry its plan, so that it can be saved and recovered by name."""
    object.__setattr__(model, _ATTRIBUTE, plan)


def plan_of(model: nn.Module) -> Plan | None:
    """The plan a pruned model carries; None for a dense model."""
    found = model.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Plan) else None
