"""Hold a plan's masked weights at zero while a model is trained."""

from __future__ import annotations

import torch
from torch import nn

from tpvprune.plan import plan_of


class Masks:
    """The weights that the plan of a model holds at zero, for a training loop of any kind.

    Call `gradients()` between the backward pass and the optimiser's step, and `weights()` after the step. The
    first keeps masked weights out of gradient norms and out of the optimiser's moments; the second alone would
    already keep them at zero. Nothing is added to the model: no hook, no parametrisation, no buffer.

    Args:
        model: from `apply`, `mask` or `load`; a model without a plan, or a plan without masks, has nothing to hold.
    """

    def __init__(self, model: nn.Module) -> None:
        plan = plan_of(model)
        masks = {} if plan is None else plan.weight_masks()
        parameters = {name: model.get_parameter(name) for name in masks}
        self._zero = [(p, ~masks[name].to(p.device)) for name, p in parameters.items()]

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
