"""Batches of an epoch that was stopped, drawn as they would have been without the stop."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tpvprune.batches import Batch
from tpvprune.errors import CheckpointError
from tpvprune.processes import of_all, process
from tpvprune.recovery.state import random_state, set_random_state

logger = logging.getLogger(__name__)
DRAW = ("", "sampler", "batch_sampler", "batch_sampler.sampler")  # parts of a DataLoader that may have a generator


class Replay:
    """Reads batches epoch by epoch, from any place in one.

    Args:
        batches: read once per epoch; its `generator` and those of its samplers, if it has any, draw their order.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self._generators = _generators(batches)
        self._began: dict[str, Any] = {}  # where random numbers stood as the epoch began

    def rest(self, done: int) -> Iterator[Batch]:
        """The batches of an epoch from that one on; the streams of random numbers stand where they stood then."""
        here = None
        if done:
            here = random_state()
            set_random_state(self._began["random"])
            self._set(self._began["generators"])
        else:
            self._began = {"random": random_state(), "generators": [g.get_state() for g in self._generators]}
        for number, batch in enumerate(self._batches):
            if number + 1 == done and here is not None:
                set_random_state(here)
            if number >= done:
                yield batch

    def to_state(self, together: bool) -> dict[str, Any]:
        """What `restore` goes on from; of all processes if they give it together."""
        mine = {"began": self._began["random"], "now": random_state()}
        return {
            "random": of_all(mine) if together else [mine],
            "began": self._began["generators"],
            "now": [generator.get_state() for generator in self._generators],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Be where that state was; of other numbers of processes each takes the random numbers of one.

        Raises:
            CheckpointError: the state is of batches that more or fewer generators draw.
        """
        if len(state["now"]) != len(self._generators):
            raise CheckpointError(
                f"finetune: the folder holds a run whose batches and samplers had {len(state['now'])} generators of "
                f"their own, and these have {len(self._generators)}; give batches as it began with, or another folder"
            )
        streams = state["random"][process()[0] % len(state["random"])]
        self._began = {"random": streams["began"], "generators": state["began"]}
        set_random_state(streams["now"])
        self._set(state["now"])

    def tell_inexact(self) -> None:
        """Warn of batches that are not drawn again as they were."""
        if getattr(self._batches, "persistent_workers", False):
            logger.warning(
                "finetune: workers that stay from epoch to epoch (persistent_workers) have random numbers that no "
                "state holds: a run that is gone on with reads images in another order; give persistent_workers=False "
                "where the result has to be the same"
            )

    def _set(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def draws_kept(batches: Iterable[Batch]) -> Iterator[None]:
    """Batches that are read in between leave all streams of random numbers where they are."""
    before, generators = random_state(), _generators(batches)
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        set_random_state(before)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(batches: Iterable[Batch]) -> list[torch.Generator]:
    """Those that draw what is read, each once: samplers may share one with their loader."""
    found: list[torch.Generator] = []
    for part in DRAW:
        owner: Any = batches
        for name in filter(None, part.split(".")):
            owner = getattr(owner, name, None)
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and not any(generator is one for one in found):
            found.append(generator)
    return found
