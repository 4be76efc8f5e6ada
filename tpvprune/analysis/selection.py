"""Ranking checkpoints without labels or held-out inputs: by how much of the noise in its targets each would follow.

Label-noise TPV on the training inputs themselves, with a pull back to the weights that is the same for all, is an
effective dimension: how many directions of targets a checkpoint can follow. Among checkpoints that fit their training
set it grows with the overfit. One that does not fit it yet follows little too, so the two ends of the U look alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tpvprune.analysis.descent import gathered, in_float32
from tpvprune.analysis.labelnoise import (
    HELD,
    LabelNoise,
    label_noise_closed,
    label_noise_movements,
    largest_curvature,
)
from tpvprune.analysis.perturbations import parameters_of
from tpvprune.analysis.trace import trace_heff
from tpvprune.analysis.values import Estimate, crossed
from tpvprune.batches import Batch, Progress, Selector, evaluation_mode, inputs_of, repeatable
from tpvprune.errors import DataError, InputError, ModelError
from tpvprune.kinds import as_verb
from tpvprune.scoring.heads import Head

Method = Literal["auto", "closed", "fine-tuning"]


@dataclass(frozen=True)
class Selection:
    """Checkpoints from least to most label-noise TPV.

    Attributes:
        tpv: by name, in that order; of noise of standard deviation one, to first order.
        ridge: the pull that all were held by, in units of a squared singular value of the training Jacobian.
        method: "closed" or "fine-tuning".
    """

    tpv: Mapping[str, Estimate]
    ridge: float
    method: str

    @property
    def names(self) -> tuple[str, ...]:
        """From the one that follows noise least."""
        return tuple(self.tpv)

    @property
    def best(self) -> str:
        """The first of them."""
        return self.names[0]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form."""
        return {"tpv": {n: asdict(one) for n, one in self.tpv.items()}, "ridge": self.ridge, "method": self.method}


@as_verb
def select(
    models: Mapping[str, nn.Module],
    batches: Mapping[str, Iterable[Batch]] | Iterable[Batch],
    *,
    ridge: float | None = None,
    head: str | Head = "logits",
    method: Method = "auto",
    settings: LabelNoise | None = None,
    seed: int = 0,
    output: Selector = None,
    progress: Progress | None = None,
) -> Selection:
    """Rank checkpoints by label-noise TPV on unlabeled training inputs.

    Args:
        models: by name; they are left as they were.
        batches: unlabeled training inputs, readable more than once: one set for all models, or one for each by name
            (the same images, each as its model reads them).
        ridge: pull back to the weights; None takes the geometric mean over models of `Tr(H) / outputs`, the mean
            squared singular value of their training Jacobians. Ranks hardly depend on it.
        head: the metric.
        method: "closed" (small models), "fine-tuning", or "auto": closed if all models are small enough.
        settings: of fine-tuning; its penalty and, where left out, its step size are made the same for all.
        seed: of noise.
        output: which part of what the models return counts.
        progress: called as `progress("select", models_done, models_to_do)`, and by what is done for each.

    Raises:
        InputError: there are fewer than two models, or a setting is out of range.
        DataError: there is no batch, or they can be read once only.
    """
    if len(models) < 2:
        raise InputError(f"{len(models)} checkpoint is nothing to choose from; give two or more")
    if method not in get_args(Method):
        raise InputError(f"method={method!r} must be one of {', '.join(get_args(Method))}")
    if ridge is not None and not (math.isfinite(ridge) and ridge > 0):
        raise InputError(f"ridge={ridge!r} must be above zero: without one all models that fit rank alike")
    sets = {name: batches[name] if isinstance(batches, Mapping) else batches for name in models}
    for one in sets.values():
        repeatable(one, "every model needs them")
    count = sum(len(inputs_of(batch)) for batch in next(iter(sets.values())))
    if not count:
        raise DataError("there is no batch; give at least one")
    if ridge is None:
        logs = [math.log(_mean_square(model, sets[name], output)) for name, model in models.items()]
        ridge = math.exp(sum(logs) / len(logs))
    if method == "auto":
        sizes = [count * _width(m, sets[n], output) * sum(p.numel() for p in m.parameters()) for n, m in models.items()]
        method = "closed" if max(sizes) <= HELD else "fine-tuning"
    settings = replace(settings or LabelNoise(), penalty=ridge / count)
    if method == "fine-tuning" and settings.lr is None:
        steps = [1 / (_curvature(model, sets[name], output) + settings.penalty) for name, model in models.items()]
        settings = replace(settings, lr=min(steps))
    found: dict[str, Estimate] = {}
    for number, (name, model) in enumerate(models.items(), 1):
        some = {name: sets[name]}
        moved: dict[str, Tensor]
        if method == "closed":
            moved = label_noise_closed(model, sets[name], some, 1.0, head, ridge=ridge, output=output)
            found[name] = crossed(moved[name])
        else:
            moved = label_noise_movements(
                model, sets[name], some, settings, head, seed=seed, output=output, progress=progress
            )
            found[name] = crossed(moved[name]).times(1 / settings.sigma**2)
        if progress:
            progress("select", number, len(models))
    ordered = dict(sorted(found.items(), key=lambda pair: pair[1].value))
    return Selection(ordered, ridge, method)


@torch.no_grad()
def _width(model: nn.Module, batches: Iterable[Batch], output: Selector) -> int:
    """Outputs of one input."""
    with evaluation_mode(model):
        for batch in batches:
            _, found = gathered(model, [inputs_of(batch)[:1]], output)
            if isinstance(found, dict):
                raise ModelError("label noise is put on one tensor; name the output that counts with output='key'")
            return int(found.numel())
    raise DataError("there is no batch; give at least one")


def _mean_square(model: nn.Module, batches: Iterable[Batch], output: Selector) -> float:
    trace = trace_heff(model, batches, "logits", rtol=None, output=output)
    return max(trace.value / _width(model, batches, output), 1e-30)


def _curvature(model: nn.Module, batches: Iterable[Batch], output: Selector) -> float:
    model = in_float32(model)
    with evaluation_mode(model):
        inputs, reference = gathered(model, batches, output)
        assert isinstance(reference, Tensor)
        return largest_curvature(model, parameters_of(model, None), inputs, reference, output)
