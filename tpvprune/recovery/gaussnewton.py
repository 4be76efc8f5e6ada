"""Gauss-Newton refit of all layers at once, toward what the dense model's layers read.

The closed form fits a layer with all others held, so that a first layer cannot give way to a second. Here all
parameters move together, toward the inputs of every linear layer and convolution of the dense model, on the same
unlabeled images. Each step linearises the network and solves the damped least-squares problem that is left by conjugate
gradients, from products with the Jacobian and its transpose (Schraudolph 2002, doi 10.1162/08997660260028683; Martens
2010). Their convergence comes from a Kronecker-factored preconditioner (Martens and Grosse 2015, arXiv 1503.05671;
convolutions as in Grosse and Martens 2016, arXiv 1602.01407). There is no learning rate, and nothing is drawn but the
signs that the preconditioner is estimated with.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError

from tpvprune.batches import Batch, Progress, evaluation_mode, model_inputs, plain_attention, repeatable
from tpvprune.copies import check_bare, copied
from tpvprune.errors import ModelError, NonFiniteError
from tpvprune.kinds import as_verb
from tpvprune.recovery.fits import fitting_plan
from tpvprune.recovery.kronecker import Factors, Vector
from tpvprune.recovery.matching import LENGTHS, Task
from tpvprune.recovery.reconstruct import Told
from tpvprune.recovery.settings import GaussNewton

logger = logging.getLogger(__name__)
CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing")  # timm's, Transformers'


@as_verb
def refine(
    model: nn.Module,
    batches: Iterable[Batch],
    teacher: nn.Module,
    settings: GaussNewton | None = None,
    *,
    progress: Progress | None = None,
    log: Told | None = None,
) -> nn.Module:
    """A copy of a pruned model, best refitted in closed form before, with all its parameters moved together.

    What is minimised is, summed over the distinct inputs of linear layers and convolutions, the squared distance to
    those of the dense model (the channels that are left) over their variance. Where a layer reads one position a
    sample and others read more, as a classifier does, what was pooled for it is compared in its place. Layers that
    nothing of the kind follows, as a classifier, keep their weights; masked weights stay zero. A step of which no
    length helps ends it early.

    Each step costs one forward and backward pass over the batches, `iterations` of about one and a half such, and one
    to three forward ones of both networks. Memory is that of two to three forward and backward passes over one batch,
    and the batches.

    Args:
        model: from `apply` or `reconstruct`; carries its plan.
        batches: unlabeled; labels are not looked at. Read once a step: a loader that augments gives each step other
            images, which helps where there are few.
        teacher: the dense model the plan was made for.
        settings: how many steps, and how strongly to hold on to the weights.
        progress: called as `progress("refine", passes_done, most_passes)`.
        log: receives `{"steps", "samples", "before", "after", "seconds"}`: what is minimised, in the mean over inputs,
            before the first step and after the last.

    Raises:
        PlanError: the model carries no plan, or the teacher is another model.
        ModelError: nothing can be compared, or an operation of the model has no forward derivative, or parts of it
            are run again in the backward pass by a switch of its own.
        NonFiniteError: the model's activations are not finite.
        DataError: there is no batch, or they can be read once only.
    """
    settings, start = settings or GaussNewton(), time.perf_counter()
    check_bare(model, "refine")
    plan = fitting_plan(model, teacher, "refine")
    repeatable(batches, "every step reads them")
    small = copied(model)
    samples, losses = 0, []
    with evaluation_mode(small, teacher), plain_attention(), _all_kept(small), torch.no_grad():
        for step in range(settings.steps):
            inputs = list(model_inputs(model, batches, "refine", None))
            task = Task(small, teacher, plan, inputs, settings, progress, step)
            before, after, moved = _stepped(task, settings)
            losses += [before, after]
            samples = sum(map(len, inputs))
            if not moved:
                logger.info("refine: step %d helped at none of the lengths that were tried", step + 1)
                break
            for name, value in small.named_parameters():
                if name in moved:
                    value.copy_(moved[name])
    told = {
        "steps": len(losses) // 2,
        "samples": samples,
        "before": losses[0],
        "after": losses[-1],
        "seconds": round(time.perf_counter() - start, 2),
    }
    logger.info("refine: %s", ", ".join(f"{name} {value:g}" for name, value in told.items()))
    if log:
        log(told)
    return small


@contextmanager
def _all_kept(model: nn.Module) -> Iterator[None]:
    """Without activation checkpointing, which runs parts of a model again where their parameters are its own.

    Raises:
        ModelError: there is some that no switch as timm's or Transformers' has turned off.
    """
    switches = [(m, key) for m in model.modules() for key in CHECKPOINTING if getattr(m, key, None) is True]
    try:
        for module, key in switches:
            setattr(module, key, False)
        yield
    except CheckpointError as error:
        raise ModelError(
            "refine: the model runs parts of itself again in the backward pass (torch.utils.checkpoint); switch that "
            "off for the refit"
        ) from error
    finally:
        for module, key in switches:
            setattr(module, key, True)


def _stepped(task: Task, settings: GaussNewton) -> tuple[float, float, Vector]:
    """The loss in the mean over points before and after a step, and where it leads; nowhere if no length helps."""
    theta = task.start
    loss, gradient = task.gradient(theta)
    if not math.isfinite(loss):
        raise NonFiniteError("refine: activations are not finite; check the images and the pruned model")
    direction = _conjugate_gradients(
        lambda vector: task.curved(theta, vector),
        {name: -value for name, value in gradient.items()},
        task.factors(theta),
        settings.iterations,
    )
    moved, after = _best(task, theta, direction, loss, -_dot(gradient, direction)) or ({}, loss)
    return loss / len(task.points), after / len(task.points), moved


def _best(task: Task, theta: Vector, direction: Vector, loss: float, expected: float) -> tuple[Vector, float] | None:
    """The whole step if it lowers the loss by half of what is expected.

    Otherwise the first length after which a shorter one is no better; None if none lowers the loss.
    """
    found: tuple[Vector, float] | None = None
    for length in LENGTHS:
        there = {name: value + length * direction[name] for name, value in theta.items()}
        after = task.loss(there)
        if not after < (loss if found is None else found[1]):
            if found is not None:
                break
            continue
        found = there, after
        if length == 1 and loss - after >= expected / 2:
            break
    return found


def _conjugate_gradients(
    product: Callable[[Vector], Vector], right: Vector, factors: Factors, iterations: int
) -> Vector:
    """Solve `product(x) = right` approximately, from zero."""
    found = {name: torch.zeros_like(value) for name, value in right.items()}
    left, ready = dict(right), factors.solve(right)
    toward, size = dict(ready), _dot(right, ready)
    for _ in range(iterations):
        if not size > 0:
            break
        image = factors.damped(product(toward), toward)
        bend = _dot(toward, image)
        if not bend > 0:
            break
        found = _plus(found, size / bend, toward)
        left = _plus(left, -size / bend, image)
        ready = factors.solve(left)
        size, before = _dot(left, ready), size
        toward = _plus(ready, size / before, toward)
    return found


def _dot(one: Vector, other: Vector) -> float:
    return sum(float((value.double() * other[name].double()).sum()) for name, value in one.items())


def _plus(one: Vector, times: float, other: Vector) -> Vector:
    return {name: value + times * other[name] for name, value in one.items()}
