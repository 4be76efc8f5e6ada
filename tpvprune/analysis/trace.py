"""The trace form: `Tr(H C)` from unlabeled batches, to a stated precision.

Two engines, both unbiased, whose standard errors are those of the draws they made:

* `batched`: one backward pass for a few samples at a time, their cotangents independent. `g^T C g / samples` of their
  common gradient is one draw; what products of different samples add to its variance is in its spread.
* `per_sample`: the gradient of every sample, without forming most of them (`persample`); a draw is a sample.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpvprune.analysis.persample import Layers, check_layout, sample_energies
from tpvprune.analysis.perturbations import Bound, Change, Moments, Uniform, bind
from tpvprune.analysis.values import Estimate
from tpvprune.batches import Batch, Progress, Selector, finite_outputs, model_inputs
from tpvprune.errors import InputError, ModelError
from tpvprune.kinds import as_verb
from tpvprune.scoring.activations import backward
from tpvprune.scoring.engine import Parts, stream
from tpvprune.scoring.gradients import only
from tpvprune.scoring.heads import Head, head_named
from tpvprune.scoring.perturb import Isotropic
from tpvprune.scoring.probing import detached
from tpvprune.tally import Tally

logger = logging.getLogger(__name__)
Engine = Literal["auto", "batched", "per_sample"]
ROWS = 4  # samples whose gradients are added up before they are squared: more share overhead, and add to the spread
LEAST = 16  # draws before a precision is believed


@as_verb
def trace_heff(
    model: nn.Module,
    batches: Iterable[Batch],
    head: str | Head = "softmax",
    *,
    rtol: float | None = 0.05,
    parameters: Sequence[str] | None = None,
    engine: Engine = "auto",
    rows: int = ROWS,
    seed: int = 0,
    output: Selector = None,
    progress: Progress | None = None,
) -> Estimate:
    """`Tr(H) = E_x || M^(1/2) J(x) ||^2`: what independent unit noise on every weight would move the outputs by.

    Args:
        model: the model; it is left as it was.
        batches: unlabeled inputs.
        head: the metric `M`.
        rtol: stop once the standard error is at most this share of the value; None reads all batches.
        parameters: names or patterns of the parameters that count; all by default.
        engine: "batched", "per_sample", or "auto", see `trace_form`.
        rows: samples of one draw of the batched engine.
        seed: of the cotangents.
        output: which part of what the model returns counts.
        progress: called as `progress("trace", batches_done, batches_to_do)`.

    Raises:
        InputError: a setting is out of range.
        DataError: there is no batch.
    """
    return trace_form(
        model,
        batches,
        Isotropic(1.0),
        head,
        rtol=rtol,
        parameters=parameters,
        engine=engine,
        rows=rows,
        seed=seed,
        output=output,
        progress=progress,
    )


@as_verb
def trace_form(
    model: nn.Module,
    batches: Iterable[Batch],
    perturbation: Change,
    head: str | Head = "softmax",
    *,
    rtol: float | None = 0.05,
    parameters: Sequence[str] | None = None,
    engine: Engine = "auto",
    rows: int = ROWS,
    seed: int = 0,
    output: Selector = None,
    progress: Progress | None = None,
) -> Estimate:
    """`Tr(H C)` of any perturbation: the TPV to first order in its covariance.

    Args:
        model: the model; it is left as it was.
        batches: unlabeled inputs.
        perturbation: see `tpv`.
        head: the metric `M`; with the softmax head half the value is KL in nats.
        rtol: stop once the standard error is at most this share of the value; None reads all batches. Where the
            batches end before, a warning is logged and the error says how far it came.
        parameters: names or patterns of the parameters that count.
        engine: "batched" takes any model and perturbation; "per_sample" perturbations with moments, and spreads less;
            "auto" takes the second where all that moves lies in layers whose gradients have a short form: it was
            measured to be no dearer at equal precision (docs/results.md).
        rows: samples of one draw of the batched engine.
        seed: of the cotangents.
        output: which part of what the model returns counts.
        progress: called as `progress("trace", batches_done, batches_to_do)`.

    Raises:
        InputError: a setting is out of range, or the engine does not fit the perturbation.
        DataError: there is no batch.
        NonFiniteError: the model gives NaN or infinity.
    """
    if engine not in get_args(Engine):
        raise InputError(f"engine={engine!r} must be one of {', '.join(get_args(Engine))}")
    if rtol is not None and not (math.isfinite(rtol) and rtol > 0):
        raise InputError(f"rtol={rtol!r} must be above zero, or None to read all batches")
    if not isinstance(rows, int) or rows < 1:
        raise InputError(f"rows={rows!r} must be a whole number from 1")
    bound, metric = bind(perturbation, model, parameters), head_named(head)
    moments = bound.moments if isinstance(bound, Uniform) else bound
    if engine == "per_sample" and not isinstance(moments, Moments):
        raise InputError("engine='per_sample' is for perturbations with moments; use engine='batched'")
    # Parameters that no layer holds would take another pass.
    short = isinstance(moments, Moments) and not Layers(model, moments.names).rest
    single = engine == "per_sample" or (engine == "auto" and short)
    tally, parts = Tally(), Parts()
    for number, inputs in enumerate(model_inputs(model, batches, "trace", progress)):
        generator = stream(seed, number, 0)
        if single:
            assert isinstance(moments, Moments)
            try:
                values = _singles(model, inputs, moments, metric, generator, output, parts)
                if number == 0 and len(inputs) > 1:
                    check_layout(model, inputs, float(values[0]), moments, metric, stream(seed, number, 0), output)
                tally = tally + Tally.of_rows({"": values.unsqueeze(1)})
            except ModelError:
                if engine == "per_sample" or number:
                    raise
                single, generator = False, stream(seed, number, 0)  # a model that only whole gradients are known of
        if not single:
            for draws, stands_for in _batched(model, inputs, bound, metric, generator, rows, output):
                tally = tally + Tally.of_rows({"": draws}, stands_for=stands_for)
        if rtol is not None and tally.rows >= LEAST and _estimate(tally).relative <= rtol:
            break
    found = _estimate(tally)
    if rtol is not None and not found.relative <= rtol:
        logger.warning(
            "the batches ended at a relative error of %.2g, asked was %.2g: give more batches", found.relative, rtol
        )
    return found


def _singles(
    model: nn.Module,
    inputs: Tensor,
    moments: Moments,
    head: Head,
    generator: torch.Generator,
    output: Selector,
    parts: Parts,
) -> Tensor:
    """Energies of a batch's samples `(batch,)`; in halves of it where memory runs out."""

    def run(part: slice) -> Tensor:
        return sample_energies(model, inputs[part], moments, head, generator, output)

    return torch.cat(parts(len(inputs), run, [generator]))


