"""A run's recovery: refitted once, then distilled; what a stop interrupts is gone on with.

The refitted model, what was told of it and of every epoch, and the state of the distillation lie in one folder until
the stage is done.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tpvprune.batches import Progress, device_of
from tpvprune.checkpoint import load, save
from tpvprune.files import write_text
from tpvprune.inputs import Inputs
from tpvprune.processes import process
from tpvprune.recipe import Recipe
from tpvprune.recovery.recover import recover
from tpvprune.recovery.settings import Finetune
from tpvprune.types import read_json
from tpvprune.zoo.pool import Pool
from tpvprune.zoo.streams import Stream

TOLD = "told.json"
HELD = 1000  # images kept back at the most


def kept_back(recipe: Recipe, scored: Pool | Stream) -> tuple[Pool | Stream, Pool | Stream | None]:
    """The images to recover on, and those that tell whether distillation has brought the model any closer.

    A tenth as many as are distilled on are kept back from all of the recovery: at the most 1,000, of few images eight,
    or a quarter. None where nothing is distilled.
    """
    tuning = recipe.recover.finetune
    if tuning is None:
        return scored, None
    learnt = min(len(scored), tuning.samples or len(scored))
    held = min(HELD, max(learnt // 10, min(8, learnt // 4)))
    if not held:
        return scored, None
    taken = scored.sample(max(learnt, _refitted_on(recipe) or len(scored)) + held, recipe.seed)
    order = torch.randperm(len(taken), generator=torch.Generator().manual_seed(recipe.seed))
    back = frozenset(order[:held].tolist())
    return taken.part(lambda place: place not in back), taken.part(lambda place: place in back)


def refitted(recipe: Recipe, scored: Pool | Stream) -> Pool | Stream:
    """The images that layers are refitted on."""
    return kept_back(recipe, scored)[0].sample(_refitted_on(recipe), recipe.seed)


def _refitted_on(recipe: Recipe) -> int | None:
    """At most how many images; None for all."""
    closed = recipe.recover.reconstruct
    samples: int | None = recipe.score.samples if closed is None else closed.samples
    return samples


@dataclass(frozen=True)
class Recovery:
    """The recovery that a recipe asks for.

    Attributes:
        recipe: what to do.
        inputs: the teacher, and the images that may be looked at.
        partial: a folder for what is done so far.
        progress: called as `progress(stage, done, total)`.
        log: receives one line an epoch.
    """

    recipe: Recipe
    inputs: Inputs
    partial: Path
    progress: Progress | None
    log: Callable[[str], None]

    def refitted(self, pruned: Path) -> tuple[dict[str, Any], nn.Module]:
        """What is told of the recovery, and the model, before anything is distilled.

        Args:
            pruned: where the model that was cut is saved.
        """
        if (self.partial / TOLD).is_file():
            return self._kept()
        told, small = self._refit(load(pruned).to(device_of(self.inputs.dense)))
        if self.recipe.distillation() is not None:  # which takes long, and begins from here after a stop
            save(small, self.partial)
            self._keep(told)
        return told, small

    def distilled(self) -> tuple[dict[str, Any], nn.Module]:
        """The same once what was refitted is distilled; several processes do it together."""
        told, small = self._kept()
        settings = self.recipe.distillation()
        assert settings is not None
        return told, self._distil(small, settings, told)

    def _kept(self) -> tuple[dict[str, Any], nn.Module]:
        told = dict(read_json(self.partial / TOLD, "record of a recovery"))
        return told, load(self.partial).to(device_of(self.inputs.dense))

    def _refit(self, small: nn.Module) -> tuple[dict[str, Any], nn.Module]:
        told: dict[str, Any] = {"steps": []}
        closed, section = self.recipe.closed_form(), self.recipe.recover
        newton = self.recipe.gauss_newton()
        if closed is None and newton is None and not section.fold and not section.batchnorm:
            return told, small
        pool = refitted(self.recipe, self.inputs.images.scored)
        varied = None
        if newton is not None:
            self._seed()
            augment = cast(Any, section.refine).augment
            varied = self.inputs.loader(pool, train=True, augment=augment)
        small = recover(
            small,
            self.inputs.loader(pool),
            teacher=self.inputs.dense,
            reconstruct_with=closed,
            refine_with=newton,
            refine_batches=varied,
            fold=section.fold,
            batchnorm=section.batchnorm,
            finetune_with=None,
            progress=self.progress,
            log=lambda cost: told.__setitem__("refine" if "after" in cost else "closed_form", cost),
        )
        told["steps"] += ["fold"] if section.fold else []
        told["steps"] += ["reconstruct"] if closed is not None else []
        told["steps"] += ["refine"] if newton is not None else []
        told["steps"] += ["batchnorm"] if section.batchnorm else []
        told["reconstruct_images"] = len(pool)
        return told, small

    def _distil(self, small: nn.Module, settings: Finetune, told: dict[str, Any]) -> nn.Module:
        tuning: Any = self.recipe.recover.finetune
        rest, held = kept_back(self.recipe, self.inputs.images.scored)
        learnt = rest.sample(tuning.samples, self.recipe.seed)
        self._seed()
        told.setdefault("epochs", [])
        small = recover(
            small,
            self.inputs.loader(learnt, batch_size=tuning.batch_size, train=True, augment=tuning.augment),
            teacher=self.inputs.dense,
            reconstruct_with=None,
            finetune_with=settings,
            held_out=None if held is None else self.inputs.dealt(held),
            save=self.partial,
            progress=self.progress,
            log=lambda found: self._tell_epoch(told, found),
        )
        best = min((epoch.get("held_out", -math.inf) for epoch in told["epochs"]), default=-math.inf)
        before = told["epochs"][-1].get("held_out_before", 0.0) if told["epochs"] else 0.0
        if best < before:
            told["steps"].append("finetune")
            told["finetune_images"] = len(learnt)
        else:
            told["left_out"] = (
                f"finetune, because on {len(held or ())} images kept back no epoch came closer to the dense model "
                f"({best:.3g} at best) than the model was before ({before:.3g})"
            )
        return small

    def _tell_epoch(self, told: dict[str, Any], found: dict[str, float]) -> None:
        told["epochs"] = [epoch for epoch in told["epochs"] if epoch["epoch"] < found["epoch"]] + [found]
        self._keep(told)
        held = ""
        if "held_out" in found:
            held = f", held-out {found['held_out']:.4g} (before: {found['held_out_before']:.4g})"
        self.log(
            f"epoch {found['epoch']}: loss {found['loss']:.4g}{held}, {found['samples_per_second']:.0f} images/s, "
            f"at most {found['seconds_left']:.0f} s left"
        )

    def _seed(self) -> None:
        """Of what augmentation draws: torchvision from torch, timm from Python; in each process something else."""
        seed = self.recipe.seed + process()[0]
        torch.manual_seed(seed)
        random.seed(seed)

    def _keep(self, told: dict[str, Any]) -> None:
        if process()[0] == 0:
            write_text(self.partial / TOLD, json.dumps(told))
