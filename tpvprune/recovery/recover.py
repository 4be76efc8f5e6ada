"""The recovery verb: means or closed form, then (if asked) Gauss-Newton and batch norms, then distillation."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from tpvprune.batches import Batch, Progress, Selector, inputs_of, repeatable
from tpvprune.copies import check_bare, copied
from tpvprune.digests import samples_digest
from tpvprune.errors import CheckpointError
from tpvprune.kinds import as_verb
from tpvprune.processes import process
from tpvprune.recovery.batchnorm import reestimate_batchnorm
from tpvprune.recovery.denseinputs import fold_means
from tpvprune.recovery.finetune import Log, finetune
from tpvprune.recovery.gaussnewton import refine
from tpvprune.recovery.origin import began_with
from tpvprune.recovery.reconstruct import Reconstruct, reconstruct
from tpvprune.recovery.replay import draws_kept
from tpvprune.recovery.settings import Finetune, GaussNewton
from tpvprune.recovery.state import load_state, save_state
from tpvprune.statedicts import fill

CLOSED_FORM = Reconstruct()
DISTILLATION = Finetune()
REFITTED = "refitted.safetensors"


@as_verb
def recover(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    teacher: nn.Module,
    reconstruct_with: Reconstruct | None = CLOSED_FORM,
    refine_with: GaussNewton | None = None,
    refine_batches: Iterable[Batch] | None = None,
    fold: bool = False,
    batchnorm: bool = False,
    finetune_with: Finetune | None = DISTILLATION,
    finetune_batches: Iterable[Batch] | None = None,
    held_out: Iterable[Batch] | None = None,
    save: str | PathLike[str] | None = None,
    output: Selector = None,
    progress: Progress | None = None,
    log: Log | None = None,
) -> nn.Module:
    """A copy of a pruned model with as much of its accuracy back as unlabeled batches give.

    Args:
        model: from `apply`.
        batches: unlabeled; a list or a DataLoader.
        teacher: the dense model.
        reconstruct_with: settings of the closed form; None leaves it out.
        refine_with: settings of the Gauss-Newton refit that follows the closed form; left out by default.
        refine_batches: other (augmented) batches for it.
        fold: whether to add the means of what has left to biases first: the cheapest recovery, of no use before a
            closed form.
        batchnorm: whether to re-estimate batch-norm statistics before fine-tuning.
        finetune_with: settings of the distillation; None leaves it out.
        finetune_batches: other (more, or augmented) batches for the distillation.
        held_out: other batches, which the distillation's best model is chosen and its `patience` counted on.
        save: a folder for the refitted model and the distillation's state; what is found there of the same refits of
            the same model on the same images is gone on with. Images that come out different each time they are read,
            as augmented ones do, cannot be told from others: refits on such are taken to be of these. See `finetune`.
        output: which part of what the models return the distillation compares; see `finetune`.
        progress: called as `progress(stage, done, total)`.
        log: receives what the closed form and the Gauss-Newton refit cost, and the distillation's loss per epoch.

    Raises:
        PlanError: the model carries no plan, or the teacher is another model.
        DataError: the batches are empty, or can be read once only and must be read more often.
        CheckpointError: the folder holds the same refits on other images, or another distillation.
    """
    repeatable(batches, "recovery reads them several times")
    if refine_with is not None or finetune_with is not None:
        check_bare(model, "recover")
    way = (fold, reconstruct_with, refine_with, batchnorm)
    chosen = batches if refine_batches is None else refine_batches
    direct = fold or reconstruct_with is not None or batchnorm
    read = ([batches] if direct else []) + ([] if refine_with is None or (direct and chosen is batches) else [chosen])
    kept = None if save is None or not read else Path(save) / REFITTED
    began: dict[str, Any] = {}
    if kept is not None:
        began = {"refits": repr(way), **began_with(model, teacher), "images": [_images(source) for source in read]}
    small = None if kept is None else _refitted(kept, began, model)
    if small is None:
        small = model
        if fold:
            small = fold_means(small, batches, teacher, progress=progress)
        if reconstruct_with is not None:
            small = reconstruct(small, batches, teacher, reconstruct_with, progress=progress, log=log)
        if refine_with is not None:
            small = refine(small, chosen, teacher, refine_with, progress=progress, log=log)
        if batchnorm:
            small = reestimate_batchnorm(small, batches, progress=progress)
        if kept is not None and process()[0] == 0:
            save_state(kept, {"began": began, "model": small.state_dict()})
    if finetune_with is not None:
        source = batches if finetune_batches is None else finetune_batches
        small = finetune(
            small,
            source,
            teacher,
            finetune_with,
            output=output,
            held_out=held_out,
            save=save,
            progress=progress,
            log=log,
        )
    return small


def _images(batches: Iterable[Batch]) -> str | None:
    """A fingerprint of the images, in any order; None where they are others each time, or shares of one process."""
    if getattr(batches, "shared", False):
        return None
    with draws_kept(batches):
        times = 1 if isinstance(batches, (list, tuple)) else 2
        found = {sum(samples_digest(inputs_of(batch)) for batch in batches) for _ in range(times)}
    return f"{found.pop():x}" if len(found) == 1 else None


def _refitted(kept: Path, began: dict[str, Any], model: nn.Module) -> nn.Module | None:
    """What the same refits made of the same model before; None if there is nothing of the kind.

    Made anew it would differ in its last bits with other threads or on another machine, and a distillation goes on with
    what it began with alone.

    Raises:
        CheckpointError: they were made on other images.
    """
    if not kept.is_file():
        return None
    state = load_state(kept)
    had = state["began"]
    if "images" not in had or {**had, "images": None} != {**began, "images": None}:
        return None
    if had["images"] != began["images"]:
        raise CheckpointError(
            f"recover: {kept} holds what was refitted on other images; give another folder, delete it, or give the "
            "images that it was refitted on"
        )
    small = copied(model)
    fill(small, state["model"])
    return small
