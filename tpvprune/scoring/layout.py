"""Where the samples of a batch lie in what layers read and give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpvprune.batches import evaluation_mode
from tpvprune.errors import ModelError, UnseenError
from tpvprune.reads import ThroughLayers, read_by

Places = Mapping[str, tuple[nn.Module, bool]]
"""By name a module, and whether its output is meant or its input."""


def unclear(shape: torch.Size, batch: int, last: bool) -> bool:
    """Whether a tensor of a batch of several samples may have them elsewhere than outermost, one after the other.

    Args:
        shape: of the tensor.
        batch: samples in the batch.
        last: whether channels come last, so that there may be something before the samples, as time.
    """
    return batch > 1 and (shape[0] != batch or (last and len(shape) > 2 and shape[1] == batch))


def sample_axes(model: nn.Module, places: Places, inputs: Tensor) -> dict[str, int]:
    """The axis that the samples lie along in a layer's input or output: 0, in which each may have several rows, or 1.

    Two samples are run together, and then the second one twice: what has changed belongs to the first.

    Args:
        model: any module; its hooks run.
        places: where to look; those that a pass does not reach are left out.
        inputs: `(batch, ...)` of two samples or more.

    Raises:
        UnseenError: a layer has its samples in another order, or what it reads of one depends on others.
    """
    other = next((n for n in range(1, len(inputs)) if not torch.equal(inputs[n], inputs[0])), 1)
    one, same = (_seen(model, places, inputs[[first, other]]) for first in (0, other))
    found = {}
    for name, calls in one.items():
        again = same.get(name, [])
        alike = len(again) == len(calls)  # one that is called as often as the samples ask for mixes them
        fits = [a for a in (0, 1) if alike and all(_apart(*pair, a) for pair in zip(calls, again, strict=True))]
        if not fits:
            raise UnseenError(
                f"{name.partition(':')[2] or name!r} has the samples of a batch in an order of its own, or mixes them, "
                "and what each of them says cannot be told apart; score with TPV(engine='batched'), or batches of one"
            )
        found[name] = fits[0]
    return found


class Layout:
    """The axes that samples lie along, found where shapes first leave them open.

    Args:
        model: any module; its hooks run.
        places: where samples may lie.

    Attributes:
        axes: by place, those that were found; 0 elsewhere.
        looking: whether a pass is under way that hooks of others have nothing to do with.
    """

    def __init__(self, model: nn.Module, places: Places) -> None:
        self.axes: dict[str, int] = {}
        self.looking = False
        self._model, self._places = model, places

    def settle(self, seen: Iterable[tuple[str, torch.Size, bool]], inputs: Tensor) -> None:
        """Find the axes of places that were seen in a pass.

        Args:
            seen: place, shape, and whether channels come last; see `unclear`.
            inputs: `(batch, ...)`, of the pass.

        Raises:
            UnseenError: see `sample_axes`.
        """
        seen = list(seen)
        calls = Counter(key for key, *_ in seen)
        often = {key for key, count in calls.items() if count > 1 and len(inputs) > 1}  # a call may be one sample's
        asked = (often | {key for key, shape, last in seen if unclear(shape, len(inputs), last)}) - set(self.axes)
        if asked:
            self.looking = True
            try:
                found = sample_axes(self._model, {key: self._places[key] for key in asked}, inputs)
            finally:
                self.looking = False
            self.axes |= dict.fromkeys(asked, 0) | found


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
        with evaluation_mode(model), torch.no_grad(), ThroughLayers(model):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _apart(one: Tensor, same: Tensor, axis: int) -> bool:
    """Whether all that differs between two runs lies in the first half along an axis."""
    if one.shape != same.shape or one.ndim < axis + 2 or one.shape[axis] % 2:
        return False
    differs = (one != same) & ~(one.isnan() & same.isnan())
    return not bool(differs.unflatten(axis, (2, -1)).select(axis, 1).any())


def outermost(value: Tensor, axis: int) -> Tensor:
    """A view with the samples first."""
    return value.transpose(0, axis) if axis else value
