"""Normal equations of a ridge regression: summed in float64 over batches, solved safely, the ridge chosen by halves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpvprune.recovery.masks import solve_free

FLOOR = 1e-8  # of the mean variance: where inputs are dead, or fewer than the weights


class Normal:
    """Sums over rows of one regression: `x` is `(groups, rows, inputs)`, the residual `d` `(groups, rows, outputs)`.

    As long as there are fewer rows than inputs they are kept themselves: that takes less room than their products, and
    the same solution comes out of products of rows with rows.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._few: list[tuple[Tensor, Tensor]] = []
        self._xx = self._xd = self._x = self._d = torch.zeros(())

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add rows."""
        x, d = (t if t.dtype == torch.float64 else t.float() for t in (x, d))  # half precision would overflow
        self.rows += x.shape[1]
        if self.rows < x.shape[2]:
            self._few.append((x.clone(), d.clone()))  # and not all that they are a part of
        else:
            self._sum([*self._few, (x, d)])

    def __add__(self, other: Normal) -> Normal:
        both = Normal()
        both.rows, rows = self.rows + other.rows, self._few + other._few
        both._xx, both._xd, both._x, both._d = (
            getattr(self, name) + getattr(other, name) for name in ("_xx", "_xd", "_x", "_d")
        )
        if rows and both.rows < rows[0][0].shape[2]:
            both._few = rows
        else:
            both._sum(rows)
        return both

    def _sum(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        for x, d in rows:
            self._xx = self._xx + (x.mT @ x).double()
            self._xd = self._xd + (x.mT @ d).double()
            self._x, self._d = self._x + x.sum(1).double(), self._d + d.sum(1).double()
        self._few = []

    def _themselves(self) -> tuple[Tensor, Tensor]:
        """The rows, `(groups, rows, inputs)` and `(groups, rows, outputs)`, where they are few."""
        x, d = (torch.cat(parts, 1).double() for parts in zip(*self._few, strict=True))
        return x, d

    def _moments(self, biased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(x x^T, x d^T, x, d)` in the mean over rows, the first two about the mean if there is a bias to move."""
        xx, xd = self._xx / self.rows, self._xd / self.rows
        x, d = self._x / self.rows, self._d / self.rows
        if biased:
            xx, xd = xx - x.unsqueeze(2) * x.unsqueeze(1), xd - x.unsqueeze(2) * d.unsqueeze(1)
        return xx, xd, x, d

    def solve(self, ridge: float, biased: bool, free: Tensor | None) -> tuple[Tensor, Tensor]:
        """Change of the weights `(groups, outputs, inputs)` and of the bias `(groups, outputs)`.

        Args:
            ridge: share of the mean input variance.
            biased: whether there is a bias to move.
            free: which weights may change, shaped as they are; None for all.

        Raises:
            ArithmeticError: a row holds NaN or infinity.
        """
        held = [t for pair in self._few for t in pair] or [self._xx, self._xd, self._d]
        if not all(bool(t.isfinite().all()) for t in held):
            raise ArithmeticError("rows that are not finite")  # no damping would make them positive
        if self._few and free is None:
            return self._solved_by_rows(ridge, biased)
        whole = self
        if self._few:
            whole = Normal()
            whole.rows = self.rows
            whole._sum(self._few)
        xx, xd, x, d = whole._moments(biased)
        damped, factor = _damped(xx, ridge, xx.diagonal(dim1=-2, dim2=-1).mean(-1))
        change = torch.cholesky_solve(xd, factor) if free is None else solve_free(damped, xd, free.to(xd.device).mT)
        return change.mT, _bias(x, d, change, biased)

    def _solved_by_rows(self, ridge: float, biased: bool) -> tuple[Tensor, Tensor]:
        """`(X^T X / n + c)^-1 X^T D / n` as `X^T (X X^T / n + c)^-1 D / n`, n the number of rows."""
        rows, wanted = self._themselves()
        x, d = rows.mean(1), wanted.mean(1)
        if biased:
            rows, wanted = rows - x.unsqueeze(1), wanted - d.unsqueeze(1)
        factor = _damped(rows @ rows.mT / self.rows, ridge, rows.square().sum(1).mean(-1) / self.rows)[1]
        change = rows.mT @ torch.cholesky_solve(wanted / self.rows, factor)
        return change.mT, _bias(x, d, change, biased)

    def left(self, change: Tensor, bias: Tensor) -> float:
        """What a solution leaves of the residual's mean square on these rows, up to a constant.

        Args:
            change: `(groups, outputs, inputs)`.
            bias: `(groups, outputs)`.
        """
        w = change.mT
        if self._few:
            rows, wanted = self._themselves()
            return float(((wanted - rows @ w - bias.unsqueeze(1)).square() - wanted.square()).sum() / self.rows)
        xx, xd, x, d = self._moments(biased=False)
        square = (w * (xx @ w)).sum() - 2 * (w * xd).sum() + bias.square().sum()
        return float(square + 2 * (bias * ((x.unsqueeze(1) @ w).squeeze(1) - d)).sum())


def _damped(products: Tensor, ridge: float, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Products `(groups, n, n)` with a share of `scale`, `(groups,)`, on their diagonal, and their Cholesky factor."""
    eye = torch.eye(products.shape[-1], dtype=products.dtype, device=products.device)
    damping, scale = max(ridge, FLOOR), scale.clamp(min=1e-30).reshape(-1, 1, 1)
    while True:
        damped = products + damping * scale * eye
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            return damped, factor
        damping *= 10  # sums in float32 can leave a dead direction slightly below zero


def _bias(x: Tensor, d: Tensor, change: Tensor, biased: bool) -> Tensor:
    """What is left to the bias, of the means `(groups, inputs)` and `(groups, outputs)`."""
    return d - (x.unsqueeze(1) @ change).squeeze(1) if biased else torch.zeros_like(d)


def chosen_ridge(halves: Sequence[Normal], ridges: Sequence[float], biased: bool, free: Tensor | None) -> float:
    """The ridge whose solution on each half leaves least of the other half; the largest, if there is one half only."""
    full = [half for half in halves if half.rows]
    if len(full) < 2:
        return max(ridges)
    left = {}
    for ridge in ridges:
        solved = [half.solve(ridge, biased, free) for half in full]
        left[ridge] = sum(half.left(*other) for half, other in zip(full, reversed(solved), strict=True))
    return min(ridges, key=lambda ridge: left[ridge])
