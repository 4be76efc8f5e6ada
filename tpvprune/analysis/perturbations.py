"""Changes of a model's weights as random vectors: given by moments, factors, an operator, or a sampler.

What estimates need of a change is `g^T C g` of a gradient `g` (the trace form) and a draw of it (the empirical form).
`bind` puts both behind one small interface, for one model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tpvprune.errors import InputError, ModelError
from tpvprune.planning.patterns import matcher
from tpvprune.scoring.perturb import Isotropic, Perturbation, Rounding, moments_of, perturbation_named

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Diagonal:
    """Independent noise with a variance for each weight.

    Attributes:
        variances: per parameter, of a shape that broadcasts to it. Parameters that are not named stay.
    """

    variances: Weights

    def moments(self, name: str, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`(None, variance)`; no moment at all for a parameter that is not named."""
        return None, self.variances.get(name)


@dataclass(frozen=True)
class LowRank:
    """`C = sum over r of v_r v_r^T`: noise along a few directions in the space of all weights.

    Attributes:
        factors: per parameter, its part of every direction, `(rank, *parameter)`. Parameters that are not named stay.
    """

    factors: Weights


@dataclass(frozen=True)
class Operator:
    """A covariance known by what it makes of a vector.

    Attributes:
        apply: takes and gives per parameter a tensor of its shape: `g -> C g`, linear, symmetric, not negative.
        draw: makes one change from copies of the weights and a generator; the empirical form needs it.
    """

    apply: Callable[[Weights], Weights]
    draw: Callable[[Weights, torch.Generator], Weights] | None = None


@dataclass(frozen=True)
class Sampler:
    """Any random change at all.

    Attributes:
        draw: makes one change, per parameter, from copies of the weights and a generator. Parameters that it does
            not name stay.
    """

    draw: Callable[[Weights, torch.Generator], Weights]


@dataclass(frozen=True)
class RandomGrid:
    """Weights rounded for real, to the nearest of evenly spaced levels whose place is drawn.

    The step is that of `Rounding`; what is random is where the levels lie, one draw for each range. So the errors of
    single weights are uniform, as the trace form of `Rounding` has them, but they are no longer independent.

    Attributes:
        bits: 1 to 16.
        per: one range for the whole "tensor", or one for each "channel", as `Rounding` has it.
    """

    bits: int = 8
    per: Literal["tensor", "channel"] = "tensor"

    def __post_init__(self) -> None:
        Rounding(self.bits, self.per)

    def draw(self, weights: Weights, generator: torch.Generator) -> dict[str, Tensor]:
        """The error of rounding every weight."""
        found = {}
        for name, weight in weights.items():
            step = step_of(Rounding(self.bits, self.per), name, weight)
            if not float(step.max()):
                continue
            offset = torch.rand(step.shape, generator=generator, dtype=torch.float64).to(weight)
            places = torch.where(step > 0, weight / step.clamp(min=torch.finfo(weight.dtype).tiny), 0)
            found[name] = ((places + offset).round() - offset - places) * step
        return found


def step_of(rounding: Rounding, name: str, weight: Tensor) -> Tensor:
    """Distance of two levels, of a shape that broadcasts to the weight."""
    variance = rounding.moments(name, weight)[1]
    assert variance is not None
    return (variance * 12).sqrt()


Change = str | Perturbation | LowRank | Operator | Sampler | RandomGrid


class Bound(Protocol):
    """A change of one model's weights."""

    @property
    def names(self) -> list[str]:
        """The parameters that may move."""
        ...

    def energy(self, gradients: Weights, generator: torch.Generator) -> float:
        """`g^T C g`, or an unbiased draw of it."""
        ...

    def draw(self, generator: torch.Generator) -> Weights:
        """One change."""
        ...


