"""Normal equations of a ridge regression: summed in float64 over batches, solved safely, the ridge chosen by halves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpvprune.recovery.masks import solve_free

FLOOR = 1e-8  # of the mean variance: where inputs are dead, or fewer than the weights


class Normal:
    """Sums over rows of one regression: `x` is `(groups, rows, inputs)`, the residual `d` `(groups, rows, outputs)`."""

    def __init__(self) -> None:
        self.rows = 0
        self.xx = self.xd = self.x = self.d = torch.zeros(())

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add rows."""
        x, d = (t if t.dtype == torch.float64 else t.float() for t in (x, d))  # half precision would overflow
        self.rows += x.shape[1]
        self.xx = self.xx + (x.mT @ x).double()
        self.xd = self.xd + (x.mT @ d).double()
        self.x, self.d = self.x + x.sum(1).double(), self.d + d.sum(1).double()

    def __add__(self, other: Normal) -> Normal:
        if not (self.rows and other.rows):
            return self if self.rows else other
        both = Normal()
        both.rows = self.rows + other.rows
        both.xx, both.xd, both.x, both.d = (
            getattr(self, name) + getattr(other, name) for name in ("xx", "xd", "x", "d")
        )
        return both

    def moments(self, biased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`(x x^T, x d^T, x, d)` in the mean over rows, the first two about the mean if there is a bias to move."""
        xx, xd = self.xx / self.rows, self.xd / self.rows
        x, d = self.x / self.rows, self.d / self.rows
        if biased:
            xx, xd = xx - x.unsqueeze(2) * x.unsqueeze(1), xd - x.unsqueeze(2) * d.unsqueeze(1)
        return xx, xd, x, d

    def solve(self, ridge: float, biased: bool, free: Tensor | None) -> tuple[Tensor, Tensor]:
        """Change of the weights `(groups, outputs, inputs)` and of the bias `(groups, outputs)`.

        Args:
            ridge: share of the mean input variance.
            biased: whether there is a bias to move.
            free: which weights may change, shaped as they are; None for all.
        """
        xx, xd, x, d = self.moments(biased)
        scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30).reshape(-1, 1, 1)
        eye = torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device)
        damping = max(ridge, FLOOR)
        while True:
            damped = xx + damping * scale * eye
            factor, failed = torch.linalg.cholesky_ex(damped)
            if not bool(failed.any()):
                break
            damping *= 10  # sums in float32 can leave a dead direction slightly below zero
        change = torch.cholesky_solve(xd, factor) if free is None else solve_free(damped, xd, free.to(xd.device).mT)
        bias = d - (x.unsqueeze(1) @ change).squeeze(1) if biased else torch.zeros_like(d)
        return change.mT, bias

    def left(self, change: Tensor, bias: Tensor) -> float:
        """What a solution leaves of the residual's mean square on these rows, up to a constant.

        Args:
            change: `(groups, outputs, inputs)`.
            bias: `(groups, outputs)`.
        """
        xx, xd, x, d = self.moments(biased=False)
        w = change.mT
        square = (w * (xx @ w)).sum() - 2 * (w * xd).sum() + bias.square().sum()
        return float(square + 2 * (bias * ((x.unsqueeze(1) @ w).squeeze(1) - d)).sum())


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
