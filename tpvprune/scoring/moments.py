"""Moments of what layers are given, from one forward pass, and the inverse of a covariance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tpvprune.batches import Batch, device_of, evaluation_mode, inputs_of
from tpvprune.processes import of_all, process
from tpvprune.reads import ThroughLayers, read_by
from tpvprune.scoring.engine import Parts, global_number
from tpvprune.scoring.layout import Layout, outermost

WIDEST = 8192  # inputs of a layer whose covariances, ten of them at a time, have room in 6 GB
FULL = 0.75  # share of channels left of a precision at which they are copied together: it costs more than a step does
FAR = 100.0  # squares of a mean, in variances
SAMPLES = 2560  # covariances of a few thousand channels are known well enough from these, at many positions each


class Moments:
    """Sums over the rows of what a layer is given, `(..., rows, channels)`: over samples and positions.

    Channels whose first rows lie far from zero are summed about their mean, which single precision has no digits for.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.total = self.square = torch.zeros(())
        self.about: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        with torch.autocast(rows.device.type, enabled=False):  # a covariance in half precision is none
            if not self.rows and rows.shape[-2]:
                spread, mean = torch.var_mean(rows, -2, correction=0)
                far = mean.square() > FAR * spread
                self.about = torch.where(far, mean, 0) if bool(far.any()) else None
            if self.about is not None:
                rows = rows - self.about.unsqueeze(-2)
            self.rows += rows.shape[-2]
            self.total = self.total + rows.sum(-2).double()
            self.square = self.square + (rows.mT @ rows).double()

    def back_to(self, other: Moments) -> None:
        """Forget what was added since `other` was copied from this."""
        self.rows, self.total, self.square, self.about = other.rows, other.total, other.square, other.about

    def to(self, device: torch.device | str) -> Moments:
        """The sums on another device."""
        moved = Moments()
        moved.rows, moved.total, moved.square = self.rows, self.total.to(device), self.square.to(device)
        moved.about = None if self.about is None else self.about.to(device)
        return moved

    def __add__(self, other: Moments) -> Moments:
        whole = copy.copy(self if self.rows else other)
        if self.rows and other.rows:
            if other.about is not None or whole.about is not None:
                other = other._moved(whole.about)
            whole.rows = self.rows + other.rows
            whole.total, whole.square = self.total + other.total, self.square + other.square
        return whole

    def _moved(self, about: Tensor | None) -> Moments:
        """The same rows, summed about another point."""
        zero = torch.zeros_like(self.total)
        by = (zero if self.about is None else self.about.double()) - (zero if about is None else about.double())
        across = self.total.unsqueeze(-1) * by.unsqueeze(-2)
        moved = Moments()
        moved.rows, moved.about, moved.total = self.rows, about, self.total + self.rows * by
        moved.square = self.square + across + across.mT + self.rows * by.unsqueeze(-1) * by.unsqueeze(-2)
        return moved

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Mean `(..., channels)` and covariance `(..., channels, channels)`."""
        mean = self.total / self.rows
        covariance = self.square / self.rows - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return (mean if self.about is None else mean + self.about.double()), covariance


def watch(
    model: nn.Module,
    batches: Iterable[Batch],
    layers: Iterable[tuple[str, nn.Module]],
    see: Callable[[str, nn.Module, Tensor, range], None],
    held: Sequence[Moments],
    apart: bool,
) -> None:
    """One forward pass over the first `SAMPLES` samples, in parts where memory runs out.

    Args:
        model: any module.
        batches: its inputs; a process among several may have none.
        layers: names, and modules of the model.
        see: told the name and the module of each layer that is called, what it is given and the numbers of the samples.
        held: what it adds to.
        apart: whether samples have to be told apart; they come outermost then.

    Raises:
        UnseenError: they cannot be.
    """
    numbers, seen, layers, parts = range(0), 0, list(layers), Parts()
    layout = Layout(model)

    def given(name: str, place: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            value = read_by(args, kwargs).detach()
            if apart and (layout.met(place, value) or not layout.fits):
                return
            see(name, module, outermost(value, layout.axes.get(place, 0)), numbers)

        return hook

    def passed(inputs: Tensor) -> bool:
        # Hooks are on for the pass alone: what gives the batches may use the model too.
        with evaluation_mode(model), torch.no_grad(), ThroughLayers(model), ExitStack() as hooks:
            for number, (name, module) in enumerate(layers):
                hook = given(name, f"{number}:{name}")
                hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
            if apart:
                layout.begin(inputs)
            model(inputs)
            return apart and layout.end()

    for local, batch in enumerate(batches):
        inputs, first = inputs_of(batch).to(device_of(model)), global_number(local)

        def run(part: slice, inputs: Tensor = inputs, first: int = first) -> None:
            nonlocal numbers
            numbers = range(first + part.start, first + part.stop)
            before = [copy.copy(moments) for moments in held]

            def back() -> None:
                for moments, saved in zip(held, before, strict=True):
                    moments.back_to(saved)

            try:
                if passed(inputs[part]):  # where samples lie is known now
                    back()
                    passed(inputs[part])
            except RuntimeError:
                back()
                raise

        parts(len(inputs), run)
        seen += len(inputs)
        if seen >= SAMPLES // process()[1]:
            break


def together(moments: dict[str, Moments], model: nn.Module) -> dict[str, Moments]:
    """The sums of all processes, on the model's device."""
    if process()[1] == 1:
        return moments
    first, *others = of_all({name: own.to("cpu") for name, own in moments.items()})
    return {name: sum((other[name] for other in others), own).to(device_of(model)) for name, own in first.items()}


def damped_inverse(covariance: Tensor, ridge: float) -> tuple[Tensor, float]:
    """Inverse of a covariance with a ridge, a share of its mean variance, and what that adds to the diagonal.

    Raises:
        ArithmeticError: the covariance is not finite.
    """
    damping = max(ridge, 1e-8) * covariance.diagonal().mean().clamp(min=1e-30)
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    for _ in range(60):
        factor, failed = torch.linalg.cholesky_ex(covariance + damping * eye)
        if not failed:
            return torch.cholesky_inverse(factor), float(damping)
        damping = 10 * damping  # what hardly varies about a large mean is not positive definite, for rounding
    raise ArithmeticError("no damping makes the covariance positive definite")
