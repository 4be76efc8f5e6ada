"""What single weights cost once the other weights of their row make up for them, for masks that are refitted.

Optimal Brain Surgeon (Hassibi 1993) row by row of a layer's weight, as in Optimal Brain Compression (Frantar 2022,
arXiv 2208.11580), in TPV's metric. Where a row `w` reads inputs of covariance `C`, its output moves by a variance of
`w_j^2 / inv(C)_jj` when weight j leaves and the others are refitted, and what an output's variance is worth is read off
the row's scores without compensation. The cheapest weight leaves first, the others take over, and the next is scored
by what is left then. Blocks that lie in the same rows compete in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch
from tpvprune.budget import n_of_m
from tpvprune.errors import InputError, NonFiniteError
from tpvprune.members import Group
from tpvprune.patches import patches, some_of
from tpvprune.scoring.gradients import Captured
from tpvprune.scoring.moments import FULL, WIDEST, Moments, damped_inverse, together, watch
from tpvprune.types import Graph

POSITIONS = 64  # of each sample that inputs are looked at
COLUMNS = 1 << 23  # numbers of unfolded inputs that are looked at together
AT_ONCE = 16  # of so many units of a row that are left, one leaves in a step
# Rows x inputs x (inputs that make up for each other)^2 of a layer, at most: no more than about a minute of a core.
# Where there are more, or inputs beyond `WIDEST`, they are cut into parts, each of which makes up for itself.
WORK = 2 * 10**11
RIDGE = 1e-2  # that of the refit, as a share of the inputs' mean variance
HELD = 1 << 24  # entries of inverse covariances, one a row, that are held together


@dataclass(frozen=True)
class Part:
    """Neighbouring inputs of a layer's weight that make up for each other, and what they were given.

    Args:
        inputs: which of them.
        moments: `(groups of the layer, inputs)`.
    """

    inputs: slice
    moments: Moments


def parts_of_inputs(
    model: nn.Module, batches: Iterable[Batch], graph: Graph, others: bool | str
) -> dict[str, list[Part]]:
    """Per layer, what its weight reads, from one forward pass.

    Args:
        model: the model scored.
        batches: its inputs; a process among several may have none.
        graph: from `weight_graph`.
        others: what makes up for a unit, see `rows_in_turn`.

    Raises:
        ModelError: a weight is of no linear layer or convolution.
        InputError: units are no blocks as `weight_graph` makes them, or cross the groups of a convolution; a pattern
            is given for blocks.
    """
    layers = {group.members[0].layer: group for group in graph.groups}
    users = Captured(model, list(layers), "leave its layer out of weight_graph, or compensated").users
    cuts = {name: _cuts(model.get_submodule(name), group, others) for name, group in layers.items()}
    moments = {f"{name}/{cut.start}": Moments() for name, own in cuts.items() for cut in own}

    def see(name: str, module: nn.Module, value: Tensor, numbers: range) -> None:
        entries = value[:1].numel() * math.prod(getattr(module, "kernel_size", ()))
        for rows in value.split(max(1, COLUMNS // max(1, entries))):
            columns = patches(module, rows if rows.dtype == torch.float64 else rows.float())
            columns = columns[..., some_of(columns.shape[3], POSITIONS)].permute(1, 0, 3, 2).flatten(1, 2)
            for cut in cuts[name]:
                moments[f"{name}/{cut.start}"].add(columns[..., cut])

    watch(model, batches, users, see, list(moments.values()), apart=False)
    moments = together(moments, model)
    return {name: [Part(cut, moments[f"{name}/{cut.start}"]) for cut in own] for name, own in cuts.items()}


def _cuts(layer: Any, group: Group, others: bool | str) -> list[slice]:
    count = int(getattr(layer, "groups", 1))
    inputs, outputs = layer.weight[0].numel(), len(layer.weight) // count
    high, wide = _block(group, len(layer.weight), inputs)
    if outputs % high:
        raise InputError(f"blocks of {group.id!r} cross the groups of its convolution; take blocks of fewer rows")
    if others not in (True, "alone") and (high, wide) != (1, 1):
        raise InputError(f"compensated={others!r} chooses among single weights, and {group.id!r} has blocks")
    places = _Places.of_weight(layer.weight, others)
    grain = wide if places is None else places.grain
    most = min(WIDEST, inputs if others == "alone" else max(1, math.isqrt(WORK // layer.weight.numel())))
    grains = inputs // grain
    number = min(grains, -(-inputs // most))
    ends = [grains * part // number * grain for part in range(number + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def rows_in_turn(
    model: nn.Module, graph: Graph, parts: Mapping[str, list[Part]], others: bool | str, alone: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What weights, or blocks of them, cost once the rest of their rows makes up for them, `(units,)` per group.

    Args:
        model: the model scored.
        graph: from `weight_graph`.
        parts: from `parts_of_inputs`.
        others: what makes up for a unit: True for what is left when its turn comes, the cheapest leaving first; the
            same by "N:M", first those that such a pattern takes; "alone" for all of the row.
        alone: what each costs without compensation.

    Raises:
        NonFiniteError: a layer is given NaN or infinity.
    """
    found = {}
    for group in graph.groups:
        name = group.members[0].layer
        score = alone[group.id]
        if parts[name][0].moments.rows:
            try:
                score = _of_layer(model.get_submodule(name), group, parts[name], others, score)
            except ArithmeticError:
                raise NonFiniteError.of_layer(name) from None
        found[group.id] = score.to(alone[group.id])
    return found


