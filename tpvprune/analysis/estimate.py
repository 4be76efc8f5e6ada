"""`tpv`: the test prediction variance of any perturbation, by either form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

from torch import nn

from tpvprune.analysis.empirical import moved_by, movements
from tpvprune.analysis.perturbations import Change
from tpvprune.analysis.trace import trace_form
from tpvprune.analysis.values import Estimate, crossed
from tpvprune.batches import Batch, Progress, Selector, inputs_of, length_of
from tpvprune.errors import InputError
from tpvprune.kinds import as_verb
from tpvprune.plan import Plan
from tpvprune.scoring.heads import Head
from tpvprune.scoring.tpv import TPV
from tpvprune.surgery.removal import apply

Form = Literal["trace", "empirical"]


@as_verb
def tpv(
    model: nn.Module,
    batches: Iterable[Batch],
    perturbation: Change | Plan,
    head: str | Head = "softmax",
    *,
    form: Form = "trace",
    rtol: float | None = 0.05,
    draws: int = 32,
    parameters: Sequence[str] | None = None,
    seed: int = 0,
    output: Selector = None,
    progress: Progress | None = None,
) -> Estimate:
    """How far a random change of the weights moves the outputs: `E_x E_d || f_{w+d}(x) - f_w(x) ||^2_M`.

    Args:
        model: any module; it is left as it was.
        batches: unlabeled inputs.
        perturbation: what happens to the weights. One with moments (`Removal`, `Rounding`, `Isotropic`, `Diagonal`,
            or your own), a covariance (`LowRank`, `Operator`), a `Sampler`, or a `Plan`, whose units leave.
        head: the metric `M`. With "softmax" half the value is KL in nats, to second order.
        form: "trace" gives `Tr(H C)`, to first order in the covariance and from gradients; "empirical" changes the
            weights and measures.
        rtol: of the trace form, see `trace_form`; a plan's is of all batches.
        draws: of the empirical form; a plan is one.
        parameters: names or patterns of the parameters that may move. By default all; for rounding those of two
            dimensions or more.
        seed: of cotangents and draws.
        output: which part of what the model returns counts.
        progress: called as `progress(stage, batches_done, batches_to_do)`.

    Raises:
        InputError: a setting is out of range or does not fit the perturbation.
        PlanError: the plan is of another model, or masks single weights and the trace form is asked for.
        DataError: there is no batch.
        NonFiniteError: the model gives NaN or infinity.
    """
    if form not in get_args(Form):
        raise InputError(f"form={form!r} must be 'trace' or 'empirical'")
    if isinstance(perturbation, Plan):
        if parameters is not None:
            raise InputError("a plan says itself what leaves; leave parameters= out")
        if form == "empirical":
            return crossed(moved_by(model, apply(model, perturbation), batches, head, output=output, progress=progress))
        counted = _Counted(batches)
        value, error = TPV(head=head, seed=seed, output=output).drift(model, counted, perturbation, progress)
        return Estimate(value, error, counted.samples)
    if form == "empirical":
        return crossed(
            movements(
                model,
                batches,
                perturbation,
                head,
                draws=draws,
                parameters=parameters,
                seed=seed,
                output=output,
                progress=progress,
            )
        )
    return trace_form(
        model,
        batches,
        perturbation,
        head,
        rtol=rtol,
        parameters=parameters,
        seed=seed,
        output=output,
        progress=progress,
    )


class _Counted:
    """Batches that count the inputs read from them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches, self.samples = batches, 0

    def __len__(self) -> int:
        total = length_of(self.batches)
        if total is None:
            raise TypeError("the number of batches is not known")
        return total

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.samples += len(inputs_of(batch))
            yield batch
