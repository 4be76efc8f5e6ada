"""Make a greedy choice better: exchange what leaves for what stays as long as the drift of the whole plan falls.

A step that was the cheapest when it was taken may be a poor one beside those that came after it. Two kinds of moves
are tried, best first, until none helps: one unit of a group for another of the same group, which changes no cost; and
a group's last step for another group's next one, where the bounds go on holding. Then chains (Kernighan and Lin 1970):
a step comes back, others go until the bounds hold again, and so on, the best state on the way being kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvprune.planning.greedy import Spending
from tpvprune.types import Graph

LOOKED_AT = 8  # units of a group that are tried on either side of a move
TRIED = 64  # moves between groups whose costs are looked at before the next one inside a group
WORK = 2**32  # entries of the sensitivities that may be read
CHAINS, LINKS = 8, 12  # chains that are tried, each from another step, and their length
LEAST = 1e-6  # share of the drift that a move must be worth


@dataclass(frozen=True)
class _Side:
    """Candidates for one side of a move: steps of groups, or single units."""

    groups: list[str]
    units: list[Tensor]  # columns of each candidate
    effects: Tensor  # (candidates, rows): summed over a candidate's units
    changes: Tensor  # (candidates,): what each alone does to the drift


class Exchange:
    """The drift of a plan as a function of what leaves, with products of different units shrunk.

    Args:
        effects: what each unit does, `(units, rows)`: sensitivities over the root of the number of samples.
        linear: `(units,)`, float64.
        shrinkage: of the products of different units, 0 to 1.
        spans: where the units of each group that may be exchanged stand.
        widths: units each group may keep, from all of them down.
        gone: where units stand that have left for good.
    """

    def __init__(
        self,
        effects: Tensor,
        linear: Tensor,
        shrinkage: float,
        spans: Mapping[str, slice],
        widths: Mapping[str, list[int]],
        gone: Sequence[slice] = (),
    ) -> None:
        self.effects, self.linear, self.keep_share, self.spans = effects, linear, 1 - shrinkage, spans
        self.widths, self.gone = widths, tuple(gone)
        self.alone = torch.linalg.vector_norm(effects, dim=1, dtype=torch.float64).square()

    def improve(self, graph: Graph, gone: dict[str, Tensor], spending: Spending) -> None:
        """Exchange units until no move helps; `gone`, bool masks `(units,)`, and `spending` are brought up to date."""
        left = torch.zeros(len(self.linear), dtype=torch.bool)
        for name, span in self.spans.items():
            left[span] = gone[name]
        for span in self.gone:
            left[span] = True
        self.together = self.effects[left].sum(0)
        self.passes = WORK // max(1, self.effects.numel())
        while self.passes > 0:
            self._descend(graph, left, spending)
            if not spending.bounded or not self._chained(graph, left, spending):
                break
        if spending.bounded and self._fill(graph, left, spending):
            self._descend(graph, left, spending, between=False)
        for name, span in self.spans.items():
            gone[name] = left[span].clone()

    def _slopes(self, left: Tensor) -> tuple[Tensor, Tensor, float]:
        """What each unit adds when it leaves, what it adds when it comes back, and the drift."""
        self.passes -= 1
        slopes = (2 * self.keep_share) * (self.effects @ self.together).double()
        square = (
            self.keep_share * self.together.double().square().sum() + (1 - self.keep_share) * self.alone[left].sum()
        )
        return (
            self.linear + self.alone + slopes,
            -self.linear + (1 - 2 * (1 - self.keep_share)) * self.alone - slopes,
            float(self.linear[left].sum() + square),
        )

    def _descend(self, graph: Graph, left: Tensor, spending: Spending, between: bool = True) -> None:
        """Take the best move until none is left; moves within groups alone unless those between them are wanted."""
        while self.passes > 0:
            adds, back, drift = self._slopes(left)
            worth = -LEAST * abs(drift)
            found = self._inside(left, adds, back, worth)
            if between:
                found = self._between(graph, left, adds, back, spending, found[0] if found else worth) or found
            if found is None:
                break
            _, comes, goes = found
            self._move(left, comes, False)
            self._move(left, goes, True)

    def _move(self, left: Tensor, columns: Tensor, leave: bool) -> None:
        left[columns] = leave
        effect = self.effects[columns].sum(0)
        self.together += effect if leave else -effect

    def _chained(self, graph: Graph, left: Tensor, spending: Spending) -> bool:
        """Whether a chain has led to a lower drift."""
        _, back, before = self._slopes(left)
        coming, ranked = self._steps(left, back, True), spending.ranked
        for first in coming.changes.argsort()[:CHAINS].tolist() if coming.groups else ():
            trail, kept, best = list[tuple[str, Tensor, bool]](), 0, before - LEAST * abs(before)
            locked = torch.zeros_like(left)
            for link in range(LINKS):
                if self.passes <= 0:
                    break
                adds, back, drift = self._slopes(left)
                if not spending.unmet and drift < best and spending.ranked <= ranked:
                    kept, best = len(trail), drift
                step = self._link(graph, left, locked, adds, back, spending)
                if not link:
                    step = coming.groups[first], coming.units[first], True
                if step is None:
                    break
                self._do(graph, left, spending, *step)
                locked[step[1]] = True
                trail.append(step)
            for name, columns, comes in reversed(trail[kept:]):
                self._do(graph, left, spending, name, columns, not comes)
            if kept:
                return True
        return False

    def _fill(self, graph: Graph, left: Tensor, spending: Spending) -> bool:
        """Take back what the bounds do not ask for, even where leaving is said to lower the drift; whether any was.

        A falling slope, noisy where images are few, makes chains end far below the bounds.
        """
        filled = False
        while self.passes > 0:
            coming = self._steps(left, self._slopes(left)[1], True)
            for number in coming.changes.argsort().tolist():
                group, columns = graph[coming.groups[number]], coming.units[number]
                if spending.affords(group, len(columns)):
                    self._do(graph, left, spending, group.id, columns, True)
                    filled = True
                    break
            else:
                break
        return filled

    def _do(self, graph: Graph, left: Tensor, spending: Spending, name: str, columns: Tensor, comes: bool) -> None:
        spending.remove(graph[name], -len(columns) if comes else len(columns))
        self._move(left, columns, not comes)

    def _link(
        self, graph: Graph, left: Tensor, locked: Tensor, adds: Tensor, back: Tensor, spending: Spending
    ) -> tuple[str, Tensor, bool] | None:
        """The next step of a chain: back what lowers drift most, or, beyond the bounds, out what raises it least."""
        unmet = spending.unmet
        side = self._steps(left, back if not unmet else adds, not unmet)
        ratios = side.changes.clone()
        for number, (name, columns) in enumerate(zip(side.groups, side.units, strict=True)):
            if bool(locked[columns].any()):
                ratios[number] = torch.inf
            elif unmet:
                saved = spending.saving(graph[name], len(columns), unmet)
                ratios[number] = ratios[number] / saved if saved > 0 else torch.inf
        if not len(ratios) or not bool(ratios.isfinite().any()):
            return None
        number = int(ratios.argmin())
        return side.groups[number], side.units[number], not unmet

    def _inside(self, left: Tensor, adds: Tensor, back: Tensor, below: float) -> tuple[float, Tensor, Tensor] | None:
        """The best exchange of two units of one group that does more than `below`: (change, comes back, leaves)."""
        best: tuple[float, Tensor, Tensor] | None = None
        for span in self.spans.values():
            out, stays = left[span].nonzero().flatten(), (~left[span]).nonzero().flatten()
            if not len(out) or not len(stays):
                continue
            out, stays = out + span.start, stays + span.start
            out = out[back[out].topk(min(LOOKED_AT, len(out)), largest=False).indices]
            stays = stays[adds[stays].topk(min(LOOKED_AT, len(stays)), largest=False).indices]
            changes = back[out].unsqueeze(1) + adds[stays]
            if float(changes.min()) - self._most_product(out, stays) >= below:
                continue
            changes = changes - 2 * self.keep_share * (self.effects[out] @ self.effects[stays].mT).double()
            place = int(changes.argmin())
            change = float(changes.flatten()[place])
            if change < below:
                i, j = divmod(place, len(stays))
                below = change
                best = change, out[i : i + 1], stays[j : j + 1]
        return best

    def _most_product(self, one: Tensor, other: Tensor) -> float:
        """No product of two of these units counts for more (Cauchy and Schwarz)."""
        return 2 * self.keep_share * float((self.alone[one].max() * self.alone[other].max()).sqrt())

    def _between(
        self, graph: Graph, left: Tensor, adds: Tensor, back: Tensor, spending: Spending, below: float
    ) -> tuple[float, Tensor, Tensor] | None:
        """The best exchange of steps of two groups that does more than `below` and keeps the bounds."""
        if not spending.bounded:
            return None
        coming, going = self._steps(left, back, True), self._steps(left, adds, False)
        changes = coming.changes.unsqueeze(1) + going.changes
        changes = changes - 2 * self.keep_share * (coming.effects @ going.effects.mT).double()
        # The last column: a step comes back and none goes for it.
        changes = torch.cat([changes, coming.changes.unsqueeze(1)], 1)
        nothing = torch.zeros(0, dtype=torch.int64)
        for place in changes.flatten().argsort()[:TRIED].tolist():
            i, j = divmod(place, len(going.groups) + 1)
            change = float(changes[i, j])
            if change >= below:
                break
            goes = going.units[j] if j < len(going.groups) else nothing
            one, other = graph[coming.groups[i]], graph[(going.groups + coming.groups)[j if len(goes) else -1]]
            if (one is not other or not len(goes)) and spending.exchange(one, len(coming.units[i]), other, len(goes)):
                return change, coming.units[i], goes
        return None

    def _steps(self, left: Tensor, each: Tensor, coming: bool) -> _Side:
        """Candidates among the groups' next steps, back or further down."""
        groups, units = list[str](), list[Tensor]()
        for name, span in self.spans.items():
            kept, allowed = int((~left[span]).sum()), self.widths[name]
            if kept not in allowed:
                continue
            place = allowed.index(kept) + (-1 if coming else 1)
            if not 0 <= place < len(allowed):
                continue
            count = abs(allowed[place] - kept)
            columns = (left[span] if coming else ~left[span]).nonzero().flatten() + span.start
            order = columns[each[columns].argsort()]
            chosen = [order[n : n + 1] for n in range(min(LOOKED_AT, len(order)))] if count == 1 else [order[:count]]
            groups += [name] * len(chosen)
            units += chosen
        if not groups:
            return _Side([], [], self.effects[:0], self.linear[:0])
        effects = torch.stack([self.effects[columns].sum(0) for columns in units])
        alone = torch.stack([self.alone[columns].sum() for columns in units])
        # Units of one step meet each other as well: twice their products, whether they come or go.
        meets = self.keep_share * (torch.linalg.vector_norm(effects, dim=1, dtype=torch.float64).square() - alone)
        return _Side(groups, units, effects, torch.stack([each[columns].sum() for columns in units]) + meets)