@dataclass(frozen=True)
class Moments:
    """A mean and a variance for each weight."""

    means: Weights
    variances: Weights

    @property
    def names(self) -> list[str]:
        """The parameters that may move."""
        return list(dict.fromkeys([*self.means, *self.variances]))

    def energy(self, gradients: Weights, generator: torch.Generator) -> float:
        """`(sum of g * mean)^2 + sum of g^2 * variance`."""
        moved = sum((float((gradients[n] * mean).sum(dtype=torch.float64)) for n, mean in self.means.items()), 0.0)
        noise = 0.0
        for name, variance in self.variances.items():
            g = gradients[name]
            same = variance.numel() == 1 or all(s == 0 for s in variance.stride())
            # A variance that all weights of a tensor share needs no product as large as the tensor.
            one = torch.linalg.vecdot(g.flatten(), g.flatten()) * variance.flatten()[0] if same else None
            noise += float((g.square() * variance).sum(dtype=torch.float64) if one is None else one)
        return moved**2 + noise

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The mean, and normal noise."""
        found = dict(self.means)
        for name, variance in self.variances.items():
            noise = torch.randn(variance.shape, generator=generator, dtype=variance.dtype).to(variance.device)
            noise *= variance.sqrt()
            found[name] = found[name] + noise if name in found else noise
        return found


@dataclass(frozen=True)
class Uniform:
    """Moments whose noise is drawn as uniform, as errors of rounding are."""

    moments: Moments

    @property
    def names(self) -> list[str]:
        """The parameters that may move."""
        return self.moments.names

    def energy(self, gradients: Weights, generator: torch.Generator) -> float:
        """As for any noise of these moments."""
        return self.moments.energy(gradients, generator)

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Independent uniform noise."""
        found = {}
        for name, variance in self.moments.variances.items():
            noise = torch.rand(variance.shape, generator=generator, dtype=variance.dtype).to(variance.device)
            found[name] = (noise - 0.5) * (12 * variance).sqrt()
        return found


@dataclass(frozen=True)
class _Factors:
    factors: Weights
    rank: int

    @property
    def names(self) -> list[str]:
        return list(self.factors)

    def energy(self, gradients: Weights, generator: torch.Generator) -> float:
        along = sum(torch.einsum("rp,p->r", f.flatten(1), gradients[n].flatten()) for n, f in self.factors.items())
        assert isinstance(along, Tensor)
        return float(along.double().square().sum())

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = torch.randn(self.rank, generator=generator, dtype=torch.float64)
        return {name: torch.tensordot(drawn.to(f), f, 1) for name, f in self.factors.items()}


@dataclass(frozen=True)
class _Any:
    """What a function draws; `apply` gives `C g`, or `g^T d` is squared of a fresh draw."""

    weights: Weights
    sampler: Callable[[Weights, torch.Generator], Weights] | None
    apply: Callable[[Weights], Weights] | None = None

    @property
    def names(self) -> list[str]:
        return list(self.weights)

    def energy(self, gradients: Weights, generator: torch.Generator) -> float:
        if self.apply is None:
            return _along(gradients, self.draw(generator)) ** 2
        return _along(gradients, _checked(self.apply(_copies(gradients)), self.weights, "operator"))

    def draw(self, generator: torch.Generator) -> Weights:
        if self.sampler is None:
            raise InputError("the operator has no draw=, which the empirical form needs; give one, or form='trace'")
        return _checked(self.sampler(_copies(self.weights), generator), self.weights, "sampler")


def _along(one: Weights, other: Weights) -> float:
    return sum(float((one[name] * value).sum(dtype=torch.float64)) for name, value in other.items())


def _copies(tensors: Weights) -> dict[str, Tensor]:
    """What may be changed in place."""
    return {name: value.clone() for name, value in tensors.items()}


def _checked(found: Any, weights: Weights, what: str) -> Weights:
    if not isinstance(found, Mapping):
        raise InputError(f"the {what} gives a {type(found).__name__}; it must return a dict of tensors by parameter")
    for name, value in found.items():
        if name not in weights:
            raise InputError(f"the {what} gives {name!r}, which is none of the parameters that may move")
        if not isinstance(value, Tensor):
            raise InputError(f"the {what} gives a {type(value).__name__} for {name!r}; it must be a tensor")
        if value.shape != weights[name].shape:
            raise InputError(
                f"the {what} gives {name!r} the shape {tuple(value.shape)}, it is {tuple(weights[name].shape)}"
            )
    return found


