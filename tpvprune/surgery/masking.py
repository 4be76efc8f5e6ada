"""Silence a plan's units in a copy of a network, without changing a shape."""

from __future__ import annotations

from torch import nn

from tpvprune.kinds import as_verb
from tpvprune.plan import Plan
from tpvprune.surgery.removal import apply


@as_verb
def mask(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the same shape in which the plan's units are silenced: what reads them is zero.

    Of a skipped block all parameters are zero, which leaves its input. Equal to `apply` where `Group.exact_mask`
    holds; where a normaliser pools over the units it is not. The copy carries the plan as masks of weights, so that
    it can be saved, and its zeros held in training.

    Args:
        model: the dense model; it is left as it was.
        plan: what is silenced.

    Raises:
        PlanError: the plan speaks of other tensors or shapes.
        ModelError: the model cannot be copied; what holds it up is named.
    """
    return apply(model, plan.as_masks())
