"""What noise in the targets does: weights that follow noisy copies of the model's own outputs, and how far they go.

With `J` the Jacobian of all outputs on all training inputs (singular values `s`, right singular directions `V`),
fitting targets with noise `sigma` by least squares moves the weights by `J^+ noise`, and the outputs on other inputs by
`sigma^2 * sum over i of B_ii s_i^2 / (s_i^2 + ridge)^2` on average, `B = V^T E_x[J^T M J] V`. Without a ridge that is
`sigma^2 * sum of B_ii / s_i^2`; on the training inputs themselves it is then `sigma^2` times the rank over their
number, whatever the model, and says nothing of it. With one it is the model's effective dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from tpvprune.analysis.descent import gathered, in_float32, mean_gradient, movements_at
from tpvprune.analysis.perturbations import parameters_of
from tpvprune.batches import (
    Batch,
    Outputs,
    Progress,
    Selector,
    evaluation_mode,
    model_inputs,
    plain_attention,
    single_tensor,
)
from tpvprune.errors import InputError, ModelError, NonFiniteError
from tpvprune.kinds import as_verb
from tpvprune.scoring.engine import stream
from tpvprune.scoring.heads import Head, head_named

HELD = 2**26  # entries of the training Jacobian that are held
VMAPPED = 2**24  # entries of it that are made at once
POWER_STEPS = 12
ROUNDED = 16  # of a Jacobian's norm, in steps of rounding: more than what was measured of dependent rows (1) or of sums


@dataclass(frozen=True)
class LabelNoise:
    """Noise on the targets, and how they are followed.

    Attributes:
        sigma: standard deviation of the noise, in the unit of the outputs.
        steps: full gradient steps with momentum of one fine-tuning.
        lr: their size; None takes one over the largest curvature.
        momentum: 0 to below 1.
        penalty: strength of the pull back to the trained weights.
        repeats: fine-tunings, each on noise of its own.
    """

    sigma: float = 0.1
    steps: int = 50
    lr: float | None = None
    momentum: float = 0.9
    penalty: float = 0.0
    repeats: int = 8

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise InputError(f"sigma={self.sigma!r} must be above zero")
        if self.lr is not None and not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"lr={self.lr!r} must be above zero, or None")
        if not 0 <= self.momentum < 1 or not (math.isfinite(self.penalty) and self.penalty >= 0):
            raise InputError(f"momentum={self.momentum!r} must lie in [0, 1) and penalty={self.penalty!r} be 0 or more")
        for name in ("steps", "repeats"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r} must be a whole number from 1")


@as_verb
def label_noise_closed(
    model: nn.Module,
    batches: Iterable[Batch],
    measured: Mapping[str, Iterable[Batch]],
    sigma: float = 1.0,
    head: str | Head = "logits",
    *,
    ridge: float = 0.0,
    parameters: Sequence[str] | None = None,
    output: Selector = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The closed form on every input, `(1, inputs)` for each set: the mean over all noise, to first order.

    Args:
        model: a small model, that returns `(batch, outputs)`; it is left as it was.
        batches: unlabeled inputs that are fitted.
        measured: by name, inputs to measure on.
        sigma: standard deviation of the noise on every output.
        head: the metric on the measured inputs; the fit is by squares of the outputs.
        ridge: added to every `s_i^2`: the pull back to the trained weights.
        parameters: names or patterns of the parameters that move; all by default.
        output: which part of what the model returns counts.
        progress: called as `progress("jacobian", samples_done, samples_to_do)`.

    Raises:
        InputError: the Jacobian would not fit into memory, or a setting is out of range.
        ModelError: the output is not `(batch, outputs)`, or `torch.func` cannot follow the model.
        NonFiniteError: the Jacobian holds NaN or infinity.
    """
    if not (math.isfinite(sigma) and sigma > 0 and math.isfinite(ridge) and ridge >= 0):
        raise InputError(f"sigma={sigma!r} must be above zero and ridge={ridge!r} zero or more")
    model, metric = in_float32(model), head_named(head)
    weights = parameters_of(model, parameters)
    with evaluation_mode(model):
        spectrum, project = spectrum_of(model, batches, weights, output, progress)
        weigh = spectrum / (spectrum + ridge).square()
        found = {}
        for name, some in measured.items():
            values = []
            for inputs in model_inputs(model, some, "jacobian"):
                with torch.no_grad():
                    outputs = single_tensor(model(inputs), model, output)
                along = project(inputs)  # (batch, outputs, directions)
                energy = sum(
                    torch.einsum("bk,bkr->br", u.double().flatten(1), along).square() for u in metric.exact(outputs)
                )
                assert isinstance(energy, Tensor)
                values.append(sigma**2 * (energy @ weigh))
            found[name] = torch.cat(values).unsqueeze(0).cpu()
    return found


