"""Closed-form recovery: refit what is left of each layer to what the dense layer gave.

For every layer that reads pruned units or has masked weights, in execution order, the kept weights and the
bias solve a ridge regression: on the pruned network's own inputs (the layers before already refitted), come as
close as possible to the dense layer's outputs on the same unlabeled images. Reconstruction by least squares:
He 2017 (arXiv 1707.06168), Luo 2017 (arXiv 1707.06342); sequential and shrunk toward the kept weights
as in section 5 of the design.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, Progress, evaluation_mode, model_inputs
from tpvprune.copies import copied
from tpvprune.errors import InputError, PlanError
from tpvprune.kinds import as_verb
from tpvprune.plan import Plan
from tpvprune.reads import ThroughLayers, read_by
from tpvprune.recovery.axes import align
from tpvprune.recovery.denseinputs import refit_on_dense_inputs
from tpvprune.recovery.fits import Fit, consumers, fitting_plan, say_left
from tpvprune.recovery.linear import refittable
from tpvprune.recovery.lockstep import Strand, strands
from tpvprune.recovery.order import Course, course

logger = logging.getLogger(__name__)
MOST_STRANDS = 16
MIB = 1 << 20
Told = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Reconstruct:
    """Settings of the closed form.

    Attributes:
        ridge: pull toward the kept weights, as a share of the mean input variance of the layer; "auto" takes for each
            layer the one of 1e-4 to 1, in powers of ten, that does best on the half of the samples it was not fitted
            to.
        inputs: "pruned" fits each layer to the inputs that the refitted layers before it give, "dense" to those of
            the dense model, all layers from one pass: cheaper, and blind to errors that pile up.
        sums: where a layer's output is added to a stream, as in a residual block, come close to the dense model's sum,
            so that what the stream lacks already is made up for. Of no effect on dense inputs.
        every: refit all layers behind the first that reads pruned units, not only those that read some.
        positions: of a sample's positions (pixels, tokens) of a layer, at most so many are fitted to: neighbours say
            much the same, and the products over all of them are what a refit takes its time for.
        memory: MiB of activations that are kept in memory between layers; what goes beyond lies in temporary files.
    """

    ridge: float | Literal["auto"] = 1e-2
    inputs: Literal["pruned", "dense"] = "pruned"
    sums: bool = True
    every: bool = False
    positions: int = 1024
    memory: float = 1024.0

    def __post_init__(self) -> None:
        number = isinstance(self.ridge, (int, float)) and math.isfinite(self.ridge) and self.ridge >= 0
        if self.ridge != "auto" and not number:
            raise InputError(f"ridge={self.ridge} must be zero or more, or 'auto'")
        if self.inputs not in ("pruned", "dense"):
            raise InputError(f"inputs={self.inputs!r} must be 'pruned' or 'dense'")
        if not (isinstance(self.positions, int) and self.positions >= 1):
            raise InputError(f"positions={self.positions!r} must be a whole number from 1")
        if not self.memory >= 0:
            raise InputError(f"memory={self.memory} must be a number of MiB, zero or more")


@as_verb
def reconstruct(
    model: nn.Module,
    batches: Iterable[Batch],
    teacher: nn.Module,
    settings: Reconstruct | None = None,
    *,
    progress: Progress | None = None,
    log: Told | None = None,
) -> nn.Module:
    """A copy of a pruned model with its consumer layers refitted to the dense one's outputs.

    Behind a skipped block every layer is refitted: what it reads has changed, whatever units it has left.

    Costs one forward pass of the dense network over the batches, one of the pruned one and one more of its refitted
    layers, plus Gram matrices and solves. Between layers the passes over all batches are suspended; what they hold is
    kept in memory up to a bound, and in temporary files beyond it. Masked weights stay zero: each output is
    refitted over the weights that are left to it. Frozen parameters (`requires_grad=False`) are refitted like all
    others: leaving units out has changed what they are to do. A layer that runs several times in a
    pass is refitted to all that it reads, by a pass of both networks more.

    Args:
        model: from `apply`; carries its plan.
        batches: unlabeled; labels are not looked at.
        teacher: the dense model the plan was made for.
        settings: how strongly to shrink, and toward what.
        progress: called as `progress("reconstruct", layers_done, layers_to_do)`.
        log: receives `{"layers", "samples", "memory_mib", "file_mib", "seconds"}` at the end; MiB are the most
            activations that were held at any time.

    Raises:
        PlanError: the model carries no plan, or the teacher is another model; or batches take different paths.
        NonFiniteError: a layer is given NaN or infinity.
    """
    settings, start = settings or Reconstruct(), time.perf_counter()
    plan = fitting_plan(model, teacher, "reconstruct")
    inputs = _merged(list(model_inputs(model, batches, "reconstruct", None)))
    small = copied(model)
    with evaluation_mode(small, teacher), torch.no_grad():
        able, behind = refittable(small), _skipped(plan)
        names = consumers(plan, able)
        if settings.every:
            behind += names
        way = course(small, inputs[0], names, able, behind)
        goal = course(teacher, inputs[0], way.calls)
        say_left(plan, way, "reconstruct")
        align(way, goal, teacher, plan, inputs[0])
        told: dict[str, float] = {"layers": len(way.calls), "samples": sum(map(len, inputs))}
        if settings.inputs == "dense":
            told |= refit_on_dense_inputs(
                small, teacher, inputs, way, plan, settings.ridge, settings.positions, progress
            )
        else:
            told |= _in_turn(small, teacher, inputs, way, goal, plan, settings, progress)
    told["seconds"] = round(time.perf_counter() - start, 2)
    logger.info("reconstruct: %s", ", ".join(f"{name} {value:g}" for name, value in told.items()))
    if log:
        log(told)
    return small


def _in_turn(
    small: nn.Module,
    teacher: nn.Module,
    inputs: list[Tensor],
    way: Course,
    goal: Course,
    plan: Plan,
    settings: Reconstruct,
    progress: Progress | None,
) -> dict[str, float]:
    """Refit layer after layer, all passes waiting at each."""
    both = [name for name in way.layers if settings.sums and name in way.sums and name in goal.sums]
    summed = {name for name in both if way.sums[name].share == goal.sums[name].share}
    firsts = [sum(map(len, inputs[:i])) for i in range(len(inputs))]
    limit = settings.memory * MIB
    memory = file = 0.0
    with ExitStack() as stack:
        known, wanted = ({c.sums[name].other for name in summed} for c in (way, goal))
        students = stack.enter_context(strands(small, inputs, way.layers, "input", known))
        masters = stack.enter_context(strands(teacher, inputs, way.layers, "output", wanted))
        layers = list(way.calls)
        for done, (layer, calls) in enumerate(way.calls.items(), 1):
            fit = Fit(small, teacher, layer, way, plan, settings.ridge == "auto", settings.positions)
            if calls > 1:
                _all_calls(fit, small, teacher, inputs, firsts)
            else:
                held = spilled = 0.0
                for student, master, first, batch in zip(students, masters, firsts, inputs, strict=True):
                    names = {student.advance(), master.advance()}
                    if names != {layer}:
                        told = sorted(map(str, {layer, *names}))
                        raise PlanError(f"batches take different paths through the model, at {told}")
                    assert student.value is not None
                    assert master.value is not None
                    later = summed & set(layers[done:])
                    lacks = _lacks(fit, student, master, way, goal, later) if layer in summed else None
                    fit.add(student.value, master.value, len(batch), first, lacks)
                    own = student.held() + master.held()
                    memory = max(memory, held + own)
                    if held + own > limit:
                        spilled += student.spill() + master.spill()
                    else:
                        held += own
                file = max(file, spilled)
            fit.finish(settings.ridge)
            if progress:
                progress("reconstruct", done, len(way.calls))
    return {"memory_mib": round(memory / MIB, 2), "file_mib": round(file / MIB, 2)}


def _all_calls(fit: Fit, small: nn.Module, teacher: nn.Module, inputs: Sequence[Tensor], firsts: Sequence[int]) -> None:
    """Add what a layer that runs several times reads and is to give each time, from a pass of its own."""
    mine, dense = (model.get_submodule(fit.name) for model in (small, teacher))
    read: list[Tensor] = []
    given: list[Tensor] = []
    with ExitStack() as hooks:  # copies: what follows may write into either
        hooks.enter_context(
            mine.register_forward_pre_hook(lambda _, a, k: read.append(read_by(a, k).clone()), with_kwargs=True)
        )
        hooks.enter_context(dense.register_forward_hook(lambda _, args, output: given.append(output.clone())))
        for batch, first in zip(inputs, firsts, strict=True):
            for model in (small, teacher):
                with ThroughLayers(model):
                    model(batch)
            if len(read) != len(given):
                raise PlanError(f"{fit.name} runs {len(read)} times in the model and {len(given)} in the teacher")
            for value, target in zip(read, given, strict=True):
                fit.add(value, target, len(batch), first)
            read.clear()
            given.clear()


def _lacks(fit: Fit, student: Strand, master: Strand, way: Course, goal: Course, later: Collection[str]) -> Tensor:
    """What a layer's output is to make up for: what it is added to, in the dense model and in the pruned one.

    Args:
        fit: of the layer.
        student: a pass of the pruned model, which has come to the layer.
        master: one of the dense model.
        way: of the pruned model.
        goal: of the dense model.
        later: layers whose turn is yet to come, and which may be added to the same.
    """
    found = []
    for strand, course_of in ((master, goal), (student, way)):
        other = course_of.sums[fit.name].other
        value = strand.kept.get(other)
        if value is None:
            raise PlanError(f"batches take different paths through the model, before {fit.name}; give sums=False")
        if all(course_of.sums[name].other != other for name in later):
            del strand.kept[other]
        found.append(value)
    wanted, there = found
    return fit.before_norm(fit.cut(wanted) - there) * way.sums[fit.name].share


def _merged(inputs: list[Tensor]) -> list[Tensor]:
    """The same samples in at most `MOST_STRANDS` batches: each takes a thread per network."""
    if len(inputs) <= MOST_STRANDS or len({(t.shape[1:], t.dtype) for t in inputs}) > 1:
        return inputs
    size = math.ceil(len(inputs) / MOST_STRANDS)
    return [torch.cat(inputs[i : i + size]) for i in range(0, len(inputs), size)]


def _skipped(plan: Plan) -> list[str]:
    """Blocks in whose place an identity stands."""
    return [name for name, keep in plan.keep.items() if plan.graph[name].kind == "block" and not bool(keep.any())]
