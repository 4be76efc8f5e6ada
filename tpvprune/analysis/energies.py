"""What noise on each single weight would move the outputs by: the diagonal of `H`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, Progress, Selector, finite_outputs, model_inputs
from tpvprune.kinds import as_verb
from tpvprune.scoring.activations import backward
from tpvprune.scoring.engine import stream
from tpvprune.scoring.gradients import only
from tpvprune.scoring.heads import Head, head_named
from tpvprune.scoring.probing import detached

ROWS = 8  # samples whose gradients are added up before they are squared


@dataclass(frozen=True, eq=False)
class Energies:
    """The diagonal of `H` and how sure the sums over a tensor are.

    Attributes:
        values: per parameter, `E_x E_u (dg)^2` of every weight, in float64.
        relative: per parameter, standard error of the sum over the tensor, over that sum.
        samples: inputs they are of.
    """

    values: Mapping[str, Tensor]
    relative: Mapping[str, float]
    samples: int


@as_verb
@as_verb
def weight_energies(
    model: nn.Module,
    batches: Iterable[Batch],
    names: Sequence[str],
    head: str | Head = "softmax",
    *,
    seed: int = 0,
    output: Selector = None,
    progress: Progress | None = None,
) -> Energies:
    """The diagonal of `H` for some parameters, unbiased, from one backward pass for every few samples.

    Args:
        model: the model; it is left as it was.
        batches: unlabeled inputs.
        names: the parameters.
        head: the metric.
        seed: of the cotangents.
        output: which part of what the model returns counts.
        progress: called as `progress("energies", batches_done, batches_to_do)`.

    Raises:
        DataError: there is no batch.
    """
    wanted, metric = list(names), head_named(head)
    sums: dict[str, Tensor] = {}
    draws: dict[str, list[float]] = {name: [] for name in wanted}
    samples = 0
    for number, inputs in enumerate(model_inputs(model, batches, "energies", progress)):
        generator = stream(seed, number, 0)
        with only(model, wanted) as parameters, torch.enable_grad():
            for part in inputs.split(ROWS):
                found = finite_outputs(model, part, output)
                cotangent = metric.cotangent(detached(found), generator)
                for name, gradient in zip(wanted, backward(found, cotangent, parameters, False), strict=True):
                    if gradient is None:
                        continue
                    square = gradient.detach().double().square()
                    sums[name] = sums[name] + square if name in sums else square
                    draws[name].append(float(square.sum()) / len(part))
        samples += len(inputs)
    known = dict(model.named_parameters())
    values = {n: sums[n] / samples if n in sums else torch.zeros_like(known[n].detach()).double() for n in wanted}
    return Energies(values, {name: _relative(one) for name, one in draws.items()}, samples)


def _relative(draws: list[float]) -> float:
    values = torch.tensor(draws, dtype=torch.float64)
    mean = float(values.mean()) if draws else 0.0
    return float(values.std()) / len(draws) ** 0.5 / mean if len(draws) > 1 and mean else 0.0
