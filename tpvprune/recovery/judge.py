"""What a distillation has brought, on batches that it does not learn from."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, Selector, device_of, evaluation_mode, inputs_of, labels_of, single_tensor
from tpvprune.errors import DataError
from tpvprune.recovery.classes import class_labels
from tpvprune.recovery.distance import distillation_loss
from tpvprune.recovery.settings import Finetune
from tpvprune.recovery.teacher import Teacher

logger = logging.getLogger(__name__)


class Judge:
    """Which model is closest to the teacher on held-out batches: the one given, or that of an epoch.

    Args:
        batches: the held-out batches; labels in them count as they do in training.
        teacher: gives the dense model's answers.
        settings: of the distillation.
        output: which part of what the models return is compared.
        accelerator: Accelerate's, of the run; all its processes judge alike.

    Attributes:
        before: distance of the model given.
        best: least distance of an epoch.
        waited: epochs since that one.
        closest: state of the closest model.
    """

    def __init__(
        self, batches: Iterable[Batch], teacher: Teacher, settings: Finetune, output: Selector, accelerator: Any
    ) -> None:
        self._batches, self._teacher, self._settings, self._output = batches, teacher, settings, output
        self._accelerator = accelerator
        self.before, self.best, self.waited = math.inf, math.inf, 0
        self.closest: dict[str, Tensor] = {}

    def begin(self, model: nn.Module) -> None:
        """Measure the model that the distillation begins with."""
        self.before = self._distance(model)
        self._remember(model)

    def after_epoch(self, model: nn.Module) -> tuple[float, bool]:
        """The distance of an epoch's model, and whether none was closer."""
        found = self._distance(model)
        closest = found < min(self.best, self.before)
        if closest:
            self._remember(model)
        self.waited = 0 if found < self.best else self.waited + 1
        self.best = min(self.best, found)
        return found, closest

    def decided(self) -> dict[str, Tensor]:
        """State of the closest model, with a warning where no epoch was closer than what was given."""
        if self.best >= self.before:
            logger.warning(
                "finetune: no epoch came closer to the dense model's answers to held-out images (%.4g at best) than "
                "the model was before (%.4g), which is given back; lower lr=%g, or give more images",
                self.best,
                self.before,
                self._settings.lr,
            )
        return self.closest

    def to_state(self) -> dict[str, Any]:
        """What `restore` goes on from."""
        return {"before": self.before, "best": self.best, "waited": self.waited, "closest": self.closest}

    def restore(self, state: dict[str, Any]) -> None:
        """Be as the judge was whose state this is."""
        self.before, self.best, self.waited = state["before"], state["best"], state["waited"]
        self.closest = state["closest"]

    def _remember(self, model: nn.Module) -> None:
        self.closest = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def _distance(self, model: nn.Module) -> float:
        device, weight, total, samples = device_of(model), self._settings.label_weight, 0.0, 0
        with evaluation_mode(model), self._accelerator.autocast():
            for batch in self._batches:
                inputs, labels = inputs_of(batch).to(device), labels_of(batch) if weight else None
                mine, wanted = single_tensor(model(inputs), model, self._output), self._teacher(inputs)
                if labels is None or bool((labels < 0).any()):
                    known = None
                else:
                    known = class_labels(labels, len(inputs), mine.shape[1:]).to(device)
                total += float(distillation_loss(mine, wanted, 1.0, known, weight)) * len(inputs)
                samples += len(inputs)
        sums = torch.tensor([total, samples], dtype=torch.float64, device=device)
        total, samples = self._accelerator.reduce(sums, "sum").tolist()
        if samples == 0:
            raise DataError("finetune: there is no held-out batch; give at least one")
        return total / samples
