"""How long layers take alone, at a grid of widths."""

from __future__ import annotations

import logging
from bisect import bisect_right
from dataclasses import dataclass
from itertools import product

import torch

from tpvprune.batches import Progress
from tpvprune.planning.narrow import Layer
from tpvprune.timing import Clock, milliseconds

logger = logging.getLogger(__name__)

ROUNDS = 7


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of one layer at a grid of widths; never less at a greater width.

    Attributes:
        sides: the one or two widths: a tensor's name and a dimension of it; none of a layer that leaves whole.
        widths: of each side, those that were timed, rising.
        ms: at every combination of them, the last side's widths running fastest.
    """

    sides: tuple[tuple[str, int], ...]
    widths: tuple[tuple[int, ...], ...]
    ms: tuple[float, ...]

    def at(self, *sizes: int) -> float:
        """Milliseconds at these sizes, by straight lines between those that were timed, and none beyond them."""
        total, corners = 0.0, [_between(grid, size) for grid, size in zip(self.widths, sizes, strict=True)]
        for corner in product(*corners):
            place, share = 0, 1.0
            for grid, (index, weight) in zip(self.widths, corner, strict=True):
                place, share = place * len(grid) + index, share * weight
            total += share * self.ms[place]
        return total

    def scaled(self, by: float, more: float = 0.0) -> LayerTimes:
        """These times `by` times, and `more` at full width that shrinks with the last side."""
        grid = self.widths[-1] if self.widths else (1,)
        ms = (by * taken + more * grid[i % len(grid)] / grid[-1] for i, taken in enumerate(self.ms))
        return LayerTimes(self.sides, self.widths, tuple(ms))


def _between(grid: tuple[int, ...], size: int) -> list[tuple[int, float]]:
    """The widths around a size, by number, and how much each counts."""
    if size <= grid[0]:
        return [(0, 1.0)]
    place = bisect_right(grid, size) - 1
    if size >= grid[-1] or grid[place] == size:
        return [(min(place, len(grid) - 1), 1.0)]
    share = (size - grid[place]) / (grid[place + 1] - grid[place])
    return [(place, 1 - share), (place + 1, share)]


@dataclass(frozen=True)
class Alone:
    """A layer's times alone, all of its calls together, and whether it is made of matrix products."""

    times: LayerTimes
    multiplies: bool


def times_alone(
    layers: tuple[Layer, ...], device: torch.device, *, clock: Clock, progress: Progress | None = None
) -> dict[str, Alone]:
    """Time layers on their own at a grid of widths; those that are alike are timed once.

    Args:
        layers: from `watch`.
        device: where they run.
        clock: what tells the time.
        progress: called as `progress("latency", layers_done, layers)`.

    Returns:
        By name; a layer that does not run at other widths is left out, with a warning in the log.
    """
    known: dict[str, tuple[float, ...] | None] = {}
    found: dict[str, Alone] = {}
    for done, layer in enumerate(layers, 1):
        grids = tuple(side.grid() for side in layer.sides)
        key = layer.alike()
        if key not in known:
            known[key] = _timed(layer, grids, device, clock)
        ms = known[key]
        if ms is not None:
            ms = tuple(layer.calls * taken for taken in ms)
            if layer.name in found:  # met with inputs of several sizes
                ms = tuple(a + b for a, b in zip(ms, found[layer.name].times.ms, strict=True))
            sides = tuple((side.tensor, side.dim) for side in layer.sides)
            found[layer.name] = Alone(LayerTimes(sides, grids, ms), layer.multiplies)
        if progress:
            progress("latency", done, len(layers))
    return found


def _timed(
    layer: Layer, grids: tuple[tuple[int, ...], ...], device: torch.device, clock: Clock
) -> tuple[float, ...] | None:
    """Milliseconds at every combination of widths; None for a layer that does not run at other widths."""
    taken: list[float] = []
    for first in product(*grids[:1]):  # a row at a time, so that few copies of a large layer are held
        try:
            runs = {str(rest): layer.at((*first, *rest)) for rest in product(*grids[1:])}
            taken += milliseconds(runs, device, rounds=ROUNDS, clock=clock).values()
        except Exception as error:  # whatever a module of unknown kind may raise
            logger.warning("%s cannot be timed at other widths (%s); its time counts as fixed", layer.name, error)
            return None
    return rising(taken, tuple(map(len, grids)))


def rising(ms: list[float], shape: tuple[int, ...]) -> tuple[float, ...]:
    """Times of which none falls where a width grows, so that no saving of a plan is negative.

    Each is the mean of the greatest at its widths or less and the least at its widths or more: what was measured,
    where that rises already.

    Args:
        ms: measured, the last side's widths running fastest.
        shape: how many widths each side has.
    """
    table = torch.tensor(ms, dtype=torch.float64).reshape(shape)
    below, above = table, table
    for dim in range(table.ndim):
        below = below.cummax(dim).values
        above = above.flip(dim).cummin(dim).values.flip(dim)
    return tuple(((below + above) / 2).flatten().tolist())