def _of_layer(layer: Any, group: Group, parts: Sequence[Part], others: bool | str, alone: Tensor) -> Tensor:
    count, inputs = int(getattr(layer, "groups", 1)), layer.weight[0].numel()
    high, wide = _block(group, len(layer.weight), inputs)
    weight = layer.weight.detach().double().reshape(count, -1, high, inputs)
    alone = alone.to(weight).reshape(count, -1, inputs // wide)
    kind = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    turns = others != "alone"
    places = _Places.of_weight(layer.weight, others)
    moved, costs = torch.zeros_like(alone[..., 0]), []
    for part in parts:
        own, (means, covariances) = part.inputs, part.moments.covariance()
        stripes = weight[..., own]
        eye = torch.eye(means.shape[1], dtype=means.dtype, device=means.device)
        precisions = []
        for number, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
            precision, damping = damped_inverse(covariance, RIDGE)
            precisions.append(precision.to(kind))
            # What a score says of an output: the score of removal, over the mean square of what is removed.
            inside = _inside(covariance + mean.unsqueeze(1) * mean + damping * eye, wide)
            apart = stripes[number].unflatten(2, (-1, wide))
            moved[number] += torch.einsum("shuw,uwv,shuv->s", apart, inside, apart)
        slots = None if places is None else places.of[own].to(means.device)
        room = 0 if places is None else places.room
        costs.append(_costs(stripes.to(kind), torch.stack(precisions), wide, turns, slots, room))
    price = alone.sum(2) / moved.clamp(min=1e-300)
    return (price.unsqueeze(2) * torch.cat(costs, 2)).flatten()


def _block(group: Group, rows: int, inputs: int) -> tuple[int, int]:
    """Rows and inputs of each unit of a weight."""
    index = group.members[0].index
    if index is None:
        return 1, 1
    high = int((index[0] // inputs).unique().numel())
    wide = index.shape[1] // high
    corners = torch.arange(rows * inputs).reshape(rows, inputs)[::high, ::wide].flatten()
    if not torch.equal(index[:, 0].cpu(), corners):
        raise InputError(f"the units of {group.id!r} are no blocks as weight_graph makes them")
    return high, wide


def _inside(matrix: Tensor, wide: int) -> Tensor:
    """The blocks on the diagonal of `(..., inputs, inputs)`, `(..., units, wide, wide)`."""
    apart = matrix.unflatten(-1, (-1, wide)).unflatten(-3, (-1, wide))
    return apart.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


@dataclass(frozen=True)
class _Places:
    """Where a pattern N:M chooses: of every M consecutive channels at one kernel position.

    Args:
        of: the place of each input, `(inputs,)`.
        room: how many inputs leave at each place.
        grain: inputs after which a row can be cut into parts.
    """

    of: Tensor
    room: int
    grain: int

    @classmethod
    def of_weight(cls, weight: Tensor, others: bool | str) -> _Places | None:
        """None without a pattern, and where M does not divide the channels."""
        if others in (True, "alone"):
            return None
        kept, of = n_of_m(str(others))
        channels, inputs = weight.shape[1], weight[0].numel()
        if channels % of:
            return None
        taps = inputs // channels
        number = torch.arange(inputs)
        return cls(number // (of * taps) * taps + number % taps, of - kept, of * taps)


def _costs(stripes: Tensor, precisions: Tensor, wide: int, turns: bool, places: Tensor | None, room: int) -> Tensor:
    """Variance that the outputs of each stripe lose with each unit, `(groups, stripes, units)`; see `_leaving`."""
    if not turns:
        return torch.stack([_cost(*pair, wide) for pair in zip(stripes, precisions.unsqueeze(1), strict=True)])
    most = max(1, HELD // precisions[0].numel())
    of = torch.arange(len(precisions), device=stripes.device).repeat_interleave(stripes.shape[1])
    chunks = zip(stripes.flatten(0, 1).split(most), of.split(most), strict=True)
    found = [_leaving(chunk, precisions[own], wide, places, room) for chunk, own in chunks]
    return torch.cat(found).unflatten(0, stripes.shape[:2])


def _cost(stripes: Tensor, precision: Tensor, wide: int) -> Tensor:
    """`w^T inv(P_uu) w` summed over the rows of a stripe, `(stripes, units)`."""
    if wide == 1:
        return stripes.square().sum(1) / precision.diagonal(dim1=1, dim2=2).clamp(min=1e-30)
    apart = stripes.unflatten(2, (-1, wide)).permute(0, 2, 3, 1)
    # Of units that have left, whose costs nobody reads, nothing but rounding is there to solve with.
    return (apart * torch.linalg.solve_ex(_inside(precision, wide), apart).result).sum((2, 3))


def _leaving(stripes: Tensor, precision: Tensor, wide: int, places: Tensor | None, room: int) -> Tensor:
    """What each unit costs when its turn comes, none less than what was cheapest before.

    Args:
        stripes: weights of rows that leave together, `(stripes, rows, inputs)`.
        precision: inverse covariances of the inputs of each, `(stripes, inputs, inputs)`, written to.
        wide: inputs of a unit.
        places: of each unit, `(units,)`, if some leave before others.
        room: how many units leave from each place before any other does.
    """
    count, units = len(stripes), stripes.shape[2] // wide
    result = stripes.new_zeros(count, units)
    left = torch.arange(units, device=stripes.device).expand(count, -1)
    here, remain = torch.ones_like(left, dtype=torch.bool), units
    reached, rooms = stripes.new_zeros(count, 1), None
    if places is not None:
        places = places - places.min()
        rooms = left.new_full((count, int(places.max()) + 1), room)
    while True:
        cost = _cost(stripes, precision, wide).masked_fill(~here, torch.inf)
        most = max(1, remain // AT_ONCE)
        turn = cost
        if places is not None and rooms is not None:
            turn = cost.masked_fill(~_first(cost, places[left], rooms), torch.inf)
            most = max(1, min(most, int(turn.isfinite().sum(1).min())))
        gone = turn.argsort(dim=1, stable=True)[:, :most]
        out = _columns(gone, wide)
        taken, weights = _rows(precision, out), _at(stripes, out)
        factor = _factor(_at(taken, out))
        # Of two copies among them one is free, not both: each is scored once those before it have left.
        own = torch.linalg.solve_triangular(factor, weights.mT, upper=False).square().sum(2)
        result.scatter_(1, left.gather(1, gone), torch.maximum(own.unflatten(1, (-1, wide)).sum(2), reached))
        remain -= most
        if not remain:
            return result
        reached = torch.maximum(reached, cost.gather(1, gone)[:, -1:])
        if places is not None and rooms is not None:
            rooms = rooms.scatter_add(1, places[left.gather(1, gone)], -torch.ones_like(gone))
            if not bool(rooms.any()):  # what a pattern takes is gone, and costs no more than all that stays
                reached, rooms = torch.maximum(reached, result.amax(1, keepdim=True)), None
        share = torch.cholesky_solve(taken, factor)
        stripes = torch.baddbmm(stripes, weights, share, alpha=-1)
        precision.baddbmm_(taken.mT, share, alpha=-1)
        here = here.scatter(1, gone, False)
        if remain <= FULL * here.shape[1]:  # to copy what is left costs more than the step does
            stay = here.nonzero()[:, 1].reshape(count, -1)
            rest = _columns(stay, wide)
            stripes, precision = _at(stripes, rest), _at(_rows(precision, rest), rest)
            left, here = left.gather(1, stay), torch.ones_like(stay, dtype=torch.bool)


def _factor(matrices: Tensor) -> Tensor:
    """Cholesky factors; of the diagonal alone where rounding left a matrix indefinite."""
    factor, failed = torch.linalg.cholesky_ex(matrices)
    apart = matrices.diagonal(dim1=1, dim2=2).clamp(min=1e-30).sqrt().diag_embed()
    return torch.where((failed > 0)[:, None, None], apart, factor)


def _first(cost: Tensor, places: Tensor, rooms: Tensor) -> Tensor:
    """Which units are the cheapest of a place that has room, one a place, bool `(stripes, units)`.

    Args:
        cost: `(stripes, units)`.
        places: of each unit, `(stripes, units)`.
        rooms: how many may still leave from each place, `(stripes, places)`.
    """
    least = torch.full_like(rooms, torch.inf, dtype=cost.dtype).scatter_reduce_(1, places, cost, "amin")
    number = torch.arange(cost.shape[1], device=cost.device).expand_as(cost)
    tied = torch.where(cost == least.gather(1, places), number, cost.shape[1])
    chosen = torch.full_like(rooms, cost.shape[1]).scatter_reduce_(1, places, tied, "amin")
    return (number == chosen.gather(1, places)) & (rooms.gather(1, places) > 0)


def _columns(units: Tensor, wide: int) -> Tensor:
    """Inputs of units, `(stripes, units * wide)`."""
    return (units.unsqueeze(2) * wide + torch.arange(wide, device=units.device)).flatten(1)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Columns of `(stripes, ..., ...)`, for each stripe its own."""
    return values.gather(2, index.unsqueeze(1).expand(-1, values.shape[1], -1))


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of `(stripes, ..., ...)`, for each stripe its own."""
    first = torch.arange(0, values[..., 0].numel(), values.shape[1], device=values.device)
    return values.flatten(0, 1).index_select(0, (index + first.unsqueeze(1)).flatten()).unflatten(0, index.shape)
