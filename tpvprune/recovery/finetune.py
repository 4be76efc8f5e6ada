"""Distillation: train the pruned model to answer like the dense one, without labels.

The loss is the KL divergence between softened outputs (Hinton 2015, arXiv 1503.02531), with features beside it if
asked (Romero 2015, arXiv 1412.6550); where labels exist and are asked for, cross-entropy is mixed in. Optimiser,
schedule, moving average and mixup are timm's, device placement, precision, accumulation and processes Accelerate's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from tpvprune.batches import (
    Batch,
    Progress,
    Selector,
    device_of,
    evaluation_mode,
    inputs_of,
    labels_of,
    length_of,
    repeatable,
    single_tensor,
)
from tpvprune.copies import check_bare, copied
from tpvprune.errors import DataError, InputError, NonFiniteError
from tpvprune.held import plans_in
from tpvprune.kinds import as_verb
from tpvprune.processes import from_first, of_all, process
from tpvprune.recovery.accelerating import accelerator_for, state_kept
from tpvprune.recovery.classes import class_labels
from tpvprune.recovery.distance import Features, distillation_loss
from tpvprune.recovery.judge import Judge
from tpvprune.recovery.masks import Masks
from tpvprune.recovery.modes import thaw, train_mode
from tpvprune.recovery.optimisation import Mixture, optimizer_for, schedule_for
from tpvprune.recovery.origin import check_origin, origin
from tpvprune.recovery.replay import Replay
from tpvprune.recovery.settings import Finetune
from tpvprune.recovery.state import load_state, save_state
from tpvprune.recovery.teacher import Teacher
from tpvprune.statedicts import fill

Log = Callable[[dict[str, float]], None]
HALF = (
    "weights are float16, in which an optimiser's small numbers are zero; give both models as model.float() with "
    "float32 inputs, and precision='fp16' or 'bf16' if it is to be fast"
)
LAST, BEST = "last.safetensors", "best.safetensors"


@as_verb
def finetune(
    model: nn.Module,
    batches: Iterable[Batch],
    teacher: nn.Module,
    settings: Finetune | None = None,
    *,
    output: Selector = None,
    held_out: Iterable[Batch] | None = None,
    save: str | PathLike[str] | None = None,
    save_every: int = 100,
    progress: Progress | None = None,
    log: Log | None = None,
) -> nn.Module:
    """A copy of a model, distilled from the teacher on unlabeled batches.

    Weights that the model's plan holds at zero stay exactly zero, after every step. Frozen parameters
    (`requires_grad=False`) stay as they are; where all are frozen, all are trained. With `held_out` batches what comes
    back is what was closest to the teacher on them: the model of an epoch, or, with a warning, the one given, where
    few images or a high rate have brought nothing closer. Without them it is the last epoch's.

    Under several processes (`accelerate launch`, `torchrun`) all are given the same batches, in the same order, and
    each takes its share of every batch: the loss is that of one process. Batches that
    say `shared` are taken whole. Batch norms in training see their own share alone; freeze them where that matters.

    Args:
        model: the pruned model; it is left as it was.
        batches: a list or DataLoader, read once per epoch. Labels are looked at only if `label_weight` asks.
        teacher: the dense model.
        settings: see `Finetune`.
        output: which part of what the models return is distilled: a key, attribute or index, or a function.
        held_out: other batches, which the best model is chosen and `patience` counted on; where they carry labels and
            `label_weight` asks for labels, cross-entropy has its share there too.
        save: a folder for the state after every `save_every` steps and every epoch (`last.safetensors`), and the
            model of the best epoch, if it is closer than the one given (`best.safetensors`). A run found there is gone
            on with, to the same result (not where a DataLoader's workers are persistent). What the images are is not
            compared: they may be other draws each time.
        save_every: steps of the optimiser between two states.
        progress: called as `progress("finetune", steps_done, steps_to_do)`.
        log: receives `{"epoch", "loss", "lr", "samples_per_second", "seconds_left"}` after every epoch, and with
            held-out batches the distance to the teacher there, "held_out", and the given model's, "held_out_before".

    Raises:
        DataError: the batches are empty or can be read once only, or labels are asked for and missing or of no class.
        InputError: a name in the settings is unknown, there is nothing to count `patience` on, or float16 weights are
            to be trained with `precision="fp16"`.
        CheckpointError: the folder holds a run of another model, teacher, plan or output, or of other settings.
        NonFiniteError: the loss became NaN or infinite.
    """
    settings = settings or Finetune()
    repeatable(batches, "fine-tuning reads them once per epoch")
    if held_out is not None:
        repeatable(held_out, "every epoch is measured on them")
    if settings.patience is not None and held_out is None:
        raise InputError(f"finetune: patience={settings.patience} is counted on held-out batches; give held_out")
    with evaluation_mode(teacher), state_kept():
        training = _Training(model, batches, teacher, settings, output, held_out)
        return training.run(None if save is None else Path(save), save_every, progress, log)


class _Training:
    """One run: what changes in it, and the loop."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        teacher: nn.Module,
        settings: Finetune,
        output: Selector,
        held_out: Iterable[Batch] | None,
    ) -> None:
        check_bare(model, "finetune")
        self.model, self.batches, self.settings, self.output = model, batches, settings, output
        self.dense, self.teacher = teacher, Teacher(teacher, output, settings.mirrored)
        self.student = copied(model)
        thaw(self.student)
        self.device = device_of(self.student)
        if settings.precision == "fp16" and any(p.dtype == torch.float16 for p in self.student.parameters()):
            raise InputError(f"finetune: precision='fp16' keeps weights in float32, and {HALF}")
        self.accelerator = accelerator_for(settings.precision, self.device)
        if self.accelerator.num_processes != process()[1]:
            raise InputError(
                f"finetune: accelerate sees {self.accelerator.num_processes} processes where there are {process()[1]}; "
                "start them by torchrun or accelerate launch"
            )
        self.optimizer = optimizer_for(self.student, settings)
        self.per_epoch = length_of(batches) or sum(1 for _ in batches)
        if self.per_epoch == 0:
            raise DataError("finetune: there is no batch; give at least one")
        self.steps = settings.epochs * math.ceil(self.per_epoch / settings.accumulate)
        self.schedule = schedule_for(self.optimizer, settings, self.steps)
        self.ema = None if settings.ema is None else ModelEmaV3(self.student, decay=settings.ema, use_warmup=True)
        self.mixture: Mixture | None = None
        self.mixed = bool(settings.mixup or settings.cutmix)
        self.shape: tuple[int, ...] | None = None
        self.features = Features(self.student, teacher, settings.features) if settings.feature_weight else None
        self.wrapped, self.stepper = self.accelerator.prepare(self.student, self.optimizer)
        self.masks = Masks(self.student) if plans_in(self.student) else None
        plain = Teacher(teacher, output, mirrored=False)  # judged by what a report compares with
        self.judge = None if held_out is None else Judge(held_out, plain, settings, output, self.accelerator)
        self.epoch = self.batch = self.update = 0
        self.total = 0.0
        self.shared = bool(getattr(batches, "shared", False))  # they are this process's share already
        self.replay = Replay(batches)
        self.saved_by_all = False  # or by the first process alone
        self.origin: dict[str, Any] = {}

    def run(self, folder: Path | None, save_every: int, progress: Progress | None, log: Log | None) -> nn.Module:
        settings, whole = self.settings, self.settings.epochs * self.per_epoch
        given = of_all(folder is not None)
        self.saved_by_all = all(given)
        if any(given):
            self.origin = from_first(self._origin() if process()[0] == 0 else {})
        if folder is not None:
            self.replay.tell_inexact()
        if folder is not None and (folder / LAST).is_file():
            self._restore(load_state(folder / LAST))
        elif self.judge is not None:
            self.judge.begin(self.student)
        start, fresh, seen = time.perf_counter(), self.epoch * self.per_epoch + self.batch, 0
        with ExitStack() as stack:
            watched = None if self.features is None else stack.enter_context(self.features.watched())
            while self.epoch < settings.epochs and not self._enough():
                train_mode(self.student, settings.norms)
                for batch in self.replay.rest(self.batch):
                    last = self.batch + 1 == self.per_epoch
                    self._learn(batch, watched, last)
                    seen += len(inputs_of(batch)) * (self.accelerator.num_processes if self.shared else 1)
                    self.batch += 1
                    done = self.epoch * self.per_epoch + self.batch
                    if progress:
                        progress("finetune", done, whole)
                    stepped = self.batch % settings.accumulate == 0
                    if folder is not None and stepped and not last and self.update % save_every == 0:
                        self._save(folder)
                loss = self._mean_loss()
                told = {"epoch": self.epoch + 1, "loss": loss, "lr": self.optimizer.param_groups[0]["lr"]}
                self.epoch, self.batch, self.total = self.epoch + 1, 0, 0.0
                if self.judge is not None:
                    told |= self._judged(self.judge, folder)
                seconds, done = time.perf_counter() - start, self.epoch * self.per_epoch
                told["samples_per_second"] = round(seen / seconds, 1)
                told["seconds_left"] = round(seconds / max(1, done - fresh) * (whole - done), 1)
                if log:
                    log(told)
                if folder is not None:  # after the log, so that no epoch in the state was never told
                    self._save(folder)
        return self._result()

    def _enough(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.judge is not None and self.judge.waited >= patience

    def _judged(self, judge: Judge, folder: Path | None) -> dict[str, float]:
        """Distances to the teacher on held-out batches: the model's now, and that of the one given."""
        found, closest = judge.after_epoch(self.student if self.ema is None else self.ema.module)
        if closest and folder is not None and self.accelerator.is_main_process:
            save_state(folder / BEST, {"model": judge.closest, "epoch": self.epoch, "held_out": found})
        return {"held_out": found, "held_out_before": judge.before}

    def _learn(self, batch: Batch, watched: Any, last: bool) -> None:
        settings, accelerator = self.settings, self.accelerator
        window = min(settings.accumulate, self.per_epoch - self.batch // settings.accumulate * settings.accumulate)
        closing = last or (self.batch + 1) % settings.accumulate == 0
        inputs, labels, share = self._share(batch)
        world = 1 if self.shared else self.accelerator.num_processes
        alone = len(inputs_of(batch)) < 2 * world  # statistics of one sample: none of a vector, and poor ones of a map
        if alone:
            train_mode(self.student, "freeze")
        with accelerator.autocast():
            wanted = self.teacher(inputs)
        with nullcontext() if closing else accelerator.no_sync(self.wrapped):
            output = single_tensor(self.wrapped(inputs), self.student, self.output)
            loss = distillation_loss(output, wanted, settings.temperature, labels, settings.label_weight) * share
            if watched is not None and self.features is not None:
                loss = loss + settings.feature_weight * share * self.features.distance(watched)
            accelerator.backward(loss / window)
        if alone:
            train_mode(self.student, settings.norms)
        if closing:
            if self.masks is not None:
                self.masks.gradients()
            accelerator.clip_grad_norm_(self.wrapped.parameters(), settings.clip)
            self.stepper.step()
            if self.masks is not None:
                self.masks.weights()
            self.stepper.zero_grad()
            self.update += 1
            if self.schedule is not None:
                self.schedule.step_update(self.update)
            if self.ema is not None:
                self.ema.update(self.student, step=self.update)
        self.total += float(loss.detach())

    def _share(self, batch: Batch) -> tuple[Tensor, Tensor | None, float]:
        """This process's inputs and labels of a batch, and what its mean loss counts in the mean over processes."""
        inputs, labels = inputs_of(batch).to(self.device), None
        if self.settings.label_weight:
            labels = labels_of(batch)
            if labels is None or bool((labels < 0).any()):
                raise DataError("finetune: label_weight is above zero and the batches hold no labels; set it to 0")
            labels = class_labels(labels, len(inputs), self._given(inputs), self.mixed).to(self.device)
        if self.mixed:
            if self.mixture is None:
                self.mixture = Mixture(self.settings, self._given(inputs)[0])
            inputs, labels = self.mixture(inputs, labels)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if world == 1:
            return inputs, labels, 1.0
        if self.shared:
            count = 0 if getattr(self.batches, "stands_in", False) else len(inputs)
            total = int(self.accelerator.gather(torch.tensor([count], device=self.device)).sum())
            return inputs, labels, count * world / max(1, total)
        mine = inputs[rank::world]
        if not len(mine):  # every process has to take part in every step
            return inputs[:1], None if labels is None else labels[:1], 0.0
        return mine, None if labels is None else labels[rank::world], len(mine) * world / len(inputs)

    def _given(self, inputs: Tensor) -> tuple[int, ...]:
        """The shape of what the teacher gives for a sample."""
        if self.shape is None:
            self.shape = tuple(self.teacher(inputs[:1]).shape[1:])
        return self.shape

    def _mean_loss(self) -> float:
        total = torch.tensor(self.total / self.per_epoch, device=self.device)
        mean = float(self.accelerator.reduce(total, "mean"))
        if not math.isfinite(mean):
            half = any(p.dtype == torch.float16 for p in self.student.parameters())
            mend = HALF if half else f"lower lr={self.settings.lr:g}"
            raise NonFiniteError(f"finetune: the loss is {mean} in epoch {self.epoch + 1}; {mend}")
        return mean

    def _origin(self) -> dict[str, Any]:
        frozen = [name for name, p in self.student.named_parameters() if not p.requires_grad]
        judged = self.judge is not None
        return origin(self.model, self.dense, self.settings, self.output, self.per_epoch, judged, frozen)

    def _save(self, folder: Path) -> None:
        scaler, totals = self.accelerator.scaler, of_all(self.total) if self.saved_by_all else [self.total]
        state = {
            "about": self.origin,
            "model": self.student.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "place": [self.epoch, self.batch, self.update, sum(totals) / len(totals)],
            "judge": None if self.judge is None else self.judge.to_state(),
            "replay": self.replay.to_state(self.saved_by_all),
        }
        if self.accelerator.is_main_process:
            save_state(folder / LAST, state)

    def _restore(self, state: dict[str, Any]) -> None:
        check_origin(state["about"], self.origin)
        fill(self.student, state["model"])
        if self.ema is not None:
            fill(self.ema.module, state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch, self.update, self.total = state["place"]
        if self.judge is not None:
            self.judge.restore(state["judge"])
        self.replay.restore(state["replay"])
        if self.schedule is not None:
            self.schedule.step_update(self.update)

    def _result(self) -> nn.Module:
        student = self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        for name in ("forward", "_original_forward"):  # what the precision wrapper left on the instance
            if name not in self.model.__dict__:
                student.__dict__.pop(name, None)
        if self.judge is not None:
            fill(student, self.judge.decided())
        elif self.ema is not None:
            student.load_state_dict(self.ema.module.state_dict())
        student.zero_grad(set_to_none=True)
        for mine, original in zip(student.parameters(), self.model.parameters(), strict=True):
            mine.requires_grad_(original.requires_grad)
        for module, old in zip(student.modules(), self.model.modules(), strict=True):
            module.training = old.training
        found: nn.Module = student
        return found
