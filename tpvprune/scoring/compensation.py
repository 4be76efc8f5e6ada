"""What of a channel the layer that reads it cannot make up for from its other inputs.

With a refit to follow, removing a channel costs no more than its residual after the best linear prediction from the
same layer's other inputs: `r = P (a - mean) / diag(P)`, `P = (Cov(a) + ridge)^-1`. Scoring the residual in place of the
channel is Optimal Brain Surgeon (Hassibi 1993) in TPV's metric.

That is what a channel costs alone. Of ten channels that any nine make up for, one leaves for nothing and the others do
not: what makes up for a channel leaves too. So the units of a group are taken away one after the other, the cheapest
first, and each costs what it costs when its turn comes: the part of the layer's outputs that only it can give then,
with the weights that have made up for those before it, times what its score alone says of such a part (`left_later`).

Samples that a covariance is made of are predicted too well by it: with no more of them than channels, perfectly. So
the samples are dealt out to two halves, and each half's residuals are those of the other half's covariance.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch
from tpvprune.errors import NonFiniteError, UnseenError
from tpvprune.members import Member
from tpvprune.patches import channel_axis
from tpvprune.scoring.moments import FULL, WIDEST, Moments, damped_inverse, together, watch
from tpvprune.scoring.raw import raw_users
from tpvprune.types import Graph

logger = logging.getLogger(__name__)
AT_ONCE = 32  # of so many units that are left, one leaves in a step
DOUBT = 0.01  # share of a unit's whole output below which its own score says little of what a part of it costs


@dataclass(frozen=True)
class Residual:
    """The map from a layer's input to its residuals: `(input - mean) @ matrix`, channels last.

    Args:
        means: `(2, channels)`, of the covariance that the samples with even and with odd numbers are held against.
        matrices: `(2, channels, channels)`, likewise.
        ridge: what was added to the covariances' diagonals, as a share of its mean.
        precisions: inverse of the covariance, ridge added, of all samples, and of those with even and with odd numbers,
            `(channels, channels)`; each with what was added to the covariance's diagonal.
    """

    means: Tensor
    matrices: Tensor
    ridge: float
    precisions: tuple[tuple[Tensor, float], ...]

    def __call__(self, value: Tensor, axis: int, numbers: range) -> Tensor:
        """Residuals of `value`, shaped as it is.

        Args:
            value: a layer's input, samples outermost.
            axis: of its channels.
            numbers: of the samples.
        """
        value = value if value.dtype == torch.float64 else value.float()
        found = torch.empty_like(value)
        with torch.autocast(value.device.type, enabled=False):
            for half in (0, 1):
                rows = _of_half(value.movedim(axis, -1), numbers, half)
                left = (rows - self.means[half].to(rows)) @ self.matrices[half].to(rows)
                _of_half(found.movedim(axis, -1), numbers, half).copy_(left)
        return found


def _of_half(value: Tensor, numbers: range, half: int) -> Tensor:
    """The rows of a layer's input, of which each sample may have several, that belong to a half; a view."""
    each = value.unflatten(0, (len(numbers), -1)) if len(value) != len(numbers) else value.unsqueeze(1)
    return each[(half + numbers.start) % 2 :: 2]


def residuals(model: nn.Module, batches: Iterable[Batch], graph: Graph, ridges: Sequence[float]) -> dict[str, Residual]:
    """The residual map of the layers that read units of the graph, from one forward pass.

    A layer that reads more than `WIDEST` channels gets none: what it is given counts whole, and its units as if each
    were the only one to leave.

    Args:
        model: the model scored.
        batches: inputs; the first `SAMPLES` are looked at.
        graph: of channels and heads.
        ridges: what may be added to a covariance's diagonal, as a share of its mean; per layer the one that leaves
            least of the samples it was not made of is taken.

    Raises:
        UnseenError: a layer has the samples of a batch in an order of its own.
    """
    channels = _channels(model, graph)
    wide = [name for name, count in channels.items() if count > WIDEST]
    if wide:
        logger.warning("%s: too many inputs to ask what makes up for each; it counts whole there", ", ".join(wide))
    moments = {name: (Moments(), Moments()) for name in channels if name not in wide}

    def see(name: str, module: nn.Module, value: Tensor, numbers: range) -> None:
        value = value.movedim(channel_axis(module), -1)
        for half, held in enumerate(moments[name]):
            held.add(_of_half(value, numbers, half).flatten(0, -2))

    held = [half for pair in moments.values() for half in pair]
    unseen: UnseenError | None = None
    try:
        watch(model, batches, [(name, model.get_submodule(name)) for name in moments], see, held, apart=True)
    except UnseenError as error:
        unseen = error
    even, odd = (together({name: pair[half] for name, pair in moments.items()}, model) for half in (0, 1))
    if unseen is not None:  # not before: other processes wait for the sums of this one
        raise unseen
    moments = {name: (even[name], odd[name]) for name in moments}
    return {
        name: _residual(model, graph, name, *halves, ridges)
        for name, halves in moments.items()
        if halves[0].rows + halves[1].rows
    }


