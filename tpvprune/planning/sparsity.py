"""Turn scores of single weights, or of blocks of them, into masks: any share of them, or N of every M.

N:M patterns (Mishra 2021, arXiv 2104.08378) run along the inputs of a weight: `in_features` of a linear layer, the
input channels of one kernel position of a convolution. That is how matrix kernels for sparse weights read them
(channels lie last there; a kernel position is one slice of the product), and how TensorRT takes a convolution for
2:4 sparse; the columns of an unfolded weight, channel by kernel position, would not do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tpvprune.budget import n_of_m
from tpvprune.errors import BudgetError, PlanError
from tpvprune.kinds import as_verb
from tpvprune.members import Group, Member
from tpvprune.plan import Plan
from tpvprune.planning.patterns import matching_groups
from tpvprune.planning.weights import TRANSPOSED
from tpvprune.scores import Scores
from tpvprune.types import Graph

logger = logging.getLogger(__name__)
Scope = Literal["global", "layer"]


@as_verb
def sparsify(
    scores: Scores,
    graph: Graph,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    scope: Scope = "global",
    after: Plan | None = None,
    protect: Sequence[str] = (),
) -> Plan:
    """Hold the weights with the least scores at zero: an exact share of them, or M - N of every M.

    Ties go by the name of the tensor, then by place in it, first ones first.

    Args:
        scores: from `score`, for this graph.
        graph: from `weight_graph`; its units are weights, or blocks that are zero as a whole.
        sparsity: share of the units that are zero, in (0, 1): `round(sparsity * units)` of them, no more and no less.
            0.5 if neither it nor a pattern is given.
        pattern: "2:4", "4:8" or any N:M instead: at most N of every M consecutive weights along a layer's inputs
            are kept. Layers whose inputs M does not divide stay dense and are listed in
            `made_by["stays_dense"]`, with the reason.
        scope: "global" compares the weights of all layers; "layer" gives every layer the same share.
        after: an earlier plan to add to. Scores and graph may be of its dense model, or of the model it leaves. What
            it cuts is not counted; what it holds at zero stays so, and counts.
        protect: tensors or layers that stay dense: exact name, glob, or `re:` regular expression.

    Returns:
        A plan with `weights`. After an earlier plan, the one plan of the dense model that does both.

    Raises:
        PlanError: the scores belong to another model or lack a group, units are channels (or blocks, for a pattern),
            `after` is of another model or touches a part of a block.
        BudgetError: sparsity, pattern or scope cannot be read or be met, or a name matches nothing.
        InputError: `protect` is a single string.
    """
    _check(scores, graph, sparsity, pattern, scope)
    protected = {group.id for name in protect for group in matching_groups(graph, name)}
    dense = dict.fromkeys(sorted(protected), "protected")
    grounds = _grounds(graph, after)
    parts = [_Part.of(group, graph, scores, ground) for group, ground in grounds if group.id not in protected]
    made_by: dict[str, Any] = {"planner": "sparsify", "criterion": scores.criterion, "samples": scores.samples}
    if pattern is not None:
        kept, of = n_of_m(pattern)
        dense |= {part.group.id: why for part in parts if (why := _unfit(part, of))}
        chosen = _chosen(parts, dense)
        for part in chosen:
            part.keep_of(kept, of)
        made_by |= {"pattern": pattern, "asked": {"sparsity": 1 - kept / of}}
    else:
        share = 0.5 if sparsity is None else sparsity
        chosen = _chosen(parts, dense)
        for rivals in [chosen] if scope == "global" else [[part] for part in chosen]:
            _zero_least(rivals, share)
        made_by |= {"scope": scope, "asked": {"sparsity": share}}
    emptied = [part.group.id for part in chosen if not bool(part.mask[part.ground.left].any())]
    if emptied:
        logger.warning("no weight is left of %s; protect them, or choose scope='layer'", ", ".join(emptied))
    made_by |= {"stays_dense": dense, "got": {"sparsity": _got(chosen)}}
    weights = {part.member.param: part.mask for part in chosen}
    if after is None:
        return Plan({}, graph, made_by, weights)
    if after.graph.model_id != graph.model_id:
        return after.compose(Plan({}, graph, made_by, weights))
    together = {"composed": [dict(after.made_by), made_by]}
    return Plan(after.keep, after.graph, together, {**after.weights, **weights})


def _check(scores: Scores, graph: Graph, sparsity: float | None, pattern: str | None, scope: str) -> None:
    if scores.model_id != graph.model_id:
        raise PlanError(f"the scores are of model {scores.model_id}, the graph of {graph.model_id}; score again")
    for group in graph.groups:
        if group.kind != "weight" or len(group.members) != 1 or group.members[0].dim is not None:
            raise PlanError(f"the units of {group.id!r} are no single weights; give a graph from weight_graph()")
        if group.id not in scores.values or len(scores.values[group.id]) != group.units:
            raise PlanError(f"the scores lack group {group.id!r} with its {group.units} units; score again")
    if scope not in ("global", "layer"):
        raise BudgetError(f"scope={scope!r} must be 'global' or 'layer'")
    if sparsity is not None and not (isinstance(sparsity, (int, float)) and 0 < sparsity < 1):
        raise BudgetError(f"sparsity={sparsity!r} must lie between 0 and 1")
    if sparsity is not None and pattern is not None:
        raise BudgetError(f"sparsity={sparsity} and pattern={pattern!r} both say how much stays; give one")


@dataclass(frozen=True, eq=False)
class _Ground:
    """Where an earlier plan has been: of one tensor, bool masks of its shape."""

    left: Tensor  # not cut
    free: Tensor  # not held at zero; True where it is cut


def _grounds(graph: Graph, after: Plan | None) -> list[tuple[Group, _Ground]]:
    """Groups by name, each with what an earlier plan says of its tensor, in the coordinates of the graph.

    Tensors that leave with a block are none of them.
    """
    groups = sorted(graph.groups, key=lambda group: group.id)
    shapes = [graph.shapes[group.members[0].param] for group in groups]
    whole = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
    if after is None:
        return [(group, _Ground(ones, ones)) for group, ones in zip(groups, whole, strict=True)]
    names = [group.members[0].param for group in groups]
    if after.graph.model_id == graph.model_id:
        skipped = after.graph.vanished(after.keep)
        return [
            (group, _Ground(after.left(name), after.weights.get(name, ones)))
            for group, name, ones in zip(groups, names, whole, strict=True)
            if name not in skipped
        ]
    sizes, masks = after.graph.sizes(after.keep), after.weight_masks()
    wrong = next((name for name in graph.parameters if sizes.get(name) != graph.shapes[name]), None)
    if wrong is not None:
        raise PlanError(
            f"the graph is neither of the dense model of `after` nor of the one it leaves: {wrong!r} is "
            f"{graph.shapes[wrong]}, `after` leaves {sizes.get(wrong)}; score the model that apply() made"
        )
    return [
        (group, _Ground(ones, masks.get(name, ones))) for group, name, ones in zip(groups, names, whole, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class _Part:
    """One tensor while its mask is made."""

    group: Group
    member: Member
    ground: _Ground
    mask: Tensor  # of the tensor's shape; what is zero so far
    counts: Tensor  # units that are there at all, `(units,)`
    values: Tensor  # their scores, least first to go; minus infinity where a unit is zero already, `(counted,)`

    @classmethod
    def of(cls, group: Group, graph: Graph, scores: Scores, ground: _Ground) -> _Part:
        member = group.members[0]
        left, zero = (_by_unit(t, member) for t in (ground.left, ground.left & ~ground.free))
        some, every = left.any(1), left.all(1)
        if not torch.equal(some, every) or not torch.equal(zero.any(1), zero.all(1)):
            raise PlanError(
                f"`after` cuts or masks blocks of {member.param!r} in part; score blocks of the model that it leaves"
            )
        values = scores.values[group.id].cpu().double()
        values = torch.where(zero.all(1), -torch.inf, values)[some]
        return cls(group, member, ground, ground.free.clone(), some, values)

    def zero(self, gone: Tensor) -> None:
        """Hold units at zero; `gone` is a bool mask over those that count."""
        units = self.counts.nonzero().flatten()[gone]
        self.mask.view(-1)[units if self.member.index is None else self.member.index[units].flatten()] = False

    def keep_of(self, kept: int, of: int) -> None:
        """Keep N of every M along the inputs."""
        sizes = [int(lines.sum()) for lines in _axes(self.ground.left)]
        rows = self.values.reshape(sizes).movedim(1, -1)
        order = rows.reshape(-1, of).argsort(dim=1, stable=True)
        gone = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, : of - kept], True)
        self.zero(gone.reshape(rows.shape).movedim(-1, 1).flatten())


def _axes(left: Tensor) -> list[Tensor]:
    """Per dimension, which of its entries are left anywhere: units leave in whole slices."""
    return [left.movedim(dim, 0).flatten(1).any(1) for dim in range(left.ndim)]


def _by_unit(flags: Tensor, member: Member) -> Tensor:
    flat = flags.flatten()
    return flat.unsqueeze(1) if member.index is None else flat[member.index]


def _unfit(part: _Part, of: int) -> str | None:
    """Why a tensor cannot have a pattern of M."""
    if part.member.index is not None:
        raise PlanError(f"a pattern chooses among single weights, and the units of {part.group.id!r} are blocks")
    if TRANSPOSED in part.group.signature:
        return "transposed convolutions have no kernels for patterns"
    inputs = int(_axes(part.ground.left)[1].sum())
    return f"{of} does not divide its {inputs} inputs" if inputs % of else None


def _chosen(parts: list[_Part], dense: Mapping[str, str]) -> list[_Part]:
    chosen = [part for part in parts if part.group.id not in dense]
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
        raise BudgetError(f"no weight may be zero ({why}); protect less or choose another pattern")
    return chosen


def _zero_least(parts: list[_Part], share: float) -> None:
    """Hold the exact share of the units of some tensors at zero.

    Raises:
        BudgetError: more of them are zero already.
    """
    values = torch.cat([part.values for part in parts])
    count = round(share * len(values))
    already = int((values == -torch.inf).sum())
    if already > count:
        named = parts[0].group.id if len(parts) == 1 else "the model"
        raise BudgetError(
            f"sparsity={share:g} of {named} is {count:,} of {len(values):,} units, and `after` holds {already:,} at "
            "zero already; ask for more"
        )
    if count == 0:
        return
    threshold = values.kthvalue(count).values
    gone = values < threshold
    ties = (values == threshold).nonzero().flatten()
    gone[ties[: count - int(gone.sum())]] = True
    for part, own in zip(parts, gone.split([len(part.values) for part in parts]), strict=True):
        part.zero(own)


def _got(parts: list[_Part]) -> float:
    left = sum(int(part.ground.left.sum()) for part in parts)
    zeros = sum(int((part.ground.left & ~part.mask).sum()) for part in parts)
    return zeros / left