def spectrum_of(
    model: nn.Module,
    batches: Iterable[Batch],
    weights: Mapping[str, Tensor],
    output: Selector = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Squared singular values of the training Jacobian, and what maps inputs to their Jacobian along its directions.

    Returns:
        `(directions,)` in float64, those that are zero up to rounding left out; and a function from inputs to
        `(batch, outputs, directions)`.

    Raises:
        InputError: the Jacobian would not fit into memory, or its squares fall below what float64 holds.
        NonFiniteError: it holds NaN or infinity.
    """
    size = sum(p.numel() for p in weights.values())
    parts: list[Tensor] = []
    rows_held = 0
    for inputs in model_inputs(model, batches, "jacobian", progress):
        part = _jacobian(model, weights, inputs, output)
        rows_held += part.shape[0] * part.shape[1]
        if rows_held * size > HELD:
            raise InputError(
                f"the Jacobian of {rows_held:,} outputs or more in {size:,} parameters is too large to hold; give "
                "fewer inputs, name parameters=, or take the fine-tuning form"
            )
        parts.append(part.flatten(0, 1).double())
    jacobian = torch.cat(parts)
    more_weights = jacobian.shape[0] <= jacobian.shape[1]
    gram = jacobian @ jacobian.T if more_weights else jacobian.T @ jacobian
    if not bool(torch.isfinite(gram).all()):
        raise NonFiniteError("the Jacobian of the outputs holds NaN or infinity; check the weights and the inputs")
    values, vectors = torch.linalg.eigh(gram)
    # Entries are known to the model's precision and their squares are summed in float64, so that singular values are
    # known to so much of the Jacobian's norm, and the squared ones to so much of their sum.
    eps = max(torch.finfo(p.dtype).eps for p in weights.values())
    kept = values > max((ROUNDED * eps) ** 2, ROUNDED * torch.finfo(gram.dtype).eps) * gram.trace()
    if not bool(kept.any()) and bool(jacobian.any()):
        raise InputError("the outputs move too little with the weights for squares of it; scale the outputs up")
    values, vectors = values[kept], vectors[:, kept]
    directions = (jacobian.T @ vectors) / values.sqrt() if more_weights else vectors

    def project(inputs: Tensor) -> Tensor:
        return _jacobian(model, weights, inputs, output).double() @ directions

    return values, project


def _jacobian(model: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor, output: Selector) -> Tensor:
    """`(batch, outputs, parameters)`."""

    def answer(some: dict[str, Tensor], x: Tensor) -> Tensor:
        found = single_tensor(functional_call(model, some, (x.unsqueeze(0),)), model, output)
        if found.ndim != 2:
            raise ModelError(f"the closed form needs outputs (batch, outputs), not {tuple(found.shape)}")
        return found[0]

    size = max(1, VMAPPED // sum(p.numel() for p in weights.values()) // 16)
    try:
        with plain_attention():  # fused attention cannot be mapped over samples
            pieces: list[Any] = [vmap(jacrev(answer), (None, 0))(dict(weights), x) for x in inputs.split(size)]
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"torch.func cannot follow {type(model).__name__} ({str(error).splitlines()[0]}); take the fine-tuning form"
        ) from error
    return torch.cat([torch.cat([piece[name].flatten(2) for name in weights], 2) for piece in pieces]).detach()


@as_verb
def label_noise_movements(
    model: nn.Module,
    batches: Iterable[Batch],
    measured: Mapping[str, Iterable[Batch]],
    settings: LabelNoise | None = None,
    head: str | Head = "logits",
    *,
    parameters: Sequence[str] | None = None,
    seed: int = 0,
    output: Selector = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """How far fine-tuning on noisy outputs moves the outputs, `(repeats, inputs)` for each set of inputs.

    Each repeat starts from the trained weights and takes gradient steps on `mean |f(x) - f_0(x) - noise|^2 / 2`.

    Args:
        model: the model; it is left as it was. It is run as it is used, in eval mode.
        batches: unlabeled inputs that are fitted; they are held in memory.
        measured: by name, inputs to measure on; they are held in memory.
        settings: of the noise and of fine-tuning.
        head: the metric on the measured inputs; the fit is by squares of the outputs.
        parameters: names or patterns of the parameters that move; all by default.
        seed: of the noise.
        output: which part of what the model returns counts.
        progress: called as `progress("label noise", steps_done, steps_to_do)`.

    Raises:
        ModelError: none of the parameters reaches the outputs, or there are several outputs.
        NonFiniteError: the weights ran away.
    """
    settings, metric = settings or LabelNoise(), head_named(head)
    model = in_float32(model)
    start = parameters_of(model, parameters)
    found: dict[str, list[Tensor]] = {name: [] for name in measured}
    with evaluation_mode(model):
        inputs, reference = gathered(model, batches, output)
        if isinstance(reference, dict):
            raise ModelError("label noise is put on one tensor; name the output that counts with output='key'")
        sets = {name: gathered(model, some, output) for name, some in measured.items()}
        lr = settings.lr
        if lr is None:
            held = largest_curvature(model, start, inputs, reference, output) + settings.penalty
            lr = 1 / held if held else 0.0  # where nothing moves the outputs, no step does
        for repeat in range(settings.repeats):
            noise = torch.randn(reference.shape, generator=stream(seed, repeat, 0), dtype=torch.float64)
            targets = reference + settings.sigma * noise.to(reference)
            weights, speed = dict(start), {name: torch.zeros_like(p) for name, p in start.items()}

            def cotangent(found: Outputs, part: slice, targets: Tensor = targets) -> Outputs:
                assert isinstance(found, Tensor)
                return found - targets[part]

            for step in range(1, settings.steps + 1):
                gradient = mean_gradient(model, weights, inputs, cotangent, output)
                for name, value in weights.items():
                    pull = gradient[name] + settings.penalty * (value - start[name])
                    speed[name] = settings.momentum * speed[name] - lr * pull
                    weights[name] = value + speed[name]
                if progress:
                    progress("label noise", repeat * settings.steps + step, settings.repeats * settings.steps)
            for name, (some, known) in sets.items():
                found[name].append(movements_at(model, weights, some, known, metric, output))
    return {name: torch.stack(repeats) for name, repeats in found.items()}


def largest_curvature(
    model: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor, reference: Tensor, output: Selector = None
) -> float:
    """The largest eigenvalue of `J^T J / n`, by power iteration on gradients at weights a little apart."""
    scale = math.sqrt(float(sum(p.double().square().sum() for p in weights.values()))) or 1.0
    generator = torch.Generator().manual_seed(0)
    found = 0.0
    direction = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in weights.items()}

    def cotangent(changed: Outputs, part: slice) -> Outputs:
        assert isinstance(changed, Tensor)
        return changed - reference[part]

    size = 1e-4 * scale
    for _ in range(POWER_STEPS):
        length = math.sqrt(float(sum(d.double().square().sum() for d in direction.values())))
        if not length:
            return found
        direction = {n: d / length for n, d in direction.items()}
        moved = {n: p + size * direction[n] for n, p in weights.items()}
        direction = {n: g / size for n, g in mean_gradient(model, moved, inputs, cotangent, output).items()}
        found = math.sqrt(float(sum(d.double().square().sum() for d in direction.values())))
    return found
