"""Re-estimate batch-norm statistics on unlabeled batches.

Helps a pruned network that was not reconstructed, hurts one that was: a choice, not a reflex.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpvprune.batches import Batch, Progress, evaluation_mode, model_inputs
from tpvprune.copies import copied
from tpvprune.kinds import check_kinds


@check_kinds
@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Batch], *, progress: Progress | None = None) -> nn.Module:
    """A copy whose running means and variances are the averages over the batches.

    Args:
        model: any model; one without batch norm comes back as it is.
        batches: unlabeled; labels are not looked at.
        progress: called as `progress("batchnorm", batches_done, batches_to_do)`.

    Raises:
        DataError: there is no batch.
    """
    small = copied(model)
    norms = [m for m in small.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return small
    momenta = [norm.momentum for norm in norms]
    with evaluation_mode(small):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        for inputs in model_inputs(small, batches, "batchnorm", progress):
            small(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return small
