"""Which cotangents a batch's outputs are probed with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tpvprune.batches import Outputs, Selector
from tpvprune.scoring.engine import global_number, stream
from tpvprune.scoring.heads import Head

COTANGENTS = 1280  # of a scoring: with so many images one each is enough, of fewer each is probed more often
MOST = 8


def probes_for(samples: int) -> int:
    """Cotangents per sample where there are so many samples."""
    return max(1, min(MOST, round(COTANGENTS / max(1, samples))))


@dataclass(frozen=True)
class Probing:
    """A head, how often it is drawn from, and the streams of numbers that the draws are made of."""

    head: Head
    probes: int | str
    seed: int
    output: Selector = None

    @property
    def count(self) -> int:
        """What a sum over cotangents is divided by."""
        return 1 if self.probes == "exact" else int(self.probes)

    def generators(self, batch: int) -> list[torch.Generator]:
        """One a probe, for this process's batch of that number; none if the sum is exact."""
        number = global_number(batch)
        return [stream(self.seed, number, probe) for probe in range(0 if self.probes == "exact" else self.count)]

    def cotangents(self, output: Outputs, generators: list[torch.Generator]) -> Iterator[tuple[Outputs, bool]]:
        """Each cotangent, and whether it is the last."""
        if generators:
            for number, generator in enumerate(generators, 1):
                yield self.head.cotangent(output, generator), number == len(generators)
            return
        waiting = None
        for cotangent in self.head.exact(output):
            if waiting is not None:
                yield waiting, False
            waiting = cotangent
        if waiting is not None:
            yield waiting, True


def detached(output: Outputs) -> Outputs:
    """The outputs without their graph."""
    if isinstance(output, dict):
        return {name: value.detach() for name, value in output.items()}
    return output.detach()


def drift_slope(head: Head, output: Outputs, reference: Outputs) -> Outputs:
    """Gradient of half the drift from `reference`, at `output`.

    A head that knows the drift itself has a method `slope(output, reference)`; for the others it is the metric at
    `output` times the difference.
    """
    own = getattr(head, "slope", None)
    if own is not None:
        found: Outputs = own(output, reference)
        return found
    if isinstance(output, dict):
        assert isinstance(reference, dict)
        slopes = {name: torch.zeros_like(value) for name, value in output.items()}
        for u in head.exact(output):
            along = sum(_along(u[name], output[name] - reference[name]) for name in output)
            for name in output:
                slopes[name] += u[name] * _shaped(along, u[name])
        return slopes
    slope = torch.zeros_like(output)
    assert isinstance(reference, Tensor)
    for u in head.exact(output):
        slope += u * _shaped(_along(u, output - reference), u)
    return slope


def _along(u: Tensor, difference: Tensor) -> Tensor:
    return (u * difference).flatten(1).sum(1)


def _shaped(values: Tensor | int, like: Tensor) -> Tensor:
    assert isinstance(values, Tensor)
    return values.reshape(-1, *(1,) * (like.ndim - 1))
