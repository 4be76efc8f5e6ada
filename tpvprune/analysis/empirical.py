"""The empirical form: change the weights for real, and measure how far the outputs move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tpvprune.analysis.distance import squared
from tpvprune.analysis.perturbations import Bound, Change, bind
from tpvprune.batches import (
    Batch,
    Outputs,
    Progress,
    Selector,
    evaluation_mode,
    finite_outputs,
    model_inputs,
    select_output,
)
from tpvprune.errors import InputError, NonFiniteError
from tpvprune.kinds import as_verb
from tpvprune.scoring.engine import stream
from tpvprune.scoring.heads import Head, head_named


@as_verb
@torch.no_grad()
def movements(
    model: nn.Module,
    batches: Iterable[Batch],
    perturbation: Change,
    head: str | Head = "softmax",
    *,
    draws: int = 32,
    parameters: Sequence[str] | None = None,
    seed: int = 0,
    output: Selector = None,
    progress: Progress | None = None,
) -> Tensor:
    """`|| f_{w+d}(x) - f_w(x) ||^2_M` of every draw on every input, `(draws, inputs)` in float64.

    A draw depends on the seed and its number alone, so that several sets of inputs can meet the same ones. The model
    is left as it was. See `tpv` for the arguments.

    Raises:
        InputError: `draws` is no number of draws, or the perturbation cannot be drawn.
        NonFiniteError: the changed model gives NaN or infinity.
    """
    if not isinstance(draws, int) or draws < 1:
        raise InputError(f"draws={draws!r} must be a whole number from 1")
    bound, metric = bind(perturbation, model, parameters), head_named(head)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    columns = []
    with evaluation_mode(model):
        for inputs in model_inputs(model, batches, "move", progress):
            reference = finite_outputs(model, inputs, output)
            rows = [
                _moved(model, weights, bound, stream(seed, draw, 0), inputs, reference, metric, output)
                for draw in range(draws)
            ]
            columns.append(torch.stack(rows).cpu())
    return torch.cat(columns, 1)


def _moved(
    model: nn.Module,
    weights: dict[str, Tensor],
    bound: Bound,
    generator: torch.Generator,
    inputs: Tensor,
    reference: Outputs,
    head: Head,
    output: Selector,
) -> Tensor:
    changed = {name: weights[name] + d.to(weights[name]) for name, d in bound.draw(generator).items()}
    moved = squared(head, reference, select_output(functional_call(model, changed, (inputs,)), output, model))
    if not bool(torch.isfinite(moved).all()):
        raise NonFiniteError("the outputs of the perturbed model hold NaN or infinity; make the perturbation smaller")
    return moved


@torch.no_grad()
def moved_by(
    model: nn.Module,
    changed: nn.Module,
    batches: Iterable[Batch],
    head: str | Head = "softmax",
    *,
    output: Selector = None,
    progress: Progress | None = None,
) -> Tensor:
    """The same of one changed model, `(1, inputs)`: a pruned one, a rounded one."""
    metric, columns = head_named(head), []
    with evaluation_mode(model, changed):
        for inputs in model_inputs(model, batches, "move", progress):
            reference = finite_outputs(model, inputs, output)
            columns.append(squared(metric, reference, finite_outputs(changed, inputs, output)).cpu())
    return torch.cat(columns).unsqueeze(0)
