"""Run many forward passes side by side, layer by layer, whatever their Python control flow.

Refitting layer after layer needs the inputs each layer sees once the layers before it were refitted.
Running the network from the start for every layer would cost the square of its depth. Instead each
batch's forward pass is suspended where the next layer begins, all of them wait there until that layer
has its new weights, and go on: one forward pass in total. A suspended pass is a thread; only one runs
at any moment, and what it holds can be moved to a file while it waits.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tpvprune.reads import ThroughLayers, read_by
from tpvprune.recovery.spill import Result, Spilled, Watch


class _Stopped(BaseException):
    """Ends a suspended forward pass early; not an Exception, so that no model swallows it."""


class Strand:
    """One forward pass that stops at given layers.

    Args:
        model: in eval mode; its parameters may be changed while the strand is suspended.
        inputs: one batch.
        layers: names of the layers to stop at, each at its first call only.
        at: stop before the layer, holding its input, or after it, holding its output.
        keep: results of torch functions that are kept in `kept` until they are taken from there.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        layers: Sequence[str],
        at: Literal["input", "output"],
        keep: Collection[Result] = (),
    ) -> None:
        self.layer: str | None = None
        self.value: Tensor | None = None
        self._model, self._inputs, self._at = model, inputs, at
        self._wanted = set(layers)
        self._watch = Watch(keep)
        self._spilled: Spilled | None = None
        self.kept = self._watch.kept
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._handles = [
            model.get_submodule(name).register_forward_pre_hook(self._before(name), with_kwargs=True)
            if at == "input"
            else model.get_submodule(name).register_forward_hook(self._after(name))
            for name in layers
        ]

    def advance(self) -> str | None:
        """Run to the next layer; its name, with its tensor in `value`, or None at the end.

        Raises:
            Exception: whatever the model's forward pass raises.
        """
        if not self._thread.ident:
            self._thread.start()
        self.layer = self.value = None
        if self._spilled is not None:
            self._spilled.back()
            self._spilled = None
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return self.layer

    def held(self) -> int:
        """Bytes of memory that the suspended pass holds."""
        return 0 if self._spilled is not None else sum(storage.nbytes() for storage in self._watch.storages())

    def spill(self) -> int:
        """Move what the suspended pass holds to a file until it goes on; how many bytes that were."""
        if self._spilled is None:
            self._spilled = Spilled(self._watch.storages())
        return self._spilled.bytes

    def stop(self) -> None:
        """Give up the rest of the pass and remove the hooks."""
        for handle in self._handles:
            handle.remove()
        if self._thread.is_alive():
            self._stopping = True
            self._go.release()
            self._thread.join()
        if self._spilled is not None:
            self._spilled.forget()
            self._spilled = None
        self.value = None
        self.kept.clear()

    def _run(self) -> None:
        self._go.acquire()
        try:
            with torch.no_grad(), self._watch, ThroughLayers(self._model):
                if not self._stopping:
                    self._model(self._inputs)
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self.layer = self.value = None
        self._paused.release()

    def _pause(self, name: str, value: Tensor) -> None:
        self._wanted.discard(name)
        self.layer, self.value = name, value
        self._paused.release()
        self._go.acquire()
        if self._stopping:
            raise _Stopped

    def _mine(self, name: str) -> bool:
        return threading.current_thread() is self._thread and name in self._wanted

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._mine(name):
                self._pause(name, read_by(args, kwargs))

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._mine(name):
                self._pause(name, output)

        return hook


@contextmanager
def strands(
    model: nn.Module,
    batches: Sequence[Tensor],
    layers: Sequence[str],
    at: Literal["input", "output"],
    keep: Collection[Result] = (),
) -> Iterator[list[Strand]]:
    """One strand a batch; all are stopped and all hooks removed at the end."""
    made = [Strand(model, inputs, layers, at, keep) for inputs in batches]
    try:
        yield made
    finally:
        for strand in made:
            strand.stop()
