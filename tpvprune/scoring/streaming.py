"""What a criterion that learns from batches offers to the loop over them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from tpvprune.batches import Batch, Progress
from tpvprune.scoring.engine import Watched
from tpvprune.tally import Tally
from tpvprune.types import Graph


class Later(Protocol):
    """What scores are made of once more, where units depend on each other."""

    def __call__(self, alone: Mapping[str, Tensor], half: int | None = None) -> Mapping[str, Tensor] | None:
        """Scores of what scores say of each unit alone, both `(units,)` per group.

        Args:
            alone: of all samples, or of a half of them.
            half: that with even (0) or odd (1) numbers; its scores are None where nothing is known of halves.
        """
        ...


@dataclass(frozen=True, eq=False)
class Observation:
    """What one batch says.

    Attributes:
        tally: its sums, by whatever keys the criterion summarises later.
        rows: sensitivities `(rows, units)`, where they are kept.
        linear: their linear part, summed over the batch's samples `(units,)`.
        samples: samples that the rows are of.
        later: what the scores are made of once more, where they depend on each other.
    """

    tally: Tally
    rows: Tensor | None = None
    linear: Tensor | None = None
    samples: int = 0
    later: Later | None = None


@runtime_checkable
class Streaming(Protocol):
    """A criterion whose scores follow from sums over batches.

    One that reads labels says so by an attribute `labelled`, True. Batches with other labels are other batches to it.
    """

    @property
    def probes(self) -> int | str:
        """Cotangents per sample."""
        ...

    @property
    def seed(self) -> int:
        """Seed of what is drawn."""
        ...

    def observe(
        self, model: nn.Module, batches: Iterable[Batch], graph: Graph, first: int, progress: Progress | None
    ) -> Iterator[Observation]:
        """One observation a batch; `first` batches have gone before."""
        ...

    def summarise(self, means: Mapping[str, Tensor], model: nn.Module, graph: Graph) -> Mapping[str, Tensor]:
        """Scores `(units,)` per group from the tally's means."""
        ...

    @property
    def label(self) -> str:
        """The criterion in words."""
        ...


@runtime_checkable
class Joining(Protocol):
    """A criterion that processes talk about beyond the sums of their batches."""

    def join(self, model: nn.Module, batches: Iterable[Batch], graph: Graph) -> Later | None:
        """What a process whose batches have all been scored, or that has none, adds to that talk."""
        ...


@runtime_checkable
class GivingWay(Protocol):
    """A criterion that leaves some models to another one, see `UnseenError`."""

    def instead(self) -> Streaming | None:
        """The other one; None where the choice is not left to the criterion."""
        ...

    def sees(self, model: nn.Module, batches: Watched, graph: Graph) -> bool:
        """Whether a model, as far as the batch to come tells, is one that it scores itself."""
        ...
