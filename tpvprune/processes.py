"""Several processes of one launcher: which of them this is, what they tell each other, what they do together.

The first process leads: it alone writes results, and calls the others to the jobs that all share. They wait for it
otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch

from tpvprune.errors import InputError

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # others wait for as long as the first one is busy on its own
_apart = False  # whether this process is about something of its own, while others wait


def process() -> tuple[int, int]:
    """(rank of this process, number of processes) where work is shared; (0, 1) where it is not."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and not _apart:
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextmanager
def _being(apart: bool) -> Iterator[None]:
    global _apart
    before, _apart = _apart, apart
    try:
        yield
    finally:
        _apart = before


def launched() -> tuple[int, int]:
    """(rank, number of processes) that a launcher has told this one, before any of them have met."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), count) if count > 1 else (0, 1)


def of_all(mine: T) -> list[T]:
    """What each process gives, by rank."""
    world = process()[1]
    if world == 1:
        return [mine]
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, mine)
    return found


def from_first(mine: T) -> T:
    """What the first process gives."""
    if process()[1] == 1:
        return mine
    held = [mine]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


@contextmanager
def met() -> Iterator[None]:
    """Meet the other processes that `torchrun` or `accelerate launch` started; alone, or having met, do nothing.

    Raises:
        InputError: there are more of them than GPUs.
    """
    if launched()[1] == 1 or not torch.distributed.is_available() or torch.distributed.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > devices:
            raise InputError(
                f"{here} processes were started on a machine with {devices} GPUs; start as many as there are, or hide "
                "the GPUs (CUDA_VISIBLE_DEVICES=)"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    yield
    torch.distributed.destroy_process_group()  # not after an error: others may wait for this process still


class Crew:
    """The processes that do one piece of work; a single one does it all."""

    def __init__(self) -> None:
        self._busy = False
        self.leads = process()[0] == 0

    @contextmanager
    def led(self) -> Iterator[None]:
        """What the first process does; at its end the others are let go."""
        with _being(apart=True):
            try:
                yield
            finally:
                if not self._busy:  # what ends a job is the others' too, or else the launcher ends them
                    with suppress(RuntimeError), _being(apart=False):  # they may have been stopped
                        from_first("")

    def together(self, name: str, job: Callable[[], T]) -> T:
        """Do a job in all processes; what it gives in the first one, which calls."""
        with _being(apart=False):
            from_first(name)
            self._busy = True
            found = job()
            self._busy = False
        return found

    def follow(self, jobs: Mapping[str, Callable[[], Any]]) -> None:
        """What the others do: a share of each job that the first one calls, until they are let go."""
        while name := from_first(""):
            jobs[name]()
