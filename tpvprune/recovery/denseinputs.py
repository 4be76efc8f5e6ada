"""What the dense model's own inputs give: refits of all layers from one pass, and the mean of what has left.

Removing units from a layer's input takes away their part of its outputs. On the dense model's inputs that part is
known exactly, for all layers at once, without the pruned model ever running as a whole. The least that can be done
about it is to add its mean to the bias (mean folding); the most is a regression on the inputs that are left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, Progress, evaluation_mode, model_inputs
from tpvprune.copies import copied
from tpvprune.kinds import as_verb
from tpvprune.patches import channel_axis
from tpvprune.plan import Plan
from tpvprune.reads import ThroughLayers, read_by
from tpvprune.recovery.axes import align
from tpvprune.recovery.fits import Fit, consumers, fitting_plan, kept_inputs, say_left
from tpvprune.recovery.linear import foldable, width
from tpvprune.recovery.order import Course, course

logger = logging.getLogger(__name__)
MOST_PASSES = 8
GRAMS = 1 << 30  # bytes of Gram matrices that are summed in one pass


@as_verb
def fold_means(
    model: nn.Module, batches: Iterable[Batch], teacher: nn.Module, *, progress: Progress | None = None
) -> nn.Module:
    """A copy of a pruned model with the mean of what each layer has lost added to its bias.

    For each layer that reads pruned units or has masked weights: the mean, over samples and positions, of what those
    units and weights gave on the dense model's inputs. A layer without a bias hands it to the running mean of the
    batch norm that reads it. One forward pass of the dense model, no solve: the cheapest recovery there is, and
    weaker than `reconstruct`, which moves biases too and needs no folding before it.

    Args:
        model: from `apply`; carries its plan.
        batches: unlabeled; labels are not looked at.
        teacher: the dense model the plan was made for.
        progress: called as `progress("fold", batches_done, batches_to_do)`.

    Raises:
        PlanError: the model carries no plan, or the teacher is another model.
        DataError: there is no batch.
        NonFiniteError: a layer is given NaN or infinity.
    """
    plan = fitting_plan(model, teacher, "fold_means")
    small = copied(model)
    with evaluation_mode(small, teacher), torch.no_grad():
        way: Course | None = None
        fits: dict[str, Fit] = {}
        lost: dict[str, Tensor] = {}
        rows: dict[str, int] = {}
        for inputs in model_inputs(small, batches, "fold", progress):
            if way is None:
                way = course(small, inputs, consumers(plan, foldable(small)))
                say_left(plan, way, "fold_means")
                align(way, course(teacher, inputs, way.calls), teacher, plan, inputs)
                fits = {name: Fit(small, teacher, name, way, plan, halves=False) for name in way.calls}

            def take(fit: Fit, value: Tensor, output: Tensor) -> None:
                mean = fit.mean_lost(value, output)
                lost[fit.name] = lost.get(fit.name, torch.zeros_like(mean)) + mean * len(output)
                rows[fit.name] = rows.get(fit.name, 0) + len(output)

            _dense_pass(teacher, inputs, fits, plan, take)
    for name, fit in fits.items():
        if not fit.move(lost[name] / rows[name]):
            logger.info("%s has no bias and no norm behind it: what it lost is not folded", name)
    return small


def refit_on_dense_inputs(
    small: nn.Module,
    teacher: nn.Module,
    inputs: Sequence[Tensor],
    way: Course,
    plan: Plan,
    ridge: float | Literal["auto"],
    positions: int,
    progress: Progress | None,
) -> dict[str, float]:
    """Refit all layers of `small` in place, as many from one pass of the dense model as Gram matrices fit in memory."""
    portions = _portions(small, list(way.calls), 2 if ridge == "auto" else 1)
    done = 0
    for names in portions:
        fits = {name: Fit(small, teacher, name, way, plan, ridge == "auto", positions) for name in names}
        first = 0
        for batch in inputs:

            def take(fit: Fit, value: Tensor, output: Tensor, samples: int = len(batch), first: int = first) -> None:
                fit.add(value, output, samples, first)

            _dense_pass(teacher, batch, fits, plan, take)
            first += len(batch)
        for fit in fits.values():
            fit.finish(ridge)
            done += 1
            if progress:
                progress("reconstruct", done, len(way.calls))
    return {"passes": len(portions)}


def _dense_pass(
    teacher: nn.Module,
    inputs: Tensor,
    fits: Mapping[str, Fit],
    plan: Plan,
    take: Callable[[Fit, Tensor, Tensor], None],
) -> None:
    """Run the dense model and hand over, for each layer, those of its inputs that are left, and its output."""

    def hook(fit: Fit) -> Any:
        def seen(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            value = read_by(args, kwargs)
            kept = kept_inputs(plan, layer, fit.name).to(value.device)
            take(fit, fit.other_axes(value.index_select(channel_axis(layer) % value.ndim, kept)), output)

        return seen

    with ExitStack() as hooks:
        for name, fit in fits.items():
            hooks.enter_context(teacher.get_submodule(name).register_forward_hook(hook(fit), with_kwargs=True))
        with ThroughLayers(teacher):
            teacher(inputs)


def _portions(small: nn.Module, names: Sequence[str], halves: int) -> list[list[str]]:
    """Layers that share a pass: as many as there is memory for, in at most `MOST_PASSES` portions."""

    def size(name: str) -> int:
        weight: Tensor = small.get_submodule(name).weight  # type: ignore[assignment]  # a layer's weight is a tensor
        groups = int(getattr(small.get_submodule(name), "groups", 1))
        inputs = width(small.get_submodule(name))
        return 8 * halves * (groups * inputs * inputs + weight.numel())

    most = max(GRAMS, math.ceil(sum(map(size, names)) / MOST_PASSES) + max(map(size, names), default=0))
    portions: list[list[str]] = []
    left = 0
    for name in names:
        if size(name) > left:
            portions.append([])
            left = most
        portions[-1].append(name)
        left -= size(name)
    return portions
