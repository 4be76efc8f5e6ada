"""Where the samples of a batch lie in what layers read and give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpvprune.batches import evaluation_mode
from tpvprune.errors import ModelError, UnseenError
from tpvprune.reads import ThroughLayers, read_by

Places = Mapping[str, tuple[nn.Module, bool]]
"""By name a module, and whether its output is meant or its input."""

LOOKED_AT = 3  # samples
ALIKE = 2e-2  # of the largest: rounding, also in half precision


class Layout:
    """The axes that samples lie along, found before the first pass over inputs of a shape.

    Args:
        model: any module; its hooks run.
        places: where samples may lie.

    Attributes:
        axes: by place; 0, in which each sample may have several rows, or 1.
        looking: whether a pass is under way that hooks of others have nothing to do with.
    """

    def __init__(self, model: nn.Module, places: Places) -> None:
        self.axes: dict[str, int] = {}
        self.looking = False
        self._model, self._places = model, places
        self._rows: dict[torch.Size, dict[str, set[Fraction]]] = {}  # that a sample has, by shape of the inputs

    def look(self, inputs: Tensor) -> None:
        """Find the axes, unless inputs of this shape have been met. Batches of one say nothing, and need not.

        Three samples are run, `a b c`, and then `c b b`: what a layer is given of each must be where that sample is,
        and stay the same. A model that does not run on three runs on all.

        Args:
            inputs: `(batch, ...)`, of the pass to come.

        Raises:
            UnseenError: a layer has its samples in another order, or what it reads of one depends on others.
        """
        if len(inputs) < 2 or inputs.shape[1:] in self._rows:
            return
        differ = (n for n in range(1, len(inputs)) if not torch.equal(inputs[n], inputs[0]))
        others = [*islice(differ, LOOKED_AT - 1)] or [1]
        few = inputs[[0, others[0], others[-1]]]
        self.looking = True
        try:
            one, again, order = self._both(few)
        except Exception:  # as of a model that wants pairs, or always as many
            one, again, order = self._both(inputs)
        finally:
            self.looking = False
        rows = self._rows[inputs.shape[1:]] = {}
        for place, calls in one.items():
            moved = again.get(place, [])
            alike = len(moved) == len(calls)  # one that is called as often as the samples ask for mixes them
            fits = [n for n in (0, 1) if alike and all(_follows(*p, order, n) for p in zip(calls, moved, strict=True))]
            if not fits:
                raise _disordered(place)
            self.axes[place] = fits[0]
            rows[place] = {Fraction(call.shape[fits[0]], len(order)) for call in calls}

    def _both(self, inputs: Tensor) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]], list[int]]:
        """What the places hold of samples, and of the same in another order, without the first; and that order."""
        order = [*range(len(inputs) - 1, 0, -1), 1]
        return _seen(self._model, self._places, inputs), _seen(self._model, self._places, inputs[order]), order

    def check(self, seen: Iterable[tuple[str, torch.Size]], inputs: Tensor) -> None:
        """Refuse places that have not as many rows a sample as was found.

        Args:
            seen: place and shape of what a pass met.
            inputs: `(batch, ...)`, of the pass.

        Raises:
            UnseenError: how many there are depends on the samples, so that nobody knows whose they are.
        """
        rows = self._rows.get(inputs.shape[1:])
        for place, shape in seen if rows is not None and len(inputs) > 1 else ():
            if Fraction(shape[self.axes.get(place, 0)], len(inputs)) not in rows.get(place, ()):  # type: ignore[union-attr]
                raise _disordered(place)


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


def _seen(model: nn.Module, places: Places, inputs: Tensor) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}

    def hook(name: str, after: bool) -> Any:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = output if after else read_by(args, kwargs)
            found.setdefault(name, []).append(value.detach().clone())  # it may be written into later

        return keep

    handles = [m.register_forward_hook(hook(n, after), with_kwargs=True) for n, (m, after) in places.items()]
    try:
        drawn = [inputs.device] if inputs.device.type == "cuda" else []
        with evaluation_mode(model), torch.no_grad(), ThroughLayers(model), torch.random.fork_rng(drawn):
            torch.manual_seed(0)  # what is drawn is the same each time
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _follows(one: Tensor, moved: Tensor, order: list[int], axis: int) -> bool:
    """Whether what lies along an axis has moved as the samples have."""
    if one.shape != moved.shape or one.ndim < axis + 2 or one.shape[axis] % len(order):
        return False
    one, moved = (value.unflatten(axis, (len(order), -1)).movedim(axis, 0) for value in (one, moved))
    pairs = [(there, one[n]) for there, n in zip(moved, order, strict=True)]
    if all(torch.equal(there, here) for there, here in pairs):
        return True
    # The same numbers at another place in a batch may be summed in another order.
    size = float(torch.nan_to_num(one, 0.0, 0.0, 0.0).abs().max())
    return all(torch.allclose(there, here, rtol=0.0, atol=ALIKE * size, equal_nan=True) for there, here in pairs)


def _disordered(place: str) -> UnseenError:
    return UnseenError(
        f"{place.partition(':')[2] or place!r} has the samples of a batch in an order of its own, or mixes them, "
        "and what each of them says cannot be told apart; score with TPV(engine='batched'), or batches of one"
    )


def outermost(value: Tensor, axis: int) -> Tensor:
    """A view with the samples first."""
    return value.transpose(0, axis) if axis else value
