"""Perturbations of weights, given by their first two moments.

A perturbation is a frozen dataclass with `moments(name, weight) -> (mean, variance)`: what is added to each entry of
a weight on average, and how much that varies. A unit's score under it is
`E_x[(sum over the unit of gradient * mean)^2 + sum over the unit of gradient^2 * variance]`: the mean moves all of
a unit at once, the noise each entry by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tpvprune.errors import InputError
from tpvprune.scoring.engine import wide


@runtime_checkable
class Perturbation(Protocol):
    """What a perturbation offers; `testing.check_perturbation` checks one of your own."""

    def moments(self, name: str, weight: Tensor) -> tuple[Tensor | float | None, Tensor | float | None]:
        """Mean and variance of what is added to `weight`: a tuple of two.

        Each is a tensor of a shape that broadcasts to the weight's, a number that holds for all of it, or None for
        zero.

        Args:
            name: qualified name of the parameter.
            weight: its value, as a copy.
        """
        ...


@dataclass(frozen=True)
class Removal:
    """The weight becomes zero: mean `-w`, no variance."""

    def moments(self, name: str, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`(-weight, None)`."""
        return -weight, None


@dataclass(frozen=True)
class Rounding:
    """Uniform rounding to `2^bits` levels between the least and the largest weight: variance `step^2 / 12`.

    The error of rounding is taken as uniform noise (Widrow and Kollár 2008), `step = range / (2^bits - 1)`.

    Attributes:
        bits: 1 to 16.
        per: one range for the whole "tensor", or one for each "channel": a slice along the weight's first
            dimension, which is an output channel; of a transposed convolution, an input channel.
    """

    bits: int = 8
    per: Literal["tensor", "channel"] = "tensor"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 1 <= self.bits <= 16:
            raise InputError(f"bits={self.bits!r} must be a whole number from 1 to 16")
        if self.per not in ("tensor", "channel"):
            raise InputError(f"per={self.per!r} must be 'tensor' or 'channel'")

    def moments(self, name: str, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`(None, step^2 / 12)`, one step a tensor or a slice along the first dimension."""
        if self.per == "tensor" or weight.ndim < 2:
            spread = weight.max() - weight.min()
        else:
            rows = weight.flatten(1)
            spread = (rows.amax(1) - rows.amin(1)).reshape(-1, *(1,) * (weight.ndim - 1))
        return None, (spread / (2**self.bits - 1)).square() / 12


@dataclass(frozen=True)
class Isotropic:
    """Independent noise of the same size on every weight.

    Attributes:
        sigma: its standard deviation, in the weights' own unit.
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise InputError(f"sigma={self.sigma!r} must be zero or more")

    def moments(self, name: str, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`(None, sigma^2)`."""
        return None, torch.full((), self.sigma**2, dtype=weight.dtype, device=weight.device)


PERTURBATIONS: dict[str, type] = {"removal": Removal, "rounding": Rounding, "isotropic": Isotropic}


def perturbation_named(perturbation: str | Perturbation) -> Perturbation:
    """A perturbation from its name (with its defaults), or the perturbation itself.

    Raises:
        InputError: there is none of that name.
    """
    if isinstance(perturbation, str):
        if perturbation not in PERTURBATIONS:
            known = ", ".join(sorted(PERTURBATIONS))
            raise InputError(f"there is no perturbation {perturbation!r}; choose one of {known}")
        made: Perturbation = PERTURBATIONS[perturbation]()
        return made
    return perturbation


def moments_of(perturbation: Perturbation, name: str, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The moments, checked and at the weight's shape; of a weight in half precision in float32, where they have room.

    Raises:
        InputError: they are no tuple of two, a moment is neither a tensor nor a number, has another shape or is not
            finite, or a variance is below zero.
    """
    weight = wide(weight).clone()  # what a perturbation does in place must not reach the model
    given: Any = perturbation.moments(name, weight)
    who = type(perturbation).__name__
    if not isinstance(given, tuple) or len(given) != 2:
        raise InputError(f"{who}: the moments of {name!r} are {_told(given)}, no pair; return (mean, variance)")
    mean, variance = (
        None if moment is None else _moment(f"{who}: the perturbation's {kind} of {name!r}", moment, weight)
        for kind, moment in zip(("mean", "variance"), given, strict=True)
    )
    if variance is not None and bool((variance < 0).any()):
        raise InputError(f"{who}: the perturbation's variance of {name!r} is below zero; give squares")
    return mean, variance


def _moment(what: str, moment: Any, weight: Tensor) -> Tensor:
    """One moment at the weight's shape."""
    if isinstance(moment, Real):
        moment = torch.tensor(float(moment))
    if not isinstance(moment, Tensor):
        raise InputError(f"{what} is {_told(moment)}; give a tensor, a number, or None for zero")
    try:
        moment = moment.to(weight).expand(weight.shape)
    except RuntimeError:
        raise InputError(
            f"{what} has shape {tuple(moment.shape)}, the weight {tuple(weight.shape)}: it does not broadcast"
        ) from None
    if not bool(torch.isfinite(moment).all()):
        raise InputError(f"{what} is not finite")
    return moment


def _told(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)}"
    sized = f" of {len(given)}" if isinstance(given, (tuple, list)) else ""
    return f"a {type(given).__name__}{sized}"
