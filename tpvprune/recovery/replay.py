"""Batches of an epoch that was stopped, drawn as they would have been without the stop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tpvprune.batches import Batch
from tpvprune.processes import of_all, process
from tpvprune.recovery.state import random_state, set_random_state


class Replay:
    """Reads batches epoch by epoch, from any place in one.

    Args:
        batches: read once per epoch; its `generator`, if it has one, draws their order.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self._generator = getattr(batches, "generator", None)
        self._began: dict[str, Any] = {}  # where random numbers stood as the epoch began

    def rest(self, done: int) -> Iterator[Batch]:
        """The batches of an epoch from that one on; the streams of random numbers stand where they stood then."""
        here = None
        if done:
            here = random_state()
            set_random_state(self._began["random"])
            if self._generator is not None:
                self._generator.set_state(self._began["generator"])
        else:
            self._began = {"random": random_state()}
            if self._generator is not None:
                self._began["generator"] = self._generator.get_state()
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
            "began": self._began.get("generator"),
            "now": None if self._generator is None else self._generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Be where that state was; of other numbers of processes each takes the random numbers of one."""
        streams = state["random"][process()[0] % len(state["random"])]
        self._began = {"random": streams["began"]}
        set_random_state(streams["now"])
        if state["now"] is not None and self._generator is not None:
            self._began["generator"] = state["began"]
            self._generator.set_state(state["now"])
