"""Hold a plan's masked weights at zero while a model is trained or refitted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpvprune.errors import InputError
from tpvprune.held import held_in, plans_in

RELATIVE = 1e-8  # residual, against the one at the start, at which a refit is done
MOST_ITERATIONS = 1000


class Masks:
    """The weights that the plan of a model holds at zero, for a training loop of any kind.

    Call `gradients()` between the backward pass and the optimiser's step, and `weights()` after the step. The
    first keeps masked weights out of gradient norms and out of the optimiser's moments; the second alone would
    already keep them at zero. Nothing is added to the model: no hook, no parametrisation, no buffer.

    Args:
        model: from `apply`, `mask` or `load`, or what has such models in it: compiled, parallel, averaged, a part of
            another one. A plan without masks has nothing to hold.

    Raises:
        InputError: neither the model nor a module in it carries a plan.
        PlanError: the weights of a plan are not there any more, or have another shape.
    """

    def __init__(self, model: nn.Module) -> None:
        if not plans_in(model):
            raise InputError(
                f"neither this {type(model).__name__} nor a module in it carries a plan, which says what is zero; "
                "give what apply(), mask(), recover() or load() returned, or a model that has it inside"
            )
        self._zero = held_in(model)

    @torch.no_grad()
    def gradients(self) -> None:
        """Set the gradients of masked weights to zero."""
        for parameter, zero in self._zero:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(zero, 0)

    @torch.no_grad()
    def weights(self) -> None:
        """Set masked weights to zero."""
        for parameter, zero in self._zero:
            parameter.masked_fill_(zero, 0)


def solve_free(a: Tensor, b: Tensor, free: Tensor) -> Tensor:
    """Minimise `x^T A x / 2 - b^T x` of every column over its free entries, the others being zero.

    Each column has free entries of its own, so each would need a factorisation of its own; conjugate gradients of
    all columns at once need one product with `A` an iteration. They start from zero and never leave it for worse:
    where `A` is too ill-conditioned to finish, what comes out is still an improvement.

    Args:
        a: symmetric and positive definite, `(groups, entries, entries)`.
        b: `(groups, entries, columns)`.
        free: bool, shaped as `b`.

    Returns:
        `x`, shaped as `b`.
    """
    scale = 1 / a.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    x, rest = torch.zeros_like(b), b * free
    ahead = rest * scale
    size = (rest * ahead).sum(1, keepdim=True)
    enough = RELATIVE**2 * size
    for _ in range(min(4 * b.shape[1], MOST_ITERATIONS)):
        going = size > enough
        if not bool(going.any()):
            break
        pushed = (a @ ahead) * free
        step = torch.where(going, size / (ahead * pushed).sum(1, keepdim=True), 0)
        x += step * ahead
        rest -= step * pushed
        scaled = rest * scale
        before, size = size, torch.where(going, (rest * scaled).sum(1, keepdim=True), size)
        ahead = torch.where(going, scaled + size / before * ahead, ahead)
    return x
