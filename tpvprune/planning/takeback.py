"""What skipping a block adds to a plan's drift once units within it have left."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tpvprune.types import Graph


class Blocks:
    """Keeps what skipping blocks adds right while units within them leave.

    With `S` what has left, `I` those of it within a block, and `e` the block's effect less those of `I`, skipping the
    block adds `own + (1 - shrinkage) (|e|^2 + 2 e . sum of S)`, where `own` is its linear part and `shrinkage` times
    its square, less the same of `I`.

    Args:
        graph: from `trace`.
        effects: what each unit does, `(units, rows)`: sensitivities over the root of the number of samples.
        adds: what each unit adds, `(units,)`; entries of blocks are brought up to date in place.
        shrinkage: of the products of different units, 0 to 1.
        span: where each group's units stand.
    """

    def __init__(
        self, graph: Graph, effects: Tensor, adds: Tensor, shrinkage: float, span: Mapping[str, slice]
    ) -> None:
        self._effects, self._adds, self._shrinkage, self._span = effects, adds, shrinkage, span
        self._own = adds - (1 - shrinkage) * torch.linalg.vector_norm(effects, dim=1, dtype=torch.float64).square()
        self._around = {inner: g.id for g in graph.groups for inner in graph.within(g.id)}
        self._moved = torch.zeros(effects.shape[1], dtype=torch.float64)
        self._changed: dict[str, Tensor] = {}

    def effect(self, name: str) -> Tensor | None:
        """What skipping a block does, `(rows,)`, where that is no longer its row; None otherwise."""
        return self._changed.get(name)

    def take(self, name: str, columns: Tensor) -> None:
        """Take in that units of a group have left."""
        if not self._around:
            return
        left = self._changed.get(name)
        left = self._effects[columns].sum(0) if left is None else left
        self._moved += left.double()
        block = self._around.get(name)
        if block is not None:
            place = self._span[block].start
            self._changed[block] = self._changed.get(block, self._effects[place]) - left
            self._own[place] -= self._own[columns].sum()
        for block, effect in self._changed.items():
            place, wide = self._span[block].start, effect.double()
            self._adds[place] = self._own[place] + (1 - self._shrinkage) * (wide @ (wide + 2 * self._moved))