def _estimate(tally: Tally) -> Estimate:
    error = tally.stderr()
    return Estimate(float(tally.means()[""]), math.nan if error is None else float(error[""]), tally.total)


def _batched(
    model: nn.Module,
    inputs: Tensor,
    bound: Bound,
    head: Head,
    generator: torch.Generator,
    rows: int,
    output: Selector,
) -> Iterator[tuple[Tensor, int]]:
    """Draws `(draws, 1)`, and the samples that each of them is of; what does not fill a draw comes last."""
    names = bound.names
    full: list[float] = []
    last: list[tuple[float, int]] = []
    with only(model, names) as wanted, torch.enable_grad():
        for part in inputs.split(rows):
            found = finite_outputs(model, part, output)
            cotangent = head.cotangent(detached(found), generator)
            gradients = dict(zip(names, _backward(found, cotangent, wanted), strict=True))
            value = bound.energy(gradients, generator) / len(part)
            if len(part) == rows:
                full.append(value)
            else:
                last.append((value, len(part)))
    for values, size in [(full, rows), *(([value], size) for value, size in last)]:
        if values:
            yield torch.tensor(values, dtype=torch.float64).unsqueeze(1), size


def _backward(found: Any, cotangent: Any, wanted: list[Tensor]) -> list[Tensor]:
    gradients = backward(found, cotangent, wanted, keep_graph=False)
    return [torch.zeros_like(w) if g is None else g.detach() for w, g in zip(wanted, gradients, strict=True)]