def _channels(model: nn.Module, graph: Graph) -> dict[str, int]:
    """How many channels each module that reads units by one weight reads."""
    raw = [layer for (_, layer), params in raw_users(model, graph, "consume").items() if len(params) > 1]
    members = [m for group in graph.groups for m in group.of_role("consume") if m.layer not in raw]
    return {m.layer: graph.shapes[m.param][m.axis] * _groups(model.get_submodule(m.layer)) for m in members}


def _residual(
    model: nn.Module, graph: Graph, layer: str, even: Moments, odd: Moments, ridges: Sequence[float]
) -> Residual:
    # One half alone has nothing but itself to be held against.
    halves = [(even if even.rows else odd).covariance(), (odd if odd.rows else even).covariance()]
    best: tuple[float, Residual] | None = None
    for ridge in ridges:
        precisions = [_precision(model, layer, covariance, ridge) for _, covariance in halves]
        # Each half's residuals are those of the other half's covariance.
        matrices = [_matrix(model, graph, layer, precision) for precision, _ in reversed(precisions)]
        left = 0.0
        for (mean, covariance), (other, _), matrix in zip(halves, reversed(halves), matrices, strict=True):
            off = ((mean - other) @ matrix).square().sum()
            left += float(((covariance @ matrix) * matrix).sum() + off)
        if best is None or left < best[0]:
            means = torch.stack([mean for mean, _ in reversed(halves)])
            whole = _precision(model, layer, (even + odd).covariance()[1], ridge)
            # What residuals are computed in, and halves told by, has room for twice as much in single precision.
            kind = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
            parts = ((precision.to(kind), damping) for precision, damping in precisions)
            best = left, Residual(means, torch.stack(matrices).to(kind), ridge, (whole, *parts))
    assert best is not None
    return best[1]