def parameters_of(model: nn.Module, patterns: Sequence[str] | None, change: Any = None) -> dict[str, Tensor]:
    """The parameters that may move.

    Args:
        model: the model.
        patterns: exact names, globs or `re:` regular expressions; None for all of them, for rounding those of two
            dimensions or more.
        change: what is done to them.

    Raises:
        InputError: the patterns are one string.
        ModelError: a pattern matches none, or the model has none.
    """
    if isinstance(patterns, str):
        raise InputError(f"parameters={patterns!r} is one string; give a list of names or patterns")
    known = {name: p.detach() for name, p in model.named_parameters()}
    if patterns is None:
        matrices = isinstance(change, (Rounding, RandomGrid))
        found = {name: p for name, p in known.items() if p.ndim > 1 or not matrices}
    else:
        found = {}
        for pattern in patterns:
            meant = matcher(pattern)
            hits = {name: p for name, p in known.items() if meant(name)}
            if not hits:
                raise ModelError(f"{pattern!r} matches none of the parameters {', '.join(list(known)[:8])}, ...")
            found |= hits
    if not found:
        raise ModelError(f"{type(model).__name__} has no parameter that this perturbation moves")
    return found


def bind(change: Change, model: nn.Module, patterns: Sequence[str] | None = None) -> Bound:
    """A change of this model's weights.

    Raises:
        InputError: it is of no known kind, or its moments or factors do not fit the weights.
        ModelError: a pattern matches no parameter.
    """
    if isinstance(change, LowRank):
        return _factors(change, parameters_of(model, patterns))
    weights = parameters_of(model, patterns, change)
    if isinstance(change, Operator):
        return _Any(weights, change.draw, change.apply)
    if isinstance(change, (Sampler, RandomGrid)):
        return _Any(weights, change.draw)
    if not isinstance(change, (str, Perturbation)):
        raise InputError(
            f"the perturbation is a {type(change).__name__}; give one with moments, a LowRank, Operator or Sampler, "
            "or a name such as 'isotropic'"
        )
    named = perturbation_named(change)
    if isinstance(named, Diagonal):
        _known(named.variances, weights, "variances")
    means, variances = {}, {}
    for name, weight in weights.items():
        mean, variance = moments_of(named, name, weight)
        if mean is not None:
            means[name] = mean
        if variance is not None:
            variances[name] = variance
    moments = Moments(means, variances)
    if not moments.names:
        raise InputError(f"{type(named).__name__} moves no parameter of {type(model).__name__}")
    return Uniform(moments) if isinstance(named, Rounding) else moments


def _factors(change: LowRank, weights: Weights) -> _Factors:
    _known(change.factors, weights, "factors")
    ranks = {len(f) if f.ndim else 0 for f in change.factors.values()}
    for name, f in change.factors.items():
        if tuple(f.shape[1:]) != tuple(weights[name].shape) or len(ranks) != 1:
            wanted = ", ".join(map(str, weights[name].shape))
            raise InputError(
                f"the factors of {name!r} are {tuple(f.shape)}; they must be (rank, {wanted}), with one rank for all"
            )
    return _Factors({n: f.to(weights[n]) for n, f in change.factors.items()}, ranks.pop())


def _known(given: Weights, weights: Weights, what: str) -> None:
    strange = next((name for name in given if name not in weights), None)
    if strange is not None or not given:
        told = f"name {strange!r}, which is none of" if strange is not None else "name none of"
        raise InputError(f"the {what} {told} the parameters {', '.join(list(weights)[:8])}, ...")


def sgd_noise(lr: float, batch_size: int) -> Isotropic:
    """What the steps of SGD leave of a minimum, to first order: independent noise of variance `lr / (2 * batch_size)`.

    Args:
        lr: step size.
        batch_size: samples of a step.

    Raises:
        InputError: one of the two is not above zero.
    """
    if not (math.isfinite(lr) and lr > 0 and batch_size >= 1):
        raise InputError(f"lr={lr!r} and batch_size={batch_size!r} must be above zero")
    return Isotropic(math.sqrt(lr / (2 * batch_size)))
