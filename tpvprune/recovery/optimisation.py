"""Timm's optimisers, schedules and mixtures of images, as the settings of the distillation name them."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune.errors import InputError
from tpvprune.recovery.settings import Finetune


def check_optimizer(settings: Finetune) -> None:
    """Refuse a name of no optimiser that the distillation could use.

    Raises:
        InputError: timm knows no such name, or it takes second derivatives, which the distillation does not make.
    """
    name = settings.optimizer.lower().split("_")[-1]  # lookahead_adam is adam with something around it
    try:
        info = get_optimizer_info(name)
    except ValueError as error:
        near = difflib.get_close_matches(name, list_optimizers(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.optim.list_optimizers()"
        raise InputError(f"finetune: optimizer={settings.optimizer!r} is no optimiser of timm; {hint}") from error
    if info.second_order:
        raise InputError(
            f"finetune: optimizer={settings.optimizer!r} takes second derivatives, which are not made here; take "
            "another one, as 'adamw', or refine() for a second-order refit"
        )


def optimizer_for(model: nn.Module, settings: Finetune) -> torch.optim.Optimizer:
    """Timm's optimiser of that name over all parameters that are not frozen.

    Raises:
        InputError: see `check_optimizer`, or it cannot be made here.
    """
    check_optimizer(settings)
    try:
        found: torch.optim.Optimizer = create_optimizer_v2(
            model, opt=settings.optimizer, lr=settings.lr, weight_decay=settings.weight_decay
        )
    except (ValueError, AssertionError, KeyError) as error:
        raise InputError(f"finetune: optimizer={settings.optimizer!r} cannot be made: {error}") from error
    return found


def schedule_for(optimizer: torch.optim.Optimizer, settings: Finetune, steps: int) -> Any:
    """Timm's schedule over optimiser steps, None for a constant rate."""
    if settings.schedule == "constant":
        return None
    found, _ = create_scheduler_v2(
        optimizer,
        settings.schedule,
        num_epochs=max(2, steps),  # timm takes a single step for a mistake
        decay_epochs=max(1, steps // 3),
        decay_milestones=[max(1, steps // 2), max(1, steps * 3 // 4)],
        warmup_epochs=round(settings.warmup * steps),
        warmup_lr=settings.lr * 0.01,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return found


class Mixture:
    """Pairs of images mixed or pasted into each other (Zhang 2018, arXiv 1710.09412; Yun 2019, arXiv 1905.04899).

    Args:
        settings: `mixup` and `cutmix` of them.
        classes: how many outputs the labels are shares of.
    """

    def __init__(self, settings: Finetune, classes: int) -> None:
        self._mixup = Mixup(settings.mixup, settings.cutmix, label_smoothing=0.0, num_classes=classes)

    def __call__(self, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Mixed `(batch, ...)`, and shares of their labels `(batch, classes)`; a last odd image is left out."""
        even = len(inputs) // 2 * 2
        if not even:
            return inputs, None if labels is None else F.one_hot(labels, self._mixup.num_classes).float()
        given = torch.zeros(even, dtype=torch.int64, device=inputs.device) if labels is None else labels[:even]
        mixed, target = self._mixup(inputs[:even].clone(), given)
        return mixed, None if labels is None else target
