"""Where the samples of a batch lie in what layers read and give."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpvprune.batches import evaluation_mode
from tpvprune.errors import ModelError, UnseenError
from tpvprune.reads import ThroughLayers

ALIKE = 2e-2  # of the largest: rounding, also in half precision

Call = tuple[Tensor | None, Tensor | None]
"""Some samples of what a layer was given, `(samples, ...)`, if they lie along the first axis, or the second."""


class Layout:
    """The axes that samples lie along in what layers are given, found in the first pass over inputs of a shape.

    Whoever has hooks on calls `begin`, the model and `end`; the hooks call `met`. Samples of the pass, `a b ...`, are
    run once more, as `b b a`: what a layer is given of each must be where that sample is, and stay the same.

    Args:
        model: any module.

    Attributes:
        axes: by place; 0, in which each sample may have several rows, or 1.
        shapes: places, and the shapes of what they were given since `begin`.
        fits: whether samples could lie along the axis that is known, or the first, of what was met last.
    """

    def __init__(self, model: nn.Module) -> None:
        self.axes: dict[str, int] = {}
        self.shapes: list[tuple[str, torch.Size]] = []
        self.fits = True
        self._model, self._inputs, self._own = model, torch.empty(0), False
        self._rows: dict[torch.Size, dict[str, set[int]]] = {}  # that a sample has, by shape of the inputs
        self._kept: dict[str, list[Call]] = {}
        self._which: list[int] = []  # samples to keep
        self._lost: str | None = None  # whose rows are not as many a sample as was found
        self._drawn: list[Tensor] = []  # states of random numbers

    def begin(self, inputs: Tensor) -> None:
        """Say that a pass begins. Batches of one say nothing, and need not.

        Args:
            inputs: `(batch, ...)`.
        """
        self._inputs, self.shapes, self._lost, self._which = inputs, [], None, []
        if len(inputs) > 1 and inputs.shape[1:] not in self._rows:
            last = len(inputs) - 1  # whatever puts a sample before another one moves it, or the first
            other = next((n for n in range(last, 0, -1) if not torch.equal(inputs[n], inputs[0])), last)
            self._kept, self._which = {}, [other, other, 0]
            self._drawn = [torch.get_rng_state()]
            if inputs.device.type == "cuda":
                self._drawn.append(torch.cuda.get_rng_state(inputs.device))

    def met(self, place: str, value: Tensor) -> bool:
        """Say what a layer is given.

        Args:
            place: a name for where.
            value: what.

        Returns:
            Whether the pass is one of the layout's own, which the hook has nothing else to do with.
        """
        if self._which:
            first, second = (_samples(value, axis, len(self._inputs), self._which) for axis in (0, 1))
            self._kept.setdefault(place, []).append((first, second))
        if self._own:
            return True
        self.shapes.append((place, value.shape))
        size, batch = value.shape[self.axes.get(place, 0)], len(self._inputs)
        self.fits = size % batch == 0
        if not self._which and batch > 1:
            self.fits = self.fits and size // batch in self._rows[self._inputs.shape[1:]].get(place, ())
            if not self.fits:
                self._lost = place
        return False

    def end(self) -> bool:
        """Find the axes, unless inputs of this shape have been met. Hooks are on.

        Returns:
            Whether an axis is another one than hooks were told during the pass.

        Raises:
            UnseenError: a layer has its samples in another order, or what it reads of one depends on others; or how
                many rows each has does, and nobody knows whose they are.
        """
        if self._lost is not None:
            raise _disordered(self._lost)
        if not self._which:
            return False
        inputs, kept, which, self._which = self._inputs, self._kept, self._which, []
        try:
            again = self._run(inputs[which], [*range(len(which))])
        except torch.OutOfMemoryError:
            raise
        except Exception:  # as of a model that wants pairs, or always as many
            again = self._run(inputs[(which * len(inputs))[: len(inputs)]], [*range(min(len(which), len(inputs)))])
        rows, told = self._rows.setdefault(inputs.shape[1:], {}), dict(self.axes)
        for place, calls in kept.items():
            moved = again.get(place, [])
            alike = len(moved) == len(calls)  # one that is called as often as the samples ask for mixes them
            fits = [n for n in (0, 1) if alike and all(_same(a[n], b[n]) for a, b in zip(calls, moved, strict=True))]
            if not fits:
                raise _disordered(place)
            self.axes[place] = fits[0]
            rows[place] = {call[fits[0]].shape[fits[0] + 1] for call in calls}  # type: ignore[union-attr]
        return any(axis != told.get(place, 0) for place, axis in self.axes.items())

    def _run(self, inputs: Tensor, which: list[int]) -> dict[str, list[Call]]:
        """What layers are given of some samples in a pass of its own."""
        saved = self._inputs, self._which
        self._inputs, self._which, self._kept, self._own = inputs, which, {}, True
        devices, model = [inputs.device] * (len(self._drawn) - 1), self._model
        try:
            with evaluation_mode(model), torch.no_grad(), ThroughLayers(model), torch.random.fork_rng(devices):
                torch.set_rng_state(self._drawn[0])  # what is drawn is the same each time
                if devices:
                    torch.cuda.set_rng_state(self._drawn[1], inputs.device)
                model(inputs)
            return self._kept
        finally:
            (self._inputs, self._which), self._own = saved, False


def mixes_samples(model: nn.Module) -> str | None:
    """The name of a batch norm that has no running statistics, and takes those of the batch; None if there is none."""
    named = model.named_modules()
    return next((name for name, m in named if isinstance(m, _BatchNorm) and m.running_mean is None), None)


def mixed(name: str) -> UnseenError:
    """What is to be said of it."""
    return UnseenError(
        f"{name!r} has no running statistics and mixes the samples of a batch, and what each of them says cannot be "
        "told apart; score with TPV(engine='batched'), or batches of one"
    )


def without_gradients(name: str) -> ModelError:
    """What is to be said of a layer that a model runs without gradients."""
    return ModelError(
        f"{name!r} runs under torch.no_grad() inside the model, so that what it does to the outputs cannot be seen; "
        "take that out of forward, or leave the layer out"
    )


def _samples(value: Tensor, axis: int, batch: int, which: list[int]) -> Tensor | None:
    """Copies of them, if they lie along an axis; what is given may be written into later."""
    if value.ndim < axis + 2 or value.shape[axis] % batch:
        return None
    return value.detach().unflatten(axis, (batch, -1)).movedim(axis, 0)[which]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether samples are what they were."""
    if one is None or other is None or one.shape[1:] != other.shape[1:]:
        return False
    one = one[: len(other)]
    if torch.equal(one, other):
        return True
    # The same numbers at another place in a batch may be summed in another order.
    size = float(torch.nan_to_num(one, 0.0, 0.0, 0.0).abs().max())
    return torch.allclose(one, other, rtol=0.0, atol=ALIKE * size, equal_nan=True)


def _disordered(place: str) -> UnseenError:
    return UnseenError(
        f"{place.partition(':')[2] or place!r} has the samples of a batch in an order of its own, or mixes them, "
        "and what each of them says cannot be told apart; score with TPV(engine='batched'), or batches of one"
    )


def outermost(value: Tensor, axis: int) -> Tensor:
    """A view with the samples first."""
    return value.transpose(0, axis) if axis else value