def _precision(model: nn.Module, layer: str, covariance: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Inverse of a covariance with a ridge, and what that adds to the diagonal."""
    channels = len(covariance)
    width = _width(model, layer, channels)
    if width < channels:  # an output of a grouped convolution reads the channels of its own group alone
        own = torch.arange(channels, device=covariance.device) // width
        covariance = covariance * (own.unsqueeze(1) == own)
    try:
        return damped_inverse(covariance, ridge)
    except ArithmeticError:
        raise NonFiniteError.of_layer(layer) from None


def _groups(layer: Any) -> int:
    return int(getattr(layer, "groups", 1))


def _width(model: nn.Module, layer: str, channels: int) -> int:
    """Input channels that an output of a layer reads."""
    return channels // _groups(model.get_submodule(layer))


def _matrix(model: nn.Module, graph: Graph, layer: str, precision: Tensor) -> Tensor:
    matrix = precision / precision.diagonal()
    for block in _blocks(graph, layer, len(precision), _width(model, layer, len(precision))):
        inside = precision[block][:, block]
        matrix[:, block] = torch.linalg.solve(inside, precision[block]).mT
    return matrix


def _blocks(graph: Graph, layer: str, channels: int, width: int) -> Iterator[Tensor]:
    """Input channels of each unit that holds more than one of a layer's input, within one group of its channels."""
    for group in graph.groups:
        for member in group.of_role("consume"):
            if member.layer == layer and member.width() > 1:
                for unit in _columns(member, group.units, channels, width):
                    yield from unit


def _columns(member: Member, units: int, channels: int, width: int) -> Tensor:
    """Channels of a layer's input that units are, `(units, groups of the layer that read one, channels)`."""
    entries = member.entries(units).cpu()
    repeats = channels // width if int(entries.max()) < width else 1
    return entries.unsqueeze(1) + width * torch.arange(repeats).unsqueeze(1)


class _Reads:
    """A layer that reads units: what its inputs tell of each other and its weights on them, as units leave."""

    def __init__(self, model: nn.Module, member: Member, units: int, precision: Tensor, damping: float) -> None:
        channels = len(precision)
        width = _width(model, member.layer, channels)
        self.precision, self.damping = precision.to("cpu", torch.float64, copy=True), damping
        self.here = torch.ones(channels, dtype=torch.bool)
        self.columns = _columns(member, units, channels, width).flatten(1)
        self.weight = _by_channel(model.get_parameter(member.param), member.axis, channels)

    def energy(self, units: Tensor) -> Tensor:
        """Variance of what only each unit gives to the layer's outputs, given those that are left, `(units,)`."""
        columns = self.columns[units]
        weight = self.weight[:, columns].permute(1, 2, 0)
        inside = self.precision[columns.unsqueeze(2), columns.unsqueeze(1)]
        # Residuals `R = P_.u inv(P_uu)` of `C = inv(P) - damping`: `R^T C R = inv(P_uu) - damping R^T R`.
        if columns.shape[1] == 1:
            own = inside.flatten()
            shares = self.precision.square().sum(0)[columns.flatten()] / own.square()
            return weight.square().sum((1, 2)) * (1 / own - self.damping * shares).clamp(min=0)
        solved = torch.linalg.solve(inside, weight)
        spread = self.precision[:, columns].permute(1, 0, 2) @ solved
        return ((weight * solved).sum((1, 2)) - self.damping * spread.square().sum((1, 2))).clamp(min=0)

    def in_order(self, units: Tensor) -> Tensor:
        """`energy` of each of some units once those before it have left, `(units,)`."""
        columns = self.columns[units]
        flat, wide = columns.flatten(), columns.shape[1]
        factor = torch.linalg.cholesky(self.precision[flat][:, flat])
        # Eliminated in this order, each column has its weights and its residual over the root of its pivot here.
        own = torch.linalg.solve_triangular(factor, self.weight[:, flat].mT, upper=False).unflatten(0, (-1, wide))
        along = torch.linalg.solve_triangular(factor, self.precision[flat], upper=False).unflatten(0, (-1, wide))
        if wide == 1:
            spread = own.square().sum((1, 2)) * along.square().sum((1, 2))
        else:
            spread = (along.mT @ own).square().sum((1, 2))
        return (own.square().sum((1, 2)) - self.damping * spread).clamp(min=0)

    def whole(self) -> Tensor:
        """Variance of all that each unit gives, `(units,)`, before any has left."""
        eye = torch.eye(len(self.precision), dtype=self.precision.dtype)
        covariance = torch.linalg.inv(self.precision) - self.damping * eye
        inside = covariance[self.columns.unsqueeze(2), self.columns.unsqueeze(1)]
        weight = self.weight[:, self.columns].permute(1, 2, 0)
        return (weight * (inside @ weight)).sum((1, 2)).clamp(min=0)

    def remove(self, units: Tensor) -> None:
        """Take units away: the others' weights make up for them as well as they can."""
        gone = self.columns[units].flatten()
        taken = self.precision[gone]
        share = torch.linalg.solve(taken[:, gone], taken)
        # Nothing but rounding is left of what has gone.
        self.weight.addmm_(self.weight[:, gone], share, alpha=-1)
        self.precision.addmm_(taken.mT, share, alpha=-1)
        self.here[gone] = False
        rest = self.here.nonzero().flatten()
        if len(rest) <= FULL * len(self.here):
            self.weight, self.precision = self.weight[:, rest], self.precision[rest][:, rest]
            self.columns = (self.here.cumsum(0) - 1)[self.columns]  # of units that are gone it means nothing
            self.here = torch.ones(len(rest), dtype=torch.bool)


def _by_channel(weight: Tensor, axis: int, channels: int) -> Tensor:
    """A weight that reads along an axis, with a column for each input channel, `(outputs and taps, channels)`."""
    weight = weight.detach().double().cpu().movedim(axis, -1)
    groups = channels // weight.shape[-1]
    rows = weight.reshape(groups, -1, weight.shape[-1])
    found = rows.new_zeros(groups, rows.shape[1], groups, rows.shape[2])
    for group in range(groups):
        found[group, :, group] = rows[group]
    return found.reshape(-1, channels)


def left_later(
    model: nn.Module,
    graph: Graph,
    maps: Mapping[str, Residual],
    alone: Mapping[str, Tensor],
    half: int | None = None,
) -> dict[str, Tensor]:
    """What units cost when their turn comes, `(units,)` per group, none less than what was cheapest before.

    Args:
        model: the model scored.
        graph: of channels and heads.
        maps: from `residuals`.
        alone: what each costs while all others are there, `(units,)` per group.
        half: of the samples with even (0) or odd (1) numbers alone, which `alone` is of too.
    """
    of = 0 if half is None else half + 1
    found, channels = {}, _channels(model, graph)
    for group in graph.groups:
        members = [member for member in group.of_role("consume") if member.layer in maps]
        if any(channels.get(member.layer, WIDEST + 1) > WIDEST for member in group.of_role("consume")):
            members = []  # of what such a layer loses nothing is known but what each unit costs alone
        reads = [_Reads(model, member, group.units, *maps[member.layer].precisions[of]) for member in members]
        score = alone[group.id].double().cpu()
        found[group.id] = (_in_turn(score, reads) if reads else score).to(alone[group.id])
    return found


def _in_turn(alone: Tensor, reads: Sequence[_Reads]) -> Tensor:
    result, left, reached = alone.clone(), torch.arange(len(alone)), 0.0

    def energy() -> Tensor:
        return torch.stack([read.energy(left) for read in reads]).sum(0)

    first, doubt = energy(), DOUBT * torch.stack([read.whole() for read in reads]).sum(0)
    price = alone.sum() / first.sum().clamp(min=1e-300)
    prices = (alone + doubt * price) / (first + doubt).clamp(min=1e-300)
    while len(left):
        cost = prices[left] * energy()
        order = cost.argsort(stable=True)[: max(1, len(left) // AT_ONCE)]
        # Of two copies among them one is free, not both.
        later = torch.stack([read.in_order(left[order]) for read in reads]).sum(0) * prices[left[order]]
        result[left[order]] = later.clamp(min=reached)
        reached = max(reached, float(cost[order[-1]]))
        if len(order) < len(left):
            for read in reads:
                read.remove(left[order])
        stay = torch.ones(len(left), dtype=torch.bool)
        stay[order] = False
        left = left[stay]
    return result
