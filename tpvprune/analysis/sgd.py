"""What the noise of SGD does: steps around trained weights, held there by a penalty, and snapshots on the way.

No label is needed: the targets of a step are drawn from the model's own outputs, so that the trained weights are a
minimum and the noise of a step has covariance `H`, the one the trace form takes for the loss's curvature too. Then
weights spread with covariance `lr / (2 * batch_size)` times `H (H + penalty)^-1`, to first order in `lr`, and the trace
form `lr / (2 * batch_size) * Tr(H)` is what comes of a penalty far below the curvature.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpvprune.analysis.descent import gathered, in_float32, mean_gradient, movements_at, rows
from tpvprune.analysis.perturbations import parameters_of
from tpvprune.batches import Batch, Outputs, Progress, Selector, evaluation_mode
from tpvprune.errors import InputError
from tpvprune.kinds import as_verb
from tpvprune.scoring.engine import stream
from tpvprune.scoring.heads import Head, head_named
from tpvprune.scoring.probing import drift_slope


@dataclass(frozen=True)
class SGD:
    """Plain stochastic gradient descent around trained weights.

    Attributes:
        lr: step size.
        batch_size: samples of a step.
        penalty: strength of the pull back to the trained weights, `penalty / 2 * |d|^2`.
        burn_in: steps before the first snapshot; with 0 it is taken after `every` steps.
        every: steps from one snapshot to the next.
        snapshots: weights that are measured, of each chain.
        chains: runs that start anew; their spread gives the error, because snapshots of one run are alike.
    """

    lr: float = 0.01
    batch_size: int = 32
    penalty: float = 0.0
    burn_in: int = 100
    every: int = 10
    snapshots: int = 10
    chains: int = 4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0 and math.isfinite(self.penalty) and self.penalty >= 0):
            raise InputError(f"lr={self.lr!r} must be above zero and penalty={self.penalty!r} zero or more")
        for name in ("batch_size", "every", "snapshots", "chains"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)!r} must be a whole number from 1")
        if not isinstance(self.burn_in, int) or self.burn_in < 0:
            raise InputError(f"burn_in={self.burn_in!r} must be a whole number from 0")


@as_verb
def sgd_movements(
    model: nn.Module,
    batches: Iterable[Batch],
    measured: Mapping[str, Iterable[Batch]],
    settings: SGD | None = None,
    head: str | Head = "softmax",
    *,
    parameters: Sequence[str] | None = None,
    seed: int = 0,
    output: Selector = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """How far SGD moves the outputs, `(chains, inputs)` for each set of inputs, mean over the snapshots of a chain.

    Args:
        model: the model; it is left as it was. It is run as it is used, in eval mode; half precision in float32, in
            which small steps are not lost.
        batches: unlabeled inputs to take steps on; they are held in memory.
        measured: by name, inputs to measure on; they are held in memory.
        settings: of SGD.
        head: the metric, which says what targets are drawn from as well.
        parameters: names or patterns of the parameters that move; all by default.
        seed: of batches and targets.
        output: which part of what the model returns counts.
        progress: called as `progress("sgd", steps_done, steps_to_do)`.

    Raises:
        InputError: there are fewer inputs than a step takes.
        ModelError: none of the parameters reaches the outputs.
        NonFiniteError: the weights ran away.
    """
    settings, metric, model = settings or SGD(), head_named(head), in_float32(model)
    start = parameters_of(model, parameters)
    first = settings.burn_in or settings.every
    steps = first + settings.every * (settings.snapshots - 1)
    found: dict[str, list[Tensor]] = {name: [] for name in measured}
    with evaluation_mode(model):
        inputs, reference = gathered(model, batches, output)
        if len(inputs) < settings.batch_size:
            raise InputError(f"batch_size={settings.batch_size} is more than the {len(inputs)} inputs; give more")
        sets = {name: gathered(model, some, output) for name, some in measured.items()}
        for chain in range(settings.chains):
            generator = stream(seed, chain, 0)
            weights, sums = dict(start), dict[str, Tensor]()
            for step in range(1, steps + 1):
                weights = _step(model, weights, start, inputs, reference, settings, metric, generator, output)
                if progress:
                    progress("sgd", chain * steps + step, settings.chains * steps)
                if step >= first and (step - first) % settings.every == 0:
                    for name, (some, known) in sets.items():
                        moved = movements_at(model, weights, some, known, metric, output)
                        sums[name] = sums[name] + moved if name in sums else moved
            for name in measured:
                found[name].append(sums[name] / settings.snapshots)
    return {name: torch.stack(chains) for name, chains in found.items()}


def _step(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    inputs: Tensor,
    reference: Outputs,
    settings: SGD,
    head: Head,
    generator: torch.Generator,
    output: Selector,
) -> dict[str, Tensor]:
    chosen = torch.randperm(len(inputs), generator=generator)[: settings.batch_size]
    known = rows(reference, chosen)

    def cotangent(found: Outputs, part: slice) -> Outputs:
        fixed = rows(known, part)
        return _sum(drift_slope(head, found, fixed), head.cotangent(fixed, generator))

    gradient = mean_gradient(model, weights, inputs[chosen], cotangent, output)
    return {
        name: value - settings.lr * (gradient[name] + settings.penalty * (value - start[name]))
        for name, value in weights.items()
    }


def _sum(one: Outputs, other: Outputs) -> Outputs:
    if isinstance(one, dict):
        assert isinstance(other, dict)
        return {name: value + other[name] for name, value in one.items()}
    assert isinstance(other, Tensor)
    return one + other
