"""Re-estimate batch-norm statistics on unlabeled batches.

Helps a pruned network that was not reconstructed, hurts one that was: a choice, not a reflex.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpvprune.batches import Batch, Progress, evaluation_mode, model_inputs
from tpvprune.copies import copied
from tpvprune.errors import DataError, NonFiniteError
from tpvprune.kinds import as_verb
from tpvprune.reads import read_by


@as_verb
@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, batches: Iterable[Batch], *, progress: Progress | None = None) -> nn.Module:
    """A copy whose running means and variances are the averages over the batches, each with the weight of its samples.

    A norm that is given one number a channel, as behind a pooling of a single sample, has no variance to learn from: it
    goes by the statistics it has, and the sample does not count for it. A norm that is never called keeps its
    statistics.

    Args:
        model: any model; one without batch norm comes back as it is.
        batches: unlabeled; labels are not looked at.
        progress: called as `progress("batchnorm", batches_done, batches_to_do)`.

    Raises:
        DataError: there is no batch, or a norm was given one number a channel and nothing else.
        NonFiniteError: a norm is given NaN or infinity.
    """
    small = copied(model)
    named = {name: m for name, m in small.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if not named:
        return small
    before = {norm: (norm.momentum, norm.training) for norm in named.values()}
    averages = {name: _Average() for name in named}
    with evaluation_mode(small), ExitStack() as hooks:
        for name, norm in named.items():
            hooks.enter_context(norm.register_forward_pre_hook(averages[name], with_kwargs=True))
        for inputs in model_inputs(small, batches, "batchnorm", progress):
            for average in averages.values():
                average.samples = len(inputs)
            small(inputs)
    for norm, (momentum, training) in before.items():
        norm.momentum, norm.training = momentum, training
    lost = next((n for n, norm in named.items() if averages[n].seen and not _finite(norm)), None)
    if lost is not None:
        raise NonFiniteError.of_layer(lost)
    poor = next((name for name, average in averages.items() if average.passed_over and not average.seen), None)
    if poor is not None:
        raise DataError(f"batchnorm: {poor!r} is given one number a channel, of single samples; give larger batches")
    return small


def _finite(norm: _BatchNorm) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in (norm.running_mean, norm.running_var))


class _Average:
    """Sees to it that the statistics of one norm become averages over all samples that it was given.

    Attributes:
        samples: in the batch that is coming.
        seen: samples so far.
        passed_over: whether there was something that has no variance.
    """

    def __init__(self) -> None:
        self.samples, self.seen, self.passed_over = 0, 0, False

    def __call__(self, norm: _BatchNorm, args: Any, kwargs: Any) -> None:
        """Before the norm is run: how much it is to take of what it is given."""
        norm.training = read_by(args, kwargs).numel() > norm.num_features
        if not norm.training:
            self.passed_over = True
            return
        if not self.seen:
            norm.reset_running_stats()
        self.seen += self.samples
        norm.momentum = self.samples / self.seen
