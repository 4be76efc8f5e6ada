"""What every pass over batches needs: streams of random numbers, halving on lack of memory, processes.

The numbers that a sample's cotangents are drawn from depend on the seed, the number of its batch, the probe and
its place in the batch alone. So a batch taken in two halves, a run that was stopped and went on, and several
processes that share the batches out among them give what one undisturbed pass gives.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpvprune.batches import Batch, filled_inputs, labels_of, length_of
from tpvprune.digests import LOOKED_AT, entries_digest
from tpvprune.errors import DataError, InputError
from tpvprune.processes import of_all, process
from tpvprune.scores import Sensitivities
from tpvprune.tally import Tally

logger = logging.getLogger(__name__)


def stream(seed: int, batch: int, probe: int) -> torch.Generator:
    """The random numbers of one probe of one batch."""
    digest = hashlib.sha256(f"{seed}/{batch}/{probe}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def wide(value: Tensor) -> Tensor:
    """Half precision as float32."""
    return value if value.dtype == torch.float64 else value.float()


def global_number(batch: int) -> int:
    """Number of a process's batch among the batches of all processes, which take them in turns."""
    rank, world = process()
    return batch * world + rank


@dataclass
class Parts:
    """Runs a batch whole, or in halves of halves from when memory ran out.

    Attributes:
        limit: most samples at once; None until memory ran out.
    """

    limit: int | None = None

    def __call__(self, size: int, run: Callable[[slice], Any], generators: Sequence[torch.Generator] = ()) -> list[Any]:
        """What `run` gives for consecutive slices of a batch.

        Args:
            size: samples in the batch.
            run: does one slice, `run(slice)`.
            generators: put back before a slice is tried again.

        Raises:
            torch.OutOfMemoryError: a single sample does not fit.
        """
        done, results = 0, []
        while done < size:
            step = min(self.limit or size, size - done)
            states = [generator.get_state() for generator in generators]
            try:
                results.append(run(slice(done, done + step)))
            except RuntimeError as error:
                if step == 1 or not _out_of_memory(error):
                    raise
                error.__traceback__ = None  # its frames hold the tensors that filled the memory
            else:
                done += step
                continue
            self.limit = step // 2
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning("out of memory with %d samples at once; going on with %d, same result", step, self.limit)
        return results


def _out_of_memory(error: RuntimeError) -> bool:
    told = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in told or "not enough memory" in told


