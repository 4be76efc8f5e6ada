"""Distillation: train the pruned model to answer like the dense one, without labels.

The loss is the KL divergence between softened outputs (Hinton 2015, arXiv 1503.02531); where labels
exist and are asked for, cross-entropy is mixed in. Optimiser and schedule are timm's, device placement,
precision and accumulation Accelerate's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from tpvprune.batches import (
    Batch,
    Progress,
    Selector,
    device_of,
    evaluation_mode,
    inputs_of,
    is_classifier,
    labels_of,
    length_of,
    repeatable,
    single_tensor,
)
from tpvprune.errors import DataError, InputError, NonFiniteError
from tpvprune.recovery.masks import Masks

Log = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Finetune:
    """Settings of the distillation.

    Attributes:
        epochs: passes over the batches.
        lr: peak learning rate.
        optimizer: a timm optimiser name.
        weight_decay: decoupled where the optimiser decouples it.
        temperature: softening of both outputs.
        label_weight: share of cross-entropy on labels in the loss; 0 looks at no label.
        warmup: share of the steps with a rising learning rate; a cosine falls to zero after it.
        clip: largest gradient norm.
        norms: "train" updates batch-norm statistics on the way, "freeze" keeps them.
        precision: Accelerate's mixed precision.
        accumulate: batches per optimiser step.
    """

    epochs: int = 5
    lr: float = 1e-3
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    temperature: float = 2.0
    label_weight: float = 0.0
    warmup: float = 0.1
    clip: float = 1.0
    norms: Literal["train", "freeze"] = "train"
    precision: Literal["no", "fp16", "bf16"] = "no"
    accumulate: int = 1

    def __post_init__(self) -> None:
        checks = {
            "epochs": self.epochs >= 1,
            "lr": self.lr > 0,
            "weight_decay": self.weight_decay >= 0,
            "temperature": self.temperature > 0,
            "label_weight": 0 <= self.label_weight <= 1,
            "warmup": 0 <= self.warmup < 1,
            "clip": self.clip > 0,
            "accumulate": self.accumulate >= 1,
            "norms": self.norms in ("train", "freeze"),
            "precision": self.precision in ("no", "fp16", "bf16"),
        }
        for name, good in checks.items():
            if not good:
                raise InputError(f"finetune: {name}={getattr(self, name)!r} is out of range")


def finetune(
    model: nn.Module,
    batches: Iterable[Batch],
    teacher: nn.Module,
    settings: Finetune | None = None,
    *,
    output: Selector = None,
    progress: Progress | None = None,
    log: Log | None = None,
) -> nn.Module:
    """A copy of a model, distilled from the teacher on unlabeled batches.

    Weights that the model's plan holds at zero stay exactly zero, after every step.

    Args:
        model: the pruned model; it is left as it was.
        batches: a list or DataLoader, read once per epoch. Labels are looked at only if `label_weight` asks.
        teacher: the dense model.
        settings: see `Finetune`.
        output: which part of what the models return is distilled: a key, attribute or index, or a function.
        progress: called as `progress("finetune", steps_done, steps_to_do)`.
        log: receives `{"epoch", "loss", "lr"}` after every epoch.

    Raises:
        DataError: the batches are empty or can be read once only, or labels are asked for and missing.
        NonFiniteError: the loss became NaN or infinite.
    """
    settings = settings or Finetune()
    repeatable(batches, "fine-tuning reads them once per epoch")
    student = copy.deepcopy(model)
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    device = device_of(student)
    accelerator = _accelerator(settings.precision, device)
    try:
        optimizer = create_optimizer_v2(
            student, opt=settings.optimizer, lr=settings.lr, weight_decay=settings.weight_decay
        )
    except (ValueError, AssertionError, KeyError) as error:
        raise InputError(f"finetune: timm has no optimiser {settings.optimizer!r}; see timm.optim") from error
    per_epoch = length_of(batches) or sum(1 for _ in batches)
    if per_epoch == 0:
        raise DataError("finetune: there is no batch; give at least one")
    steps = settings.epochs * math.ceil(per_epoch / settings.accumulate)
    warm = round(settings.warmup * steps)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=max(2, steps),  # timm takes a single step for a mistake
        warmup_t=warm,
        warmup_lr_init=settings.lr * 0.01,
        t_in_epochs=False,
    )
    wrapped, stepper = accelerator.prepare(student, optimizer)
    masks = Masks(student)
    update = done = 0
    with evaluation_mode(teacher):
        for epoch in range(settings.epochs):
            _train_mode(student, settings.norms)
            total = torch.zeros((), device=device)
            for number, batch in enumerate(batches):
                window = min(settings.accumulate, per_epoch - number // settings.accumulate * settings.accumulate)
                inputs = inputs_of(batch).to(device)
                with torch.no_grad():
                    wanted = single_tensor(teacher(inputs), teacher, output)
                loss = _loss(single_tensor(wrapped(inputs), student, output), wanted, batch, settings)
                accelerator.backward(loss / window)
                if (number + 1) % settings.accumulate == 0 or number + 1 == per_epoch:
                    masks.gradients()
                    accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip)
                    stepper.step()
                    masks.weights()
                    stepper.zero_grad()
                    update += 1
                    schedule.step_update(update)
                total += loss.detach()
                done += 1
                if progress:
                    progress("finetune", done, settings.epochs * per_epoch)
            mean = float(total) / per_epoch
            if not math.isfinite(mean):
                raise NonFiniteError(f"finetune: the loss is {mean} in epoch {epoch + 1}; lower lr={settings.lr:g}")
            if log:
                log({"epoch": epoch + 1, "loss": mean, "lr": optimizer.param_groups[0]["lr"]})
    student = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    for name in ("forward", "_original_forward"):  # what the precision wrapper left on the instance
        if name not in model.__dict__:
            student.__dict__.pop(name, None)
    student.zero_grad(set_to_none=True)
    for mine, original in zip(student.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(original.requires_grad)
    for module, old in zip(student.modules(), model.modules(), strict=True):
        module.training = old.training
    return student


def _accelerator(precision: str, device: torch.device) -> Accelerator:
    """A fresh Accelerator: its shared state remembers the precision and device of an earlier one.

    Raises:
        InputError: the device does not do this precision.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(mixed_precision=precision, cpu=device.type == "cpu", device_placement=False)
    except ValueError as error:
        raise InputError(f"finetune: precision={precision!r} cannot be used on {device.type}: {error}") from error


def _train_mode(model: nn.Module, norms: str) -> None:
    model.train()
    if norms == "freeze":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


def _loss(output: Tensor, wanted: Tensor, batch: Batch, settings: Finetune) -> Tensor:
    """Mean KL from the teacher at the temperature, times its square (squared distance where outputs are no logits)."""
    if is_classifier(output):
        softened = F.log_softmax(output.float() / settings.temperature, dim=1)
        target = F.log_softmax(wanted.float() / settings.temperature, dim=1)
        distance = F.kl_div(softened, target, reduction="batchmean", log_target=True) * settings.temperature**2
    else:
        distance = F.mse_loss(output.float(), wanted.float())
    if settings.label_weight == 0:
        return distance
    labels = labels_of(batch)
    if labels is None or bool((labels < 0).any()):
        raise DataError("finetune: label_weight is above zero and the batches hold no labels; set it to 0")
    supervised = F.cross_entropy(output.float(), labels.to(output.device))
    return (1 - settings.label_weight) * distance + settings.label_weight * supervised