class Watched:
    """Batches that are counted and fingerprinted as they are read; those a former run has done are left out.

    Args:
        batches: any iterable.
        skip: batches done before, which are read and not given again.
        expected: the digest those had; "" to begin a chain.
        labelled: whether labels count as the inputs do.

    Attributes:
        digests: of the inputs of the first n batches, n from 0; changes with any of them, or their order.
        ahead: digest of the batches, of all processes, that a pass before this one has looked at, by a former run if
            not yet by this one; "" if none did.
    """

    def __init__(self, batches: Iterable[Batch], skip: int = 0, expected: str = "", labelled: bool = False) -> None:
        self.batches, self.skip, self.labelled = batches, skip, labelled
        self.digests = [""] if skip else [expected]
        self.ahead = ""
        self._expected = expected
        self._afresh = ""
        self._rest = self._read()
        self._ahead: list[Batch] = []

    def __len__(self) -> int:
        total = length_of(self.batches)
        if total is None:
            raise TypeError("the number of batches is not known")
        return max(0, total - self.skip)

    def __iter__(self) -> Iterator[Batch]:
        while self.pending():
            yield self._ahead.pop()

    def looked_ahead(self, other: Watched) -> None:
        """Note which batches a pass before this one has looked at.

        Raises:
            InputError: the former run, which this one goes on from, had looked at others. All processes raise, or none.
        """
        found = digest_of_all(other.digests[-1])
        if any(of_all(self.ahead not in ("", found))):
            raise InputError(
                "batches cannot be added to compensated scores: what compensates what would change; score anew, or to "
                "another file"
            )
        self.ahead = found

    def pending(self) -> bool:
        """Whether there is a batch to come.

        Raises:
            DataError: the batches that are left out are not those the former run has done.
        """
        if not self._ahead:
            self._ahead.extend(itertools.islice(self._rest, 1))
        return bool(self._ahead)

    def peek(self) -> Batch | None:
        """The batch to come, which is still to be read; None at the end.

        Raises:
            DataError: see `pending`.
        """
        return self._ahead[0] if self.pending() else None

    def put_back(self, batch: Batch) -> None:
        """Give the batch that was given last, or is the next one, as the next one."""
        self._ahead = [batch]

    def _read(self) -> Iterator[Batch]:
        count = 0
        for batch in self.batches:
            self.digests.append(self._digest(self.digests[-1], batch, count))
            count += 1
            if self._expected and not self.skip:
                self._warn_of_again(batch, count - 1)
            if count > self.skip:
                yield batch
            elif count == self.skip and self.digests[-1] != self._expected:
                break
        if self.skip and (count < self.skip or self.digests[self.skip] != self._expected):
            what = "batches, or labels," if self.labelled else "batches"
            raise DataError(
                f"the saved scores are of {self.skip} {what} other than those these begin with; give the {what} "
                "they were made of, or save to another file"
            )

    def _warn_of_again(self, batch: Batch, number: int) -> None:
        """Say so where batches that are added begin with those that are there."""
        self._afresh = self._digest(self._afresh, batch, number)
        if self._afresh == self._expected:
            logger.warning(
                "the scores given as start= are of the first %d of these batches, which now count twice; leave them "
                "out, or use save=, which does",
                number + 1,
            )

    def _digest(self, before: str, batch: Batch, number: int) -> str:
        """A fingerprint of a batch and all before it."""
        inputs, told = filled_inputs(batch, number), labels_of(batch) if self.labelled else None
        found = entries_digest(before, tuple(inputs.shape), _entries(inputs))
        return found if told is None else entries_digest(found, tuple(told.shape), told.detach().double())


def _entries(inputs: Tensor) -> Tensor:
    """Evenly spaced entries of every sample, `(samples, entries)` in float64."""
    flat = inputs.detach().reshape(len(inputs), -1)
    stride = max(1, flat.shape[1] // LOOKED_AT)
    return flat[:, ::stride].double()


def labels(batch: Batch, criterion: str) -> Tensor:
    """The labels of a batch, `(batch,)`.

    Raises:
        DataError: it has none.
    """
    found = labels_of(batch)
    if found is None:
        had = "hold none"
    elif found.is_floating_point() or found.ndim != 1:
        had = f"hold {str(found.dtype).removeprefix('torch.')} of shape {tuple(found.shape)}"
    elif bool((found < 0).any()):
        had = f"hold {int(found.min())} among them"
    else:
        return found
    raise DataError(
        f"criterion {criterion} needs labels, and the batches {had}; give (inputs, labels) batches with whole numbers "
        "from 0, one a sample, or use a label-free criterion such as TPV"
    )


def reduced(tally: Tally) -> Tally:
    """The tally of all processes together."""
    if process()[1] == 1:
        return tally
    whole = Tally()
    for counts, sums in of_all((tally.to_json(), {k: v.cpu() for k, v in tally.sums.items()})):
        whole = whole.joined(Tally(sums=sums, **{**counts, "samples": tuple(counts["samples"])}))
    return whole


def gathered_rows(rows: Sensitivities | None, counted: int, cap: int) -> Sensitivities | None:
    """The sensitivities of all processes together.

    Args:
        rows: of this process; None where it saw no batch, or keeps none.
        counted: samples that their linear part is the mean of.
        cap: most samples to keep.
    """
    parts = [(held, count) for held, count in of_all((rows, counted)) if held is not None]
    if not parts:
        return None
    effects = torch.cat([part.rows.cpu() for part, _ in parts])
    samples = sum(part.samples for part, _ in parts)
    kept = min(samples, cap)
    totals = [part.linear * count if part.total is None else part.total for part, count in parts]
    linear = torch.stack(totals).sum(0) / sum(count for _, count in parts)
    return Sensitivities(parts[0][0].groups, effects[: len(effects) // samples * kept], linear, kept)


def digest_of_all(digest: str) -> str:
    """One digest of those of all processes."""
    return hashlib.sha256("".join(of_all(digest)).encode()).hexdigest()
